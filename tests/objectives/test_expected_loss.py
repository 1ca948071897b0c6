"""Equation 4 by hand and against the obvious version."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from looplm.objectives.expected_loss import Prior, fixed_loss, prior_log_probabilities, stage_one_loss

F64 = torch.float64


def plain_exit_probabilities(gate_logits: Tensor) -> Tensor:
    """Equation 3 as written, loop by loop."""
    hazards, survival, p = torch.sigmoid(gate_logits), torch.ones_like(gate_logits[..., 0]), []
    for loop in range(gate_logits.shape[-1] - 1):
        p.append(hazards[..., loop] * survival)
        survival = survival * (1 - hazards[..., loop])
    return torch.stack([*p, survival], -1)


def plain_stage_one(
    states: list[Tensor], weight: Tensor, targets: Tensor, gate: Tensor, beta: float, prior: Prior
) -> Tensor:
    """Equation 4 as written, token by token, with all logits in memory."""
    terms = []
    for b, s in (targets != -100).nonzero().tolist():
        p = plain_exit_probabilities(gate[b, s])
        ce = torch.stack([cross_entropy((h[b, s] @ weight.t())[None], targets[b, s, None]) for h in states])
        if prior == "uniform":
            regulariser = (p * p.log()).sum()
        else:
            stay = 1 - float(prior)
            pi = [float(prior) * stay**loop for loop in range(len(states) - 1)] + [stay ** (len(states) - 1)]
            regulariser = (p * (p.log() - torch.tensor(pi, dtype=p.dtype).log())).sum()
        terms.append((p * ce).sum() + beta * regulariser)
    return torch.stack(terms).mean()


def problem(
    batch: int, length: int, num_loops: int, width: int, vocab: int, seed: int, dtype: torch.dtype = F64
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """States, weight, targets (one valid at least), gate logits."""
    rng = torch.Generator().manual_seed(seed)
    states = [torch.randn(batch, length, width, generator=rng, dtype=dtype) for _ in range(num_loops)]
    weight = torch.randn(vocab, width, generator=rng, dtype=dtype)
    targets = torch.randint(vocab, (batch, length), generator=rng)
    ignored = torch.rand(batch, length, generator=rng) < 0.3
    ignored[0, 0] = False
    gate = torch.randn(batch, length, num_loops, generator=rng, dtype=dtype) * 2
    leaves = [x.requires_grad_() for x in (*states, weight, gate)]
    return leaves[:-2], leaves[-2], targets.masked_fill(ignored, -100), leaves[-1]


def hand_problem() -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    # V = 2, D = 1, W = [[0], [1]]: the logits are (0, h), so CE of target 0 is log(1 + e^h), of target 1 log(1 + e^-h).
    # Token 1 (target 0): h = 0, ln 3, ln 7 -> ln 2, ln 4, ln 8.
    # Token 2 (target 1): h = 0, ln 1/3, 0 -> ln 2, ln 4, ln 2.
    # Token 3 is ignored. Gates: hazards (1/2, 1/2) -> p = (1/2, 1/4, 1/4); (1/4, 2/3) -> p = (1/4, 1/2, 1/4).
    ln3 = math.log(3)
    h = torch.tensor([[0.0, ln3, math.log(7)], [0.0, -ln3, 0.0], [5.0, 5.0, 5.0]], dtype=F64)
    hazards = torch.tensor([[1 / 2, 1 / 2, 0.9], [1 / 4, 2 / 3, 0.1], [0.8, 0.8, 0.8]], dtype=F64)
    states = [h[:, loop].view(1, 3, 1) for loop in range(3)]
    weight = torch.tensor([[0.0], [1.0]], dtype=F64)
    return states, weight, torch.tensor([[0, 1, -100]]), hazards.logit()[None]


# In units of ln 2: token 1: (1/2) 1 + (1/4) 2 + (1/4) 3 = 7/4; token 2: (1/4) 1 + (1/2) 2 + (1/4) 1 = 6/4; mean 13/8.
# H of both = (1/2) 1 + 2 (1/4) 2 = 3/2.
LN2 = math.log(2)
EXPECTED, ENTROPY = 13 / 8 * LN2, 3 / 2 * LN2


def test_table_uniform() -> None:
    out = stage_one_loss(*hand_problem(), beta=0.4)
    assert out.expected_loss.item() == pytest.approx(EXPECTED, rel=1e-12)
    assert out.loss.item() == pytest.approx(EXPECTED - 0.4 * ENTROPY, rel=1e-12)
    assert out.kl.item() == pytest.approx(math.log(3) - ENTROPY, rel=1e-12)
    torch.testing.assert_close(out.loop_losses, torch.tensor([1.0, 2.0, 2.0], dtype=F64) * LN2)
    expected_p = torch.tensor([[[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.8, 0.16, 0.04]]], dtype=F64)
    torch.testing.assert_close(out.exit_probabilities, expected_p)


def test_table_geometric() -> None:
    # Hazard 1/2, T = 3: pi = (1/2, 1/4, 1/4). KL of token 1 is 0; of token 2: (1/4) ln(1/2) + (1/2) ln 2 = (1/4) ln 2.
    out = stage_one_loss(*hand_problem(), beta=0.4, prior=0.5)
    assert out.kl.item() == pytest.approx(LN2 / 8, rel=1e-12)
    assert out.loss.item() == pytest.approx(EXPECTED + 0.4 * LN2 / 8, rel=1e-12)


def test_num_items_scales_the_loss_only() -> None:
    two, ten = (stage_one_loss(*hand_problem(), beta=0.4, num_items=n) for n in (2, torch.tensor(10)))
    assert two.loss.item() == pytest.approx(EXPECTED - 0.4 * ENTROPY, rel=1e-12)
    assert ten.loss.item() == pytest.approx((EXPECTED - 0.4 * ENTROPY) / 5, rel=1e-12)
    assert ten.expected_loss.item() == pytest.approx(EXPECTED, rel=1e-12)
    torch.testing.assert_close(ten.loop_losses, two.loop_losses)


def test_prior_tables() -> None:
    torch.testing.assert_close(prior_log_probabilities("uniform", 4).exp(), torch.full((4,), 0.25, dtype=F64))
    torch.testing.assert_close(
        prior_log_probabilities(0.2, 4).exp(), torch.tensor([0.2, 0.16, 0.128, 0.512], dtype=F64)
    )
    torch.testing.assert_close(prior_log_probabilities(0.7, 1).exp(), torch.ones(1, dtype=F64))


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 5),
    num_loops=st.integers(1, 5),
    width=st.integers(1, 5),
    vocab=st.integers(1, 30),
    seed=st.integers(0, 2**31),
    beta=st.sampled_from([0.0, 0.05, 1.0]),
    prior=st.sampled_from(["uniform", 0.1, 0.9]),
)
@settings(max_examples=60, deadline=None)
def test_equals_plain_fp64(
    batch: int, length: int, num_loops: int, width: int, vocab: int, seed: int, beta: float, prior: Prior
) -> None:
    states, weight, targets, gate = problem(batch, length, num_loops, width, vocab, seed)
    out = stage_one_loss(states, weight, targets, gate, beta=beta, prior=prior)
    reference = plain_stage_one(states, weight, targets, gate, beta, prior)
    torch.testing.assert_close(out.loss, reference, rtol=1e-10, atol=1e-10)
    leaves = [*states, weight, gate]
    theirs = torch.autograd.grad(reference, leaves, allow_unused=True)
    for mine, their in zip(torch.autograd.grad(out.loss, leaves), theirs, strict=True):
        their = torch.zeros_like(mine) if their is None else their
        torch.testing.assert_close(mine, their, rtol=1e-10, atol=1e-10)


@given(num_loops=st.integers(1, 8), seed=st.integers(0, 2**31), beta=st.floats(0, 3))
@settings(max_examples=40, deadline=None)
def test_uniform_prior_identity(num_loops: int, seed: int, beta: float) -> None:
    """The loss less the expected loss is beta KL - beta log T, and that is -beta H."""
    states, weight, targets, gate = problem(2, 4, num_loops, 3, 7, seed)
    out = stage_one_loss(states, weight, targets, gate, beta=beta)
    p = plain_exit_probabilities(gate.detach())[targets != -100]
    mean_entropy = -(p * p.log()).sum(-1).mean()
    regulariser = (out.loss - out.expected_loss).detach()
    torch.testing.assert_close(regulariser, -beta * mean_entropy, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(regulariser, beta * out.kl - beta * math.log(num_loops), rtol=1e-10, atol=1e-10)
    assert out.kl.item() >= -1e-12


def test_fp32_realistic() -> None:
    """N = 300, V = 5000, T = 4, D = 64 in fp32, against fp64."""
    states, weight, targets, gate = problem(3, 100, 4, 64, 5000, 0, torch.float32)
    out = stage_one_loss(states, weight * 0.3, targets, gate, beta=0.05)
    assert not any(x.requires_grad for x in (out.expected_loss, out.kl, out.loop_losses, out.exit_probabilities))
    doubles = [x.detach().double().requires_grad_() for x in (*states, weight, gate)]
    p = plain_exit_probabilities(doubles[-1])
    ce = torch.stack(
        [
            cross_entropy((h @ (doubles[-2] * 0.3).t()).flatten(0, 1), targets.flatten(), reduction="none")
            for h in doubles[:4]
        ],
        -1,
    ).view_as(p)
    valid = targets != -100
    reference = ((p * ce).sum(-1) + 0.05 * (p * p.log()).sum(-1))[valid].mean()
    torch.testing.assert_close(out.loss.double(), reference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.loop_losses.double(), ce[valid].mean(0), rtol=1e-5, atol=1e-5)
    mine = torch.autograd.grad(out.loss, [*states, weight, gate])
    for a, b in zip(mine, torch.autograd.grad(reference, doubles), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


def test_accumulation_over_micro_batches() -> None:
    """Two halves divided by the common count add up to the whole, gradients too."""
    states, weight, targets, gate = problem(4, 6, 3, 5, 11, seed=3)
    whole = stage_one_loss(states, weight, targets, gate, beta=0.1).loss
    count = (targets != -100).sum()
    halves = sum(
        stage_one_loss(
            [h[i : i + 2] for h in states], weight, targets[i : i + 2], gate[i : i + 2], beta=0.1, num_items=count
        ).loss
        for i in (0, 2)
    )
    torch.testing.assert_close(halves, whole)
    leaves = [*states, weight, gate]
    for a, b in zip(torch.autograd.grad(halves, leaves), torch.autograd.grad(whole, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("prior", ["uniform", 0.3])
@pytest.mark.parametrize("num_items", [None, 0, 8])
def test_no_valid_token(prior: Prior, num_items: int | None) -> None:
    states, weight, targets, gate = problem(2, 3, 3, 4, 5, seed=0)
    nothing = torch.full_like(targets, -100)
    out = stage_one_loss(states, weight, nothing, gate, beta=0.1, prior=prior, num_items=num_items)
    assert out.loss.item() == out.expected_loss.item() == out.kl.item() == 0.0
    assert out.loop_losses.tolist() == [0.0] * 3
    for gradient in torch.autograd.grad(out.loss, [*states, weight, gate]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_saturated_gates_stay_finite() -> None:
    """Hazards that round to 0 and 1: p has exact zeros, and neither the loss nor a gradient becomes NaN."""
    states, weight, targets, _ = problem(1, 4, 4, 3, 6, seed=1)
    extreme = torch.tensor([[[200.0, -200.0, 200.0, 0.0]] * 4], dtype=torch.float32).requires_grad_()
    for prior in ("uniform", 0.3):
        out = stage_one_loss(states, weight, targets, extreme, beta=0.1, prior=prior)
        assert out.exit_probabilities.min() == 0.0
        for x in (out.loss, *torch.autograd.grad(out.loss, [*states, weight, extreme])):
            assert x.isfinite().all()


def test_bf16_gate_logits_are_worked_in_fp32() -> None:
    states, weight, targets, gate = problem(2, 5, 4, 8, 20, seed=2, dtype=torch.float32)
    low = gate.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = stage_one_loss(states, weight, targets, low, beta=0.1)
    assert out.loss.dtype == out.exit_probabilities.dtype == torch.float32
    torch.testing.assert_close(out.exit_probabilities, plain_exit_probabilities(low.float()))


def test_user_mistakes() -> None:
    states, weight, targets, gate = hand_problem()
    with pytest.raises(ValueError, match=r"beta is -0\.1; it must be at least 0"):
        stage_one_loss(states, weight, targets, gate, beta=-0.1)
    for prior in ("poisson", 0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"prior is .*'uniform' or a geometric hazard between 0 and 1"):
            stage_one_loss(states, weight, targets, gate, beta=0.1, prior=prior)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gate_logits have shape"):
        stage_one_loss(states, weight, targets, gate[..., :2], beta=0.1)


# --- the loss of the last loop, or the mean ---


def test_table_last_and_mean() -> None:
    # In units of ln 2 the losses are 1, 2, 3 of token 1 and 1, 2, 1 of token 2: last (3 + 1) / 2, mean 10 / 6.
    states, weight, targets, _ = hand_problem()
    last, losses = fixed_loss(states, weight, targets, objective="last")
    mean, same = fixed_loss(states, weight, targets, objective="mean")
    assert last.item() == pytest.approx(2 * LN2, rel=1e-12) and mean.item() == pytest.approx(10 / 6 * LN2, rel=1e-12)
    by_hand = torch.tensor([[[1.0, 1.0, 0.0]], [[2.0, 2.0, 0.0]], [[3.0, 1.0, 0.0]]], dtype=F64) * LN2
    torch.testing.assert_close(losses, by_hand)
    torch.testing.assert_close(same, by_hand)
    torch.testing.assert_close(stage_one_loss(*hand_problem(), beta=0.4).token_losses, by_hand)
    halved, _ = fixed_loss(states, weight, targets, objective="last", num_items=torch.tensor(4))
    assert halved.item() == pytest.approx(LN2, rel=1e-12)


@given(num_loops=st.integers(1, 5), seed=st.integers(0, 2**31), mean=st.booleans())
@settings(max_examples=40, deadline=None)
def test_fixed_losses_equal_plain_cross_entropy(num_loops: int, seed: int, mean: bool) -> None:
    states, weight, targets, _ = problem(2, 4, num_loops, 3, 7, seed)
    found, losses = fixed_loss(states, weight, targets, objective="mean" if mean else "last")
    plain = [cross_entropy((h @ weight.t()).flatten(0, 1), targets.flatten()) for h in states]
    expected = torch.stack(plain).mean() if mean else plain[-1]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    valid = (targets != -100).sum()
    torch.testing.assert_close(losses.flatten(1).sum(1) / valid, torch.stack(plain).detach(), rtol=1e-10, atol=1e-10)
    assert not losses.requires_grad
    leaves = [*states, weight]
    theirs = torch.autograd.grad(expected, leaves, allow_unused=True)
    for a, b in zip(torch.autograd.grad(found, leaves, allow_unused=True), theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_an_unknown_objective() -> None:
    with pytest.raises(ValueError, match="objective is 'first'; it must be expected, last or mean"):
        fixed_loss(*hand_problem()[:3], objective="first")  # type: ignore[arg-type]
