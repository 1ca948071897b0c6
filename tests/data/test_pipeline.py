"""Encoding, the plan of windows, and batches by step; slow obvious references for each."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig
from transformers.masking_utils import create_causal_mask

from looplm.data import pipeline
from looplm.data.pipeline import EncodedCorpus, TrainingBatches, Windows, encode_documents, validation_batches
from looplm.data.tokenizers import train_bpe

ROOT = Path(__file__).parents[2]
TOKENIZER = train_bpe(["a loop of loops, 12 loops round\n"] * 3, 280)
BEGIN = 0


def corpus_of(*lengths: int) -> EncodedCorpus:
    """Documents of these numbers of text tokens; text token values count 1, 2, 3, ... through the stream."""
    tokens, value = [], 0
    for length in lengths:
        tokens += [BEGIN, *range(value + 1, value + length + 1)]
        value += length
    offsets = np.cumsum([0, *(n + 1 for n in lengths)])
    return EncodedCorpus(np.asarray(tokens, dtype=np.uint16), offsets.astype(np.int64), 3 * value)


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
            patch.setattr(pipeline, "MAX_PIECE", longest)
            patch.setattr(pipeline, "_PIECES_PER_CALL", 3)
            corpus = encode_documents(TOKENIZER, documents)
        spans = zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True)
        assert [TOKENIZER.decode(corpus.tokens[i + 1 : j].tolist()) for i, j in spans] == documents
        assert (corpus.tokens == BEGIN).sum() == len(documents)

    def test_pieces_end_at_lines(self, monkeypatch):
        monkeypatch.setattr(pipeline, "MAX_PIECE", 5)
        assert list(pipeline._pieces("ab\ncd\nefghijk\n")) == ["ab\n", "cd\n", "efghi", "jk\n"]
        assert list(pipeline._pieces("abcde")) == ["abcde"]
        assert list(pipeline._pieces("")) == [""]

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


def slow_window(corpus: EncodedCorpus, index: int, size: int, separate: bool, validation: bool) -> dict[str, list[int]]:
    """One token at a time."""
    tokens, begins = corpus.tokens.tolist(), set(corpus.offsets[:-1].tolist())
    inputs, labels, positions, position = [], [], [], -1
    for k in range(index * size, index * size + size):
        position = 0 if (separate and k in begins) else position + 1
        positions.append(position)
        inputs.append(tokens[k] if k < len(tokens) else tokens[0])
        masked = k + 1 >= len(tokens) or (validation and k + 1 in begins)
        labels.append(-100 if masked else tokens[k + 1])
    return {"input_ids": inputs, "labels": labels, "position_ids": positions}


class TestWindows:
    # stream:   0 | 1 2 3 | 0 | 4 | 0 | 5 6   of documents with 3, 1 and 2 text tokens
    TABLE = (
        (False, False, [([0, 1, 2, 3], [1, 2, 3, 0], [0, 1, 2, 3]), ([0, 4, 0, 5], [4, 0, 5, 6], [0, 1, 2, 3])]),
        (True, False, [([0, 1, 2, 3], [1, 2, 3, 0], [0, 1, 2, 3]), ([0, 4, 0, 5], [4, 0, 5, 6], [0, 1, 0, 1])]),
        (True, True, [([0, 1, 2, 3], [1, 2, 3, -100], [0, 1, 2, 3]), ([0, 4, 0, 5], [4, -100, 5, 6], [0, 1, 0, 1])]),
    )

    @pytest.mark.parametrize(("separate", "validation", "expected"), TABLE)
    def test_table(self, separate, validation, expected):
        windows = Windows(corpus_of(3, 1, 2), 4, separate_documents=separate, keep_remainder=validation)
        found = [tuple(windows[i][name].tolist() for name in ("input_ids", "labels", "position_ids")) for i in range(2)]
        assert len(windows) == 2
        assert found == expected

    def test_remainder_is_padded_or_dropped(self):
        assert len(Windows(corpus_of(3, 1, 2), 5)) == 1
        windows = Windows(corpus_of(3, 1, 2), 5, keep_remainder=True)
        assert len(windows) == 2
        assert windows[1]["input_ids"].tolist() == [4, 0, 5, 6, 0]
        assert windows[1]["labels"].tolist() == [-100, 5, 6, -100, -100]

    @settings(deadline=None)
    @given(
        st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(lambda lengths: sum(lengths) > 0),
        st.integers(1, 12),
        st.booleans(),
        st.booleans(),
    )
    def test_equals_the_slow_reference(self, lengths, size, separate, validation):
        corpus = corpus_of(*lengths)
        if not validation and len(corpus.tokens) <= size:
            return
        windows = Windows(corpus, size, separate_documents=separate, keep_remainder=validation)
        items = [windows[i] for i in range(len(windows))]
        for i, item in enumerate(items):
            assert all(array.dtype == np.int64 for array in item.values())
            slow = slow_window(corpus, i, size, separate, validation)
            assert {name: array.tolist() for name, array in item.items()} == slow
        labels = np.concatenate([item["labels"] for item in items])
        if validation:  # each text token once and nothing else: exact bits per character
            assert labels[labels >= 0].tolist() == list(range(1, corpus.text_tokens + 1))
        else:  # each token but the first once, but for the remainder
            assert labels.tolist() == corpus.tokens[1 : 1 + len(labels)].tolist()
            assert len(corpus.tokens) - 1 - len(labels) < size

    @settings(deadline=None, max_examples=30)
    @given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.sampled_from(["eager", "sdpa"]))
    def test_transformers_keeps_separated_documents_apart(self, lengths, attention):
        corpus, size = corpus_of(7, *lengths), 8
        windows = Windows(corpus, size, separate_documents=True, keep_remainder=True)
        batch = next(validation_batches(windows, len(windows)))
        config = LlamaConfig(num_hidden_layers=1, attn_implementation=attention)
        embeds = torch.zeros(len(windows), size, 4)
        mask = create_causal_mask(config, embeds, None, None, position_ids=batch["position_ids"])
        document = np.searchsorted(corpus.offsets[:-1], np.arange(len(windows) * size), side="right").reshape(-1, size)
        for row in range(len(windows)):
            allowed = np.tril(document[row][:, None] == document[row][None, :])
            if mask is None:  # sdpa is then plainly causal
                found = np.tril(np.ones_like(allowed))
            else:
                found = (mask[row, 0] == (0 if attention == "eager" else True)).numpy()
            assert np.array_equal(found, allowed)

    def test_windows_share_no_memory_with_the_stream(self):
        corpus = corpus_of(9)
        item = Windows(corpus, 4)[0]
        item["input_ids"][:] = -1
        assert item["labels"].tolist() == [1, 2, 3, 4]
        assert corpus.tokens.tolist() == list(range(10))

    @pytest.mark.parametrize("index", [-1, 2])
    def test_outside_is_an_index_error(self, index):
        with pytest.raises(IndexError):
            Windows(corpus_of(8), 4)[index]

    def test_refused(self):
        with pytest.raises(
            ValueError, match="corpus has 5 tokens, fewer than one sequence of 6: use more text or a short"
        ):
            Windows(corpus_of(4), 5)
        assert len(Windows(corpus_of(4), 4)) == len(Windows(corpus_of(4), 5, keep_remainder=True)) == 1
        with pytest.raises(ValueError, match="corpus has 1 tokens"):
            Windows(corpus_of(0), 5, keep_remainder=True)
        with pytest.raises(ValueError, match="sequence_length is 0"):
            Windows(corpus_of(4), 0)


def first_inputs(batches: TrainingBatches, steps: int) -> list[int]:
    """The first token of every sample of the first steps: it names the window in `corpus_of(n)`."""
    return [token for step in range(steps) for token in batches[step]["input_ids"][:, 0].tolist()]


class TestTrainingBatches:
    WINDOWS = Windows(corpus_of(60), 5)  # 12 windows whose first tokens are 0, 5, ..., 55

    def test_shapes_and_types(self):
        batch = TrainingBatches(self.WINDOWS, 4, seed=0)[7]
        assert set(batch) == {"input_ids", "labels", "position_ids"}
        assert all(value.shape == (4, 5) and value.dtype == torch.int64 for value in batch.values())
        assert torch.equal(batch["labels"], batch["input_ids"] + 1)

    @settings(deadline=None, max_examples=25)
    @given(st.integers(1, 30), st.integers(1, 17), st.integers(0, 2**32 - 1))
    def test_each_epoch_has_every_window_once(self, count, batch_size, seed):
        windows = Windows(corpus_of(2 * count), 2)
        samples = first_inputs(TrainingBatches(windows, batch_size, seed), -(-3 * count // batch_size))
        for epoch in range(3):
            assert sorted(samples[epoch * count : (epoch + 1) * count]) == list(range(0, 2 * count, 2))

    def test_epochs_and_seeds_have_orders_of_their_own(self):
        samples = first_inputs(TrainingBatches(self.WINDOWS, 4, seed=3), 9)
        epochs = {tuple(samples[i : i + 12]) for i in (0, 12, 24)}
        others = {tuple(first_inputs(TrainingBatches(self.WINDOWS, 4, seed=s), 3)) for s in (4, 5)}
        assert len(epochs | others) == 5
        assert tuple(range(0, 60, 5)) not in epochs

    def test_the_sample_stream_does_not_depend_on_the_batch_size(self):
        streams = [first_inputs(TrainingBatches(self.WINDOWS, b, seed=1), 60 // b) for b in (1, 3, 5, 20)]
        assert all(stream == streams[0] for stream in streams)

    def test_any_order_of_access_gives_the_same_batches(self):
        one, other = (TrainingBatches(self.WINDOWS, 5, seed=9) for _ in range(2))
        steps = [11, 0, 10**6, 3]
        forward = {step: one[step] for step in steps}
        for step in reversed(steps):
            assert all(torch.equal(forward[step][name], value) for name, value in other[step].items())

    def test_refused(self):
        with pytest.raises(ValueError, match="batch_size is 0"):
            TrainingBatches(self.WINDOWS, 0, seed=0)
        with pytest.raises(ValueError, match="seed is -1"):
            TrainingBatches(self.WINDOWS, 1, seed=-1)
        with pytest.raises(IndexError, match="step -1"):
            TrainingBatches(self.WINDOWS, 1, seed=0)[-1]


SCRIPT = """
import hashlib
import numpy as np
from looplm.data.pipeline import EncodedCorpus, TrainingBatches, Windows
corpus = EncodedCorpus(np.arange(501, dtype=np.uint16), np.array([0, 100, 501]), 900)
batches = TrainingBatches(Windows(corpus, 5, separate_documents=True), 6, seed=4)
samples = [batches[step][name].numpy().tobytes() for step in (40, 2, 1000) for name in ("input_ids", "position_ids")]
digest = hashlib.sha256(b"".join(samples)).hexdigest()
"""


def test_another_process_gets_the_same_batches_and_no_jax_notice():
    here: dict[str, str] = {}
    exec(SCRIPT, here)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "77"}
    command = [sys.executable, "-c", SCRIPT + "print(digest)"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == here["digest"]
    assert "jax" not in run.stderr


class TestValidationBatches:
    def test_all_windows_in_order_and_a_smaller_last_batch(self):
        windows = Windows(corpus_of(60), 5, keep_remainder=True)
        batches = list(validation_batches(windows, 5))
        assert [len(batch["labels"]) for batch in batches] == [5, 5, 2]
        assert torch.cat([batch["labels"] for batch in batches]).flatten().tolist() == list(range(1, 61))
        assert all(value.dtype == torch.int64 for batch in batches for value in batch.values())

    def test_limit_counts_batches(self):
        windows = Windows(corpus_of(60), 5)
        assert [len(b["labels"]) for b in validation_batches(windows, 5, limit=2)] == [5, 5]
        assert len(list(validation_batches(windows, 5, limit=9))) == 3

    def test_refused_at_once(self):
        windows = Windows(corpus_of(60), 5)
        with pytest.raises(ValueError, match="limit is 0"):
            validation_batches(windows, 5, limit=0)
        with pytest.raises(ValueError, match="batch_size is 0"):
            validation_batches(windows, 0)
