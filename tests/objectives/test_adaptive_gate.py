"""Equations 5 and 6 by hand, against the obvious version, and what follows from them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from looplm.objectives.adaptive_gate import GateTarget, adaptive_gate_loss, continuation_targets

F64 = torch.float64
LN2, LN3 = math.log(2), math.log(3)
TARGETS: list[GateTarget] = ["published", "lookahead"]

# k = 2 ln 3 and gamma = 1/2, so that gains of 1, 1/2 and 0 give w = 3/4, 1/2 and 1/4.
K, GAMMA = 2 * LN3, 0.5
# Token 1 gains 1, then 0: w = 3/4, 1/4. Token 2 gains 1/2, then loses 1/2: w = 1/2, 1/4.
LOSSES = torch.tensor([[3.0, 2.0, 2.0], [2.0, 1.5, 2.0]], dtype=F64)
HAZARDS = torch.tensor([[1 / 2, 1 / 4, 3 / 4], [1 / 4, 1 / 2, 1 / 2]], dtype=F64)


def test_table_continuation() -> None:
    expected = torch.tensor([[3 / 4, 1 / 4], [1 / 2, 1 / 4]], dtype=F64)
    torch.testing.assert_close(continuation_targets(LOSSES, K, GAMMA), expected)


def test_table_published() -> None:
    # Gates 2 and 3. Token 1: w = 3/4 against 1 - lambda = 3/4, and 1/4 against 1/4: the entropy of (1/4, 3/4) twice,
    # 2 ln 4 - (3/2) ln 3. Token 2: lambda = 1/2 twice, ln 2 each. The mean of the two, over T = 3.
    loss = adaptive_gate_loss(HAZARDS.logit(), LOSSES, target="published", k=K, gamma=GAMMA)
    assert loss.item() == pytest.approx((2 * 2 * LN2 - 1.5 * LN3 + 2 * LN2) / 2 / 3, rel=1e-12)
    assert loss.item() == pytest.approx(LN2 - LN3 / 4, rel=1e-12)


def test_table_lookahead() -> None:
    # Gates 1 and 2. Token 1: lambda = 1/2, so ln 2; w = 1/4, lambda = 1/4, so -(1/4) ln 3/4 - (3/4) ln 1/4 =
    # ln 4 - ln 3 / 4. Token 2: w = 1/2, lambda = 1/4, so ln 4 - ln 3 / 2; lambda = 1/2, so ln 2.
    loss = adaptive_gate_loss(HAZARDS.logit(), LOSSES, target="lookahead", k=K, gamma=GAMMA)
    assert loss.item() == pytest.approx((LN2 + 2 * LN2 - LN3 / 4 + 2 * LN2 - LN3 / 2 + LN2) / 2 / 3, rel=1e-12)
    assert loss.item() == pytest.approx(LN2 - LN3 / 8, rel=1e-12)


def test_the_papers_constants_and_the_floor_they_imply() -> None:
    losses = torch.tensor([2.0, 2.0, 1.995, 1.9, 3.0], dtype=F64)  # gains 0, 0.005, 0.095, a loss
    w = continuation_targets(losses)
    logistic = [1 / (1 + math.exp(-50 * (gain - 0.005))) for gain in (0, 0.005, 0.095, 0)]
    torch.testing.assert_close(w, torch.tensor(logistic, dtype=F64))
    assert w.min().item() == pytest.approx(0.4378, abs=5e-5) and w[1].item() == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize(("deviation", "mean"), [(0.05, 0.61), (1.0, 0.71)])
def test_noise_alone_raises_the_target(deviation: float, mean: float) -> None:
    gains = torch.linspace(-8, 8, 200_001, dtype=F64) * deviation  # the normal law by quadrature
    weight = torch.exp(-((gains / deviation) ** 2) / 2)
    w = continuation_targets(torch.stack((gains, torch.zeros_like(gains)), -1))[:, 0]
    assert ((w * weight).sum() / weight.sum()).item() == pytest.approx(mean, abs=0.005)


def plain(gate_logits: Tensor, losses: Tensor, target: GateTarget, k: float, gamma: float) -> Tensor:
    """Equations 5 and 6 as printed, token by token and loop by loop; loops from 1."""
    tokens, num_loops = losses.shape
    total = torch.zeros((), dtype=gate_logits.dtype)
    for i in range(tokens):
        hazard = {t: torch.sigmoid(gate_logits[i, t - 1]) for t in range(1, num_loops + 1)}
        loss = {t: float(losses[i, t - 1]) for t in range(1, num_loops + 1)}
        for t in range(2, num_loops + 1):
            w = 1 / (1 + math.exp(-k * (max(0.0, loss[t - 1] - loss[t]) - gamma)))
            judged = hazard[t] if target == "published" else hazard[t - 1]
            total = total - (w * torch.log(1 - judged) + (1 - w) * torch.log(judged))
    return total / tokens / num_loops


def problem(tokens: int, num_loops: int, seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    gates = torch.randn(tokens, num_loops, generator=rng, dtype=F64).requires_grad_()
    return gates, torch.rand(tokens, num_loops, generator=rng, dtype=F64) * 0.3


SIZES = {"tokens": st.integers(1, 6), "num_loops": st.integers(2, 6), "seed": st.integers(0, 2**31)}


@given(**SIZES, target=st.sampled_from(TARGETS), k=st.floats(0.1, 100), gamma=st.floats(0, 0.2))
@settings(max_examples=60, deadline=None)
def test_equals_the_printed_sums(
    tokens: int, num_loops: int, seed: int, target: GateTarget, k: float, gamma: float
) -> None:
    gates, losses = problem(tokens, num_loops, seed)
    mine = adaptive_gate_loss(gates, losses, target=target, k=k, gamma=gamma)
    theirs = plain(gates, losses, target, k, gamma)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(mine, gates)[0], torch.autograd.grad(theirs, gates)[0], rtol=1e-9, atol=1e-12
    )


@given(**SIZES, target=st.sampled_from(TARGETS))
@settings(max_examples=40, deadline=None)
def test_the_gradient_is_hazard_less_exit_target_and_reaches_the_judged_gates_only(
    tokens: int, num_loops: int, seed: int, target: GateTarget
) -> None:
    gates, losses = problem(tokens, num_loops, seed)
    losses.requires_grad_()
    gradient, none = torch.autograd.grad(
        adaptive_gate_loss(gates, losses, target=target), (gates, losses), allow_unused=True
    )
    assert none is None
    expected = torch.zeros_like(gates)
    judged = slice(1, None) if target == "published" else slice(0, -1)
    expected[:, judged] = (gates.sigmoid()[:, judged] - (1 - continuation_targets(losses))) / (tokens * num_loops)
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-9, atol=1e-12)
    assert (gradient[:, 0 if target == "published" else -1] == 0).all()


@given(**SIZES, target=st.sampled_from(TARGETS))
@settings(max_examples=40, deadline=None)
def test_the_best_gate_is_the_target_and_reaches_its_entropy(
    tokens: int, num_loops: int, seed: int, target: GateTarget
) -> None:
    gates, losses = problem(tokens, num_loops, seed)
    w = continuation_targets(losses)
    entropy = -(w * w.log() + (1 - w) * (1 - w).log()).sum(-1).mean() / num_loops
    best = gates.detach().clone()
    best[:, slice(1, None) if target == "published" else slice(0, -1)] = (1 - w).logit()
    torch.testing.assert_close(adaptive_gate_loss(best, losses, target=target), entropy, rtol=1e-9, atol=1e-12)
    assert adaptive_gate_loss(gates, losses, target=target) >= entropy - 1e-12


@given(**SIZES)
@settings(max_examples=30, deadline=None)
def test_the_two_targets_differ_by_which_gate_is_judged(tokens: int, num_loops: int, seed: int) -> None:
    gates, losses = problem(tokens, num_loops, seed)
    ahead = adaptive_gate_loss(gates, losses, target="lookahead")
    torch.testing.assert_close(adaptive_gate_loss(gates.roll(1, dims=-1), losses, target="published"), ahead)


@given(**SIZES, target=st.sampled_from(TARGETS), shift=st.floats(-5, 5))
@settings(max_examples=30, deadline=None)
def test_only_differences_between_loops_count(
    tokens: int, num_loops: int, seed: int, target: GateTarget, shift: float
) -> None:
    gates, losses = problem(tokens, num_loops, seed)
    moved = adaptive_gate_loss(gates, losses + shift, target=target)
    torch.testing.assert_close(moved, adaptive_gate_loss(gates, losses, target=target), rtol=1e-8, atol=1e-10)


def test_extreme_gates_stay_finite_and_half_precision_is_widened() -> None:
    gates = torch.tensor([[200.0, -200.0, 200.0]]).requires_grad_()
    loss = adaptive_gate_loss(gates, torch.tensor([[1.0, 0.0, 0.0]]), target="lookahead")
    assert loss.isfinite() and torch.autograd.grad(loss, gates)[0].isfinite().all()
    half = adaptive_gate_loss(gates.bfloat16(), torch.zeros(1, 3), target="lookahead")
    assert half.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "next"}, "target is 'next'; it must be published or lookahead"),
        ({"k": 0.0}, "k is 0.0; it must be above 0"),
        ({"gamma": -0.1}, "gamma is -0.1; it must be at least 0"),
        ({"losses": torch.zeros(2, 4)}, r"gate_logits have shape \(2, 3\) and losses \(2, 4\)"),
        ({"losses": torch.zeros(0, 3), "gate_logits": torch.zeros(0, 3)}, "one or more"),
        ({"losses": torch.zeros(2, 1), "gate_logits": torch.zeros(2, 1)}, "the number of loops is 1"),
    ],
)
def test_refusals(arguments: dict, message: str) -> None:
    given = {"gate_logits": torch.zeros(2, 3), "losses": torch.zeros(2, 3), "target": "lookahead", **arguments}
    with pytest.raises(ValueError, match=message):
        adaptive_gate_loss(given.pop("gate_logits"), given.pop("losses"), **given)
