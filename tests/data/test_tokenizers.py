"""The trained tokenizer: layout, exact round trips, determinism, reloading."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from looplm.data.tokenizers import MIN_VOCAB_SIZE, load_tokenizer, train_bpe

DOCUMENTS = [
    "the loop goes round the loop 1234 times\n",
    "and the exit gate opens at loop 4, or never. " * 3,
    "naïve ☃ 3.14",
]
TOKENIZER = train_bpe(DOCUMENTS, 300)


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=True)["input_ids"]


def test_special_tokens_have_the_ids_of_the_released_models():
    assert TOKENIZER.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id) == (0, 0, 0)
    assert TOKENIZER.all_special_ids == [0, 1, 2]
    assert ids(TOKENIZER, "<|im_start|>loop<|im_end|>")[:: len(ids(TOKENIZER, "loop")) + 1] == [1, 2]


def test_vocabulary_size_is_what_was_asked_for():
    assert len(TOKENIZER) == 300
    assert len(train_bpe(["x"], MIN_VOCAB_SIZE)) == MIN_VOCAB_SIZE


def test_a_small_corpus_gives_fewer_entries():
    assert len(train_bpe(["abab"], 1000)) == MIN_VOCAB_SIZE + 2  # ab, abab


def test_merges_are_byte_pair_merges():
    # the commonest pair is merged first: "ab" (4 times) before anything with "c"
    assert ids(train_bpe(["abababab c"], MIN_VOCAB_SIZE + 1), "abcab")[0] == MIN_VOCAB_SIZE
    assert len(ids(train_bpe(["abababab c"], MIN_VOCAB_SIZE + 1), "abcab")) == 3


def test_vocab_size_below_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 258: give at least 259"):
        train_bpe(DOCUMENTS, 258)


@pytest.mark.parametrize("text", ["1234", "a1234", "  12", "\n\n 7 77"])
def test_digits_are_never_merged_nor_joined_to_space(text):
    tokenizer = train_bpe([text * 50], 400)
    pieces = [tokenizer.decode([i]) for i in ids(tokenizer, text)]
    assert "".join(pieces) == text
    assert all(len(piece) == 1 for piece in pieces if any(c.isdigit() for c in piece))


@settings(deadline=None)
@given(
    st.text() | st.text(alphabet="ab1 \n\t.,'é☃<|>") | st.sampled_from(["<|im_end|> x <|endoftext|>", " , .", "don 't"])
)
def test_any_text_round_trips(text):
    assert TOKENIZER.decode(ids(TOKENIZER, text)) == text


def test_training_is_deterministic():
    assert train_bpe(DOCUMENTS, 300).get_vocab() == TOKENIZER.get_vocab()
    assert train_bpe(iter(DOCUMENTS), 300).backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


def test_saved_and_reloaded_it_is_the_same(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    text = "".join(DOCUMENTS) + "  12 <|im_start|> , ."
    for tokenizer in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path)), load_tokenizer(tmp_path)):
        assert ids(tokenizer, text) == ids(TOKENIZER, text)
        assert tokenizer.decode(ids(tokenizer, text)) == text
        assert tokenizer.all_special_ids == [0, 1, 2]
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 0)


@pytest.mark.parametrize("kind", ["missing folder", "folder without tokenizer", "bad name"])
def test_no_tokenizer_is_one_line(tmp_path, kind):
    name = {"missing folder": str(tmp_path / "no" / "folder"), "folder without tokenizer": str(tmp_path)}.get(
        kind, "?!"
    )
    with pytest.raises(ValueError, match="no tokenizer at ") as caught:
        load_tokenizer(name)
    assert str(caught.value).startswith(f"no tokenizer at {name}: give a folder with tokenizer.json or a Hugging Face")
    assert "\n" not in str(caught.value)


def test_code_of_a_repository_is_not_run(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": [null, "evil.Tokenizer"]}}')
    (tmp_path / "evil.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nclass Tokenizer: ...\n"
    )
    with pytest.raises(ValueError, match="no tokenizer at "):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "ran").exists()
