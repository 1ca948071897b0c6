"""The plan of windows, and validation batches; slow obvious references for each."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask

from looplm.data.encoding import EncodedCorpus
from looplm.data.pipeline import Windows, validation_batches

BEGIN = 0


def corpus_of(*lengths: int) -> EncodedCorpus:
    """Documents of these numbers of text tokens; text token values count 1, 2, 3, ... through the stream."""
    tokens, value = [], 0
    for length in lengths:
        tokens += [BEGIN, *range(value + 1, value + length + 1)]
        value += length
    offsets = np.cumsum([0, *(n + 1 for n in lengths)])
    return EncodedCorpus(np.asarray(tokens, dtype=np.uint16), offsets.astype(np.int64), 3 * value)


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

    @pytest.mark.parametrize("validation", [False, True])
    def test_only_what_is_learnt_is_a_target(self, validation):
        # stream   0 | 1 2 3 | 0 | 4 | 0 | 5 6, of which 2, 4 and 6 are learnt
        learnt = np.array([False, False, True, False, False, True, False, False, True])
        corpus = dataclasses.replace(corpus_of(3, 1, 2), learnt=learnt)
        windows = Windows(corpus, 4, keep_remainder=validation)
        assert [windows[i]["labels"].tolist() for i in range(2)] == [[-100, 2, -100, -100], [4, -100, -100, 6]]
        assert windows[1]["input_ids"].tolist() == [0, 4, 0, 5]
        padded = Windows(corpus, 7, keep_remainder=True)
        assert padded[1]["labels"].tolist() == [6, -100, -100, -100, -100, -100, -100]
        assert corpus.text_tokens == 3

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
