"""Documents to token streams: exact ids, masks and round trips, for texts and for conversations."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from looplm.data import encoding
from looplm.data.chat import CHAT_TEMPLATE, ROLES
from looplm.data.encoding import Encoder, encode_documents
from looplm.data.tokenizers import train_bpe

TOKENIZER = train_bpe(["a loop of loops, 12 loops round\n"] * 3, 280)
BEGIN, TURN_START, TURN_END = 0, 1, 2


class TestEncodeDocuments:
    def test_table(self):
        corpus = encode_documents(train_bpe(["ab"], 260), ["ab", "b", "aba"])
        a, b, ab = 3 + 64, 3 + 65, 259  # '!' is byte id 3 and '!'..'~' are consecutive
        assert corpus.tokens.tolist() == [0, ab, 0, b, 0, ab, a]
        assert corpus.tokens.dtype == np.uint16
        assert (corpus.offsets.tolist(), corpus.offsets.dtype) == ([0, 2, 4, 7], np.int64)
        assert (corpus.characters, corpus.text_tokens) == (6, 4)

    @settings(deadline=None)
    @given(st.lists(st.text(max_size=30) | st.text(alphabet="lop 1\n☃", max_size=30), min_size=1, max_size=8))
    def test_each_document_decodes_back(self, documents):
        corpus = encode_documents(TOKENIZER, documents)
        assert corpus.characters == sum(len(d) for d in documents)
        for d, (first, last) in enumerate(zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True)):
            begin, *text = corpus.tokens[first:last].tolist()
            assert begin == BEGIN
            assert text == TOKENIZER(documents[d], split_special_tokens=True)["input_ids"]
            assert TOKENIZER.decode(text) == documents[d]
        assert corpus.offsets[-1] == len(corpus.tokens)

    @settings(deadline=None)
    @given(st.lists(st.text(alphabet="lop \n", max_size=40), min_size=1, max_size=5), st.integers(1, 9))
    def test_long_documents_in_pieces_lose_nothing(self, documents, longest):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encoding, "MAX_PIECE", longest)
            patch.setattr(encoding, "_PIECES_PER_CALL", 3)
            corpus = encode_documents(TOKENIZER, documents)
        spans = zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True)
        assert [TOKENIZER.decode(corpus.tokens[i + 1 : j].tolist()) for i, j in spans] == documents
        assert (corpus.tokens == BEGIN).sum() == len(documents)

    def test_pieces_end_at_lines(self, monkeypatch):
        monkeypatch.setattr(encoding, "MAX_PIECE", 5)
        assert list(encoding._pieces("ab\ncd\nefghijk\n")) == ["ab\n", "cd\n", "efghi", "jk\n"]
        assert list(encoding._pieces("abcde")) == ["abcde"]
        assert list(encoding._pieces("")) == [""]

    def test_special_tokens_in_the_text_are_text(self):
        text = "x <|endoftext|> y <|im_end|>"
        corpus = encode_documents(TOKENIZER, [text])
        assert corpus.tokens.min(initial=9, where=np.arange(len(corpus.tokens)) > 0) > 2
        assert TOKENIZER.decode(corpus.tokens[1:].tolist()) == text
        assert TOKENIZER("<|im_end|>")["input_ids"] == [2]  # the tokenizer itself is left as it was

    def test_large_vocabularies_need_uint32(self, monkeypatch):
        monkeypatch.setattr(type(TOKENIZER), "__len__", lambda self: 2**16 + 1)
        assert encode_documents(TOKENIZER, ["loop"]).tokens.dtype == np.uint32
        monkeypatch.setattr(type(TOKENIZER), "__len__", lambda self: 2**16)
        assert encode_documents(TOKENIZER, ["loop"]).tokens.dtype == np.uint16

    def test_begin_token_falls_back_to_eos(self, tmp_path):
        TOKENIZER.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path, bos_token=None, eos_token="<|im_end|>")
        assert encode_documents(tokenizer, ["loop"]).tokens[0] == 2
        tokenizer.eos_token = None
        with pytest.raises(ValueError, match="neither a bos nor an eos"):
            encode_documents(tokenizer, ["loop"])

    def test_no_documents(self):
        with pytest.raises(ValueError, match="corpus is empty"):
            encode_documents(TOKENIZER, [])

    def test_limits_left_behind_by_other_calls_do_not_count(self):
        tokenizer = train_bpe(["loop"], 260)
        tokenizer(["loop of loops", "loop"], truncation=True, max_length=2, padding=True)
        assert encode_documents(tokenizer, ["loop of loops"]).text_tokens > 2
        assert Encoder.of(tokenizer).fingerprint == Encoder.of(train_bpe(["loop"], 260)).fingerprint

    def test_fingerprint_tells_tokenizers_apart(self):
        others = [train_bpe(["a loop of loops, 12 loops round\n"] * 3, 262), train_bpe(["round round round"], 280)]
        assert len({Encoder.of(tokenizer).fingerprint for tokenizer in [TOKENIZER, *others]}) == 3

    def test_sent_to_another_process_it_encodes_the_same(self):
        encoder = Encoder.of(TOKENIZER)
        before = encoder.encode(["loops, loops"])
        again = pickle.loads(pickle.dumps(encoder))
        assert again == encoder
        assert again.encode(["loops, loops"]).tokens.tolist() == before.tokens.tolist()


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


PLAIN_CONTENTS = st.text(alphabet="lop 1\n☃<|", max_size=12)
CONTENTS = PLAIN_CONTENTS | st.just("<|im_end|>")
CONVERSATIONS = st.lists(st.builds(message, st.sampled_from(ROLES), CONTENTS), max_size=4).map(
    lambda turns: [*turns, message("assistant", "loop")]
)


def bytes_of(text: str) -> list[int]:
    """Ids of ASCII text under a tokenizer without merges."""
    alphabet = sorted(PLAIN.convert_ids_to_tokens(range(3, 259)))
    assert len(alphabet) == 256
    return [PLAIN.convert_tokens_to_ids({"\n": "Ċ", " ": "Ġ"}.get(character, character)) for character in text]


PLAIN = train_bpe(["x"], 259)


class TestConversations:
    def test_table(self):
        turns = [message("user", "a b"), message("assistant", "c")]
        corpus = encode_documents(PLAIN, [turns, [message("assistant", "")]])
        user, header, line = bytes_of("user\na b"), bytes_of("assistant\n"), bytes_of("\n")
        first = [BEGIN, TURN_START, *user, TURN_END, *line, TURN_START, *header, *bytes_of("c"), TURN_END, *line]
        second = [BEGIN, TURN_START, *header, TURN_END, *line]
        assert corpus.tokens.tolist() == first + second
        assert corpus.learnt.tolist() == (
            [False] * (2 + 8 + 2 + 1 + 10) + [True, True, False] + [False] * (2 + 10) + [True, False]
        )
        assert corpus.offsets.tolist() == [0, len(first), len(first) + len(second)]
        assert (corpus.characters, corpus.text_tokens, corpus.documents) == (1, 3, 2)
        assert bytes_of("ab") == [3 + 64, 3 + 65]

    def test_no_begin_token_where_that_begins_a_turn_anyway(self, tmp_path):
        TOKENIZER.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path, bos_token="<|im_start|>")
        turns = [message("assistant", "loop")]
        with_begin, without = encode_documents(TOKENIZER, [turns, turns]), encode_documents(tokenizer, [turns, turns])
        assert without.tokens.tolist() == [token for token in with_begin.tokens.tolist() if token != BEGIN]
        assert without.tokens[without.offsets[:-1]].tolist() == [TURN_START, TURN_START]
        assert encode_documents(tokenizer, ["loop"]).tokens[0] == TURN_START

    @settings(deadline=None)
    @given(st.lists(CONVERSATIONS, min_size=1, max_size=4))
    def test_markers_and_targets(self, conversations):
        corpus = encode_documents(TOKENIZER, conversations)
        spans = zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True)
        for turns, (first, last) in zip(conversations, spans, strict=True):
            tokens, learnt = corpus.tokens[first:last], corpus.learnt[first:last]
            assert tokens[0] == BEGIN
            assert (tokens == TURN_START).sum() == (tokens == TURN_END).sum() == len(turns)
            said = "".join(turn["content"] + "<|im_end|>" for turn in turns if turn["role"] == "assistant")
            assert TOKENIZER.decode(tokens[learnt].tolist()) == said
            rendered = TOKENIZER.apply_chat_template(turns, chat_template=CHAT_TEMPLATE, tokenize=False)
            assert TOKENIZER.decode(tokens[1:].tolist()) == rendered
        said = [turn["content"] for turns in conversations for turn in turns if turn["role"] == "assistant"]
        assert corpus.characters == sum(map(len, said))

    @settings(deadline=None)
    @given(
        st.lists(st.builds(message, st.sampled_from(["system", "user"]), PLAIN_CONTENTS), min_size=1, max_size=3),
        PLAIN_CONTENTS,
    )
    def test_an_answer_is_encoded_as_it_is_generated(self, context, answer):
        found = encode_documents(TOKENIZER, [[*context, message("assistant", answer)]]).tokens[1:].tolist()
        assert TOKENIZER.chat_template == CHAT_TEMPLATE
        prompt = TOKENIZER.apply_chat_template(context, add_generation_prompt=True)["input_ids"]
        said = TOKENIZER(answer)["input_ids"]
        assert found == [*prompt, *said, TURN_END, *TOKENIZER("\n")["input_ids"]]

    def test_long_content_in_pieces(self, monkeypatch):
        monkeypatch.setattr(encoding, "MAX_PIECE", 3)
        corpus = encode_documents(TOKENIZER, [[message("assistant", "loop loop loop")]])
        assert TOKENIZER.decode(corpus.tokens[corpus.learnt].tolist()) == "loop loop loop<|im_end|>"

    def test_a_vocabulary_without_markers(self):
        plain = PreTrainedTokenizerFast(tokenizer_object=bare_tokenizer(), bos_token="b")
        encode_documents(plain, ["b"])
        with pytest.raises(ValueError, match=r"no token <\|im_start\|>, which chat data needs"):
            encode_documents(plain, [[message("assistant", "b")]])


def bare_tokenizer():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"b": 0, "u": 1}, unk_token="u"))
