"""Perplexity by loop against one pass a token; windows, bytes and intervals by hand."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from looplm.data.tokenizers import train_bpe
from looplm.evaluation.perplexity import measure_perplexity, strided, summarise_perplexity, token_bytes
from looplm.model.measuring import encode_text, measure_text

TEXT = " ".join(random.Random(1).choices("the loop goes round — and the text goes on, 12 times or more.".split(), k=60))
TOKENIZER = train_bpe([TEXT], 290)


def test_windows_by_hand() -> None:
    # 8 tokens, windows of 4, 2 new ones each: 0 1 2 3 -> 1 2 3 4; then 2 3 4 5 -> 5 6; then 4 5 6 -> 7.
    assert strided(range(8), 4, 2) == [([0], [1, 2, 3, 4]), ([2, 3, 4], [5, 6]), ([4, 5, 6], [7])]
    assert strided([7, 8], 4, 4) == [([7], [8])]


@given(st.integers(2, 60), st.integers(1, 12), st.data())
@settings(max_examples=60, deadline=None)
def test_every_token_is_scored_once_behind_enough(number: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    found = strided(range(number), window, stride)
    assert [target for _, targets in found for target in targets] == list(range(1, number))
    for place, (context, targets) in enumerate(found):
        assert context == list(range(targets[0] - len(context), targets[0]))
        assert len(context) + len(targets) - 1 <= window
        assert place == 0 or len(context) >= window - stride + 1


def test_bytes_end_with_their_token() -> None:
    sizes, whole = token_bytes(TOKENIZER, "é— loop"), len("é— loop".encode())
    ids = TOKENIZER("é— loop", add_special_tokens=False)["input_ids"]
    assert len(sizes) == len(ids) and sum(sizes) == whole and min(sizes) >= 0
    assert token_bytes(TOKENIZER, "the")[-1] > 0


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_losses_are_those_of_one_pass_a_token(stride: int) -> None:
    model, text = tiny_model(vocab_size=len(TOKENIZER)), TEXT[:160]
    ids = encode_text(model, TOKENIZER, text).tolist()
    assert len(ids) > 2 * 16  # windows of every kind
    found = measure_perplexity(model, TOKENIZER, text, loops=[1, 2, 4], window=16, stride=stride, batch_size=3)
    for row in found.loops:
        nats = 0.0
        for context, targets in strided(ids, 16, stride):
            for count, target in enumerate(targets):
                with torch.no_grad():
                    seen = torch.tensor([context + targets[:count]])
                    logits = model(seen, num_loop_steps=max(row.loop, 3), exit_at_step=row.loop - 1).logits[0, -1]
                nats -= float(logits.log_softmax(-1)[target])
        assert row.nats == pytest.approx(nats / (len(ids) - 1), abs=1e-9)
        assert row.perplexity == pytest.approx(math.exp(row.nats))
    assert found.tokens == len(ids) - 1 and [row.loop for row in found.loops] == [1, 2, 4]
    assert found.bytes == len(text.encode()) - token_bytes(TOKENIZER, text)[0]


def test_it_agrees_with_what_verify_measures() -> None:
    model = tiny_model(vocab_size=len(TOKENIZER))
    window = model.config.max_position_embeddings
    found = measure_perplexity(model, TOKENIZER, TEXT * 3, loops=[1, 2, 3], window=window, stride=window, batch_size=2)
    assert [row.nats for row in found.loops] == pytest.approx(measure_text(model, TOKENIZER, TEXT * 3).losses)


def test_numbers_by_hand() -> None:
    """Two windows of 1 and 3 tokens, 4 and 8 bytes; loop 2 of 2: 1 and 3 nats. Bits a byte: 4 / ln 2 / 12."""
    nats = {1: np.array([2.0, 6.0]), 2: np.array([1.0, 3.0])}
    found = summarise_perplexity(nats, np.array([1.0, 3.0]), np.array([4.0, 8.0]), 2, 0, [1, 2])
    first, last = found.loops
    assert (first.nats, last.nats, first.above_trained, last.above_trained) == (2.0, 1.0, 1.0, 0.0)
    assert last.perplexity == pytest.approx(math.e) and last.bits_per_byte == pytest.approx(4 / math.log(2) / 12)
    assert last.nats_interval == (1.0, 1.0)  # each window has a mean of 1
    assert last.bits_interval == pytest.approx((0.25 / math.log(2), 0.375 / math.log(2)))
    assert "2 windows" in found.table("x").markdown() and "loop" in found.chart()


@pytest.mark.parametrize(
    ("window", "stride", "text", "message"),
    [
        (129, 4, TEXT, r"window is 129; it must lie in 1\.\.128"),
        (8, 9, TEXT, r"stride is 9; it must lie in 1\.\.8"),
        (8, 0, TEXT, "stride is 0"),
        (128, 128, "the loop", "1 windows have a target; an interval needs 2 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(window: int, stride: int, text: str, message: str) -> None:
    model = tiny_model(vocab_size=len(TOKENIZER))
    with pytest.raises(ValueError, match=message):
        measure_perplexity(model, TOKENIZER, text, loops=[1], window=window, stride=stride, batch_size=2)
