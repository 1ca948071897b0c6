"""A pass kept loop by loop: its read-outs are the model's own, chunked or not."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import VARIANTS, tiny_model, tokens

from looplm.model import readout
from looplm.model.readout import divergence, run_loops

IDS = tokens(2, 5)


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_every_loops_logits_are_those_of_the_model_stopped_there(name):
    model = tiny_model(**VARIANTS[name])
    run = run_loops(model, IDS)
    out = model(IDS, output_hidden_states=True)
    assert torch.equal(run.start, out.hidden_states[0]) and torch.equal(run.gate_logits, out.gate_logits)
    for loop in (1, 2, 3):
        assert torch.equal(run.states[loop - 1], out.hidden_states[loop])
        assert torch.equal(run.logits(loop), model(IDS, exit_at_step=loop - 1).logits)
    assert torch.equal(run.logits(), out.logits)


def test_loops_beyond_the_trained_ones_warn():
    model = tiny_model()
    with pytest.warns(UserWarning, match="running 5 loops, but the model was trained with 3"):
        run = run_loops(model, IDS, 5)
    assert len(run.states) == 5 and run.gate_logits.shape == (2, 5, 5)


@pytest.mark.parametrize("size", [1, 64 * 4 * 3, 1 << 20])
def test_chunks_cover_every_position_once(monkeypatch, size):
    run = run_loops(tiny_model(), IDS)
    monkeypatch.setattr(readout, "READ_BYTES", size)
    parts = list(run.chunks())
    assert [n for part in parts for n in range(10)[part]] == list(range(10))
    assert max(part.stop - part.start for part in parts) == {1: 1, 768: 3}.get(size, 10)
    for loop in (1, 2, 3):
        joined = torch.cat([run.log_probabilities(loop, part) for part in parts])
        torch.testing.assert_close(joined, run.logits(loop).log_softmax(-1).flatten(0, 1), rtol=0, atol=1e-12)


@given(st.integers(0, 63), st.integers(0, 63))
def test_a_logit_difference_is_that_of_the_logits(token, other):
    run = run_loops(MODEL, IDS)
    found = run.logit_difference(token, other)
    assert found.shape == (2, 5, 3)
    for loop in (1, 2, 3):
        logits = run.logits(loop)
        torch.testing.assert_close(found[..., loop - 1], logits[..., token] - logits[..., other], rtol=0, atol=1e-10)


MODEL = tiny_model(num_coda_layers=1)


def test_divergence_by_hand():
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.5, 0.25])
    p, q = p.clamp(min=1e-30).log(), q.log()
    assert math.isclose(float(divergence(p, q)), 0.5 * math.log(2), rel_tol=1e-6)
    assert float(divergence(p, p)) == 0


@given(st.lists(st.floats(-9, 9), min_size=4, max_size=4), st.lists(st.floats(-9, 9), min_size=4, max_size=4))
def test_divergence_is_not_negative_and_0_only_for_equals(first, second):
    p, q = (torch.tensor(x, dtype=torch.float64).log_softmax(-1) for x in (first, second))
    found = float(divergence(p, q))
    plain = sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    assert found >= 0 and math.isclose(found, plain, rel_tol=1e-9, abs_tol=1e-12)
    # Pinsker's inequality: KL >= (sum |p - q|)^2 / 2
    assert found >= float((p.exp() - q.exp()).abs().sum()) ** 2 / 2 - 1e-12


def test_training_mode_is_left_as_it_was():
    model = tiny_model(attention_dropout=0.5).train()
    assert torch.equal(run_loops(model, IDS).logits(), run_loops(model, IDS).logits())
    assert model.training and all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(3, dtype=torch.long), r"ids is \(3,\) torch.int64; it must be \(B, S\) token ids"),
        (torch.zeros(1, 0, dtype=torch.long), r"ids is \(1, 0\)"),
        (torch.zeros(1, 3), r"ids is \(1, 3\) torch.float32"),
        (torch.tensor([[1, 64]]), r"ids spans token ids 1..64; they must lie in 0..63"),
        (torch.tensor([[-1, 4]]), r"ids spans token ids -1..4"),
        (tokens(1, 129), r"ids has 129 tokens, but the context holds 128; shorten it"),
    ],
)
def test_ids_that_cannot_be_run_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        run_loops(MODEL, ids)


def test_loops_and_tokens_out_of_range_are_refused():
    with pytest.raises(ValueError, match="num_loop_steps is 0"):
        run_loops(MODEL, IDS, 0)
    run = run_loops(MODEL, IDS)
    with pytest.raises(ValueError, match=r"loop is 4; this pass ran loops 1\.\.3"):
        run.logits(4)
    with pytest.raises(ValueError, match=r"other is 64; it must lie in 0\.\.63"):
        run.logit_difference(3, 64)
