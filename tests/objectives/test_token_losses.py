"""The fused kernel against the obvious version that keeps every logit."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from looplm.objectives.token_losses import token_losses, weighted_token_losses


def plain_losses(states: Sequence[Tensor], weight: Tensor, targets: Tensor) -> Tensor:
    """(T, ...) with all logits in memory; fp64 is kept, everything else goes through an fp32 softmax."""
    rows = []
    for state in states:
        logits = (state @ weight.t()).flatten(0, -2)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        rows.append(cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape))
    return torch.stack(rows)


class Recorder(TorchDispatchMode):
    """Records the largest output of any operation, in elements, and counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket is torch.ops.aten.mm
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def problem(
    num_loops: int, num_tokens: int, width: int, vocab: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """States, weight, targets with about a fifth ignored, and c with some exact zeros."""
    rng = torch.Generator().manual_seed(seed)
    states = [torch.randn(num_tokens, width, generator=rng, dtype=torch.float64) for _ in range(num_loops)]
    weight = torch.randn(vocab, width, generator=rng, dtype=torch.float64) * 3 / math.sqrt(width)
    targets = torch.randint(vocab, (num_tokens,), generator=rng)
    targets[torch.rand(num_tokens, generator=rng) < 0.2] = -100
    c = torch.rand(num_loops, num_tokens, generator=rng, dtype=torch.float64)
    c[c < 0.1] = 0.0
    leaves = [x.to(dtype).requires_grad_() for x in (*states, weight, c)]
    return leaves[:-2], leaves[-2], targets, leaves[-1]


def gradients(total: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(total, leaves))


def test_hand_computed() -> None:
    # V = 3, D = 2, W = [[0, 0], [ln 2, 0], [0, ln 4]].
    # h = (1, 0): logits (0, ln 2, 0), softmax (1/4, 1/2, 1/4); h = (1, 1): (0, ln 2, ln 4), softmax (1/7, 2/7, 4/7).
    ln2, ln4 = math.log(2), math.log(4)
    weight = torch.tensor([[0, 0], [ln2, 0], [0, ln4]], dtype=torch.float64, requires_grad=True)
    first = torch.tensor([[1.0, 0.0], [9.0, 9.0]], dtype=torch.float64, requires_grad=True)
    second = torch.tensor([[1.0, 1.0], [9.0, 9.0]], dtype=torch.float64, requires_grad=True)
    c = torch.tensor([[0.5, 7.0], [2.0, 7.0]], dtype=torch.float64, requires_grad=True)
    total, losses = weighted_token_losses([first, second], weight, torch.tensor([1, -100]), c)
    total.backward()
    ln72 = math.log(7 / 2)
    torch.testing.assert_close(losses, torch.tensor([[ln2, 0], [ln72, 0]], dtype=torch.float64))
    assert total.item() == pytest.approx(0.5 * ln2 + 2 * ln72, rel=1e-14)
    torch.testing.assert_close(c.grad, torch.tensor([[ln2, 0], [ln72, 0]], dtype=torch.float64))
    # G = c (softmax - onehot): (1/8, -1/4, 1/8) in loop 1, (2/7, -10/7, 8/7) in loop 2.
    torch.testing.assert_close(first.grad, torch.tensor([[-ln2 / 4, ln4 / 8], [0, 0]], dtype=torch.float64))
    torch.testing.assert_close(second.grad, torch.tensor([[-ln2 * 10 / 7, ln4 * 8 / 7], [0, 0]], dtype=torch.float64))
    expected = [[1 / 8 + 2 / 7, 2 / 7], [-1 / 4 - 10 / 7, -10 / 7], [1 / 8 + 8 / 7, 8 / 7]]
    torch.testing.assert_close(weight.grad, torch.tensor(expected, dtype=torch.float64))


@given(
    num_loops=st.integers(1, 4),
    num_tokens=st.integers(1, 13),
    width=st.integers(1, 7),
    vocab=st.integers(1, 40),
    chunk_rows=st.integers(1, 60),
    seed=st.integers(0, 2**31),
    upstream=st.sampled_from([1.0, -0.25, 7.0]),
)
@settings(max_examples=80, deadline=None)
def test_equals_plain_fp64(
    num_loops: int, num_tokens: int, width: int, vocab: int, chunk_rows: int, seed: int, upstream: float
) -> None:
    states, weight, targets, c = problem(num_loops, num_tokens, width, vocab, seed)
    total, losses = weighted_token_losses(states, weight, targets, c, chunk_rows=chunk_rows)
    reference_losses = plain_losses(states, weight, targets)
    reference = (c * reference_losses).sum()
    torch.testing.assert_close(losses, reference_losses.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(total, reference, rtol=1e-10, atol=1e-10)
    leaves = [*states, weight, c]
    ours = gradients(total * upstream, leaves)
    for mine, theirs in zip(ours, gradients(reference * upstream, leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    evaluated = token_losses(states, weight, targets, chunk_rows=chunk_rows)
    assert not evaluated.requires_grad
    torch.testing.assert_close(evaluated, losses, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    states, weight, targets, c = problem(3, 5, 4, 11)
    assert (targets == -100).any()

    def total(weight: Tensor, c: Tensor, *states: Tensor) -> Tensor:
        return weighted_token_losses(states, weight, targets, c, chunk_rows=4)[0]

    assert torch.autograd.gradcheck(total, (weight, c, *states))


def test_several_tiles_and_cache_blocks_fp32() -> None:
    """V = 9001 spans three vocabulary tiles, the last one ragged, and several scratch blocks a chunk."""
    states, weight, targets, c = problem(4, 60, 16, 9001, dtype=torch.float32)
    total, losses = weighted_token_losses(states, weight, targets, c, chunk_rows=100)
    reference_losses = plain_losses(states, weight, targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, reference_losses.detach(), rtol=1e-5, atol=1e-5)
    leaves = [*states, weight, c]
    reference = gradients((c * reference_losses).sum(), leaves)
    for mine, theirs in zip(gradients(total, leaves), reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def relative_error(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


def test_bf16_autocast_is_at_least_as_exact_as_plain() -> None:
    """Against fp64: losses within 0.08 nats (bf16 rounds a logit of 10 by up to 0.03); gradients within 2 %, and no
    further off than the plain version's, with 5 % slack.
    """
    states, weight, targets, c = problem(4, 200, 64, 5000, dtype=torch.float32)
    leaves = [*states, weight]
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    exact_losses = plain_losses(doubles[:-1], doubles[-1], targets)
    exact = gradients((c.detach().double() * exact_losses).sum(), doubles)
    with torch.autocast("cpu", torch.bfloat16):
        total, losses = weighted_token_losses(states, weight, targets, c, chunk_rows=64)
        reference = plain_losses(states, weight, targets)
    assert losses.dtype == total.dtype == torch.float32
    torch.testing.assert_close(losses, reference.detach(), rtol=0, atol=1e-4)
    torch.testing.assert_close(losses.double(), exact_losses.detach(), rtol=0, atol=0.08)
    plain = gradients((c * reference).sum(), leaves)
    for leaf, mine, theirs, truth in zip(leaves, gradients(total, leaves), plain, exact, strict=True):
        assert mine.dtype == leaf.dtype == torch.float32
        error = relative_error(mine, truth)
        assert error < 0.02
        assert error < 1.05 * relative_error(theirs, truth)


def test_head_gradient_is_summed_in_fp32_over_chunks() -> None:
    """One row a chunk, 4,000 equal rows: a bf16 running sum would stop growing near 256."""
    rows = torch.ones(4000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(4000, dtype=torch.int64)
    total, _ = weighted_token_losses([rows], weight, targets, torch.ones(1, 4000), chunk_rows=1)
    total.backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [-2000.0, 2000.0]


def test_bf16_inputs_give_fp32_losses_and_bf16_gradients() -> None:
    states, weight, targets, c = problem(2, 30, 16, 50, dtype=torch.bfloat16)
    total, losses = weighted_token_losses(states, weight, targets, c.detach().float())
    assert losses.dtype == torch.float32
    assert [g.dtype for g in gradients(total, [*states, weight])] == [torch.bfloat16] * 3


def test_fp64_stays_fp64_under_autocast() -> None:
    states, weight, targets, c = problem(2, 20, 8, 30)
    with torch.autocast("cpu", torch.bfloat16):
        total, losses = weighted_token_losses(states, weight, targets, c)
    torch.testing.assert_close(losses, plain_losses(states, weight, targets).detach(), rtol=1e-10, atol=1e-10)
    assert gradients(total, [weight])[0].dtype == torch.float64


def test_large_logits_do_not_overflow() -> None:
    state = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    total, losses = weighted_token_losses([state], weight, torch.tensor([2, 2]), torch.ones(1, 2))
    assert losses.tolist() == [[2000.0, 0.0]]
    total.backward()
    assert state.grad is not None
    assert state.grad.tolist() == [[2.0], [0.0]]


def test_tied_weight_gets_both_gradients() -> None:
    weight = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens, targets = torch.tensor([1, 4, 6]), torch.tensor([4, 6, 0])
    c = torch.ones(1, 3, dtype=torch.float64)

    def gradient(fused: bool) -> Tensor:
        leaf = weight.clone().requires_grad_()
        state = leaf[tokens]
        total = (
            weighted_token_losses([state], leaf, targets, c)[0] if fused else plain_losses([state], leaf, targets).sum()
        )
        return gradients(total, [leaf])[0]

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_needs_a_gradient_gets_one(wanted: tuple[bool, bool, bool]) -> None:
    states, weight, targets, c = problem(2, 6, 4, 9)
    states, weight, c = (
        [s.detach().requires_grad_(wanted[0]) for s in states],
        weight.detach().requires_grad_(wanted[1]),
        c.detach().requires_grad_(wanted[2]),
    )
    leaves = [x for x in (*states, weight, c) if x.requires_grad]
    with Recorder() as recorder:
        total, _ = weighted_token_losses(states, weight, targets, c)
    assert recorder.products == 1 + wanted[0] + wanted[1]
    reference = (c * plain_losses(states, weight, targets)).sum()
    for mine, theirs in zip(gradients(total, leaves), gradients(reference, leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_backward_twice_over_a_retained_graph_and_no_double_backward() -> None:
    states, weight, targets, c = problem(2, 6, 4, 9)
    total, _ = weighted_token_losses(states, weight, targets, c)
    once = torch.autograd.grad(total, [weight], retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(total, [weight], retain_graph=True)[0], once)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(total, [weight], create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_logits_of_a_whole_loop_are_held(dtype: torch.dtype) -> None:
    """N = 512, V = 1,000, chunks of 64: nothing above the 64 x V buffer or V x D, forward or backward."""
    states, weight, targets, c = problem(4, 512, 8, 1000, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        with Recorder() as fused:
            total, _ = weighted_token_losses(states, weight, targets, c, chunk_rows=64)
            total.backward()
        with Recorder() as plain:
            plain_losses(states, weight, targets).sum().backward()
    assert fused.largest == 64 * 1000
    assert plain.largest >= 512 * 1000


def test_without_gradients_one_product_a_chunk() -> None:
    states, weight, targets, c = problem(2, 40, 8, 30)
    num_chunks = math.ceil(2 * int((targets != -100).sum()) / 16)
    with Recorder() as evaluation:
        token_losses(states, weight, targets, chunk_rows=16)
    with torch.no_grad(), Recorder() as no_grad:
        weighted_token_losses(states, weight, targets, c, chunk_rows=16)
    with Recorder() as training:
        weighted_token_losses(states, weight, targets, c, chunk_rows=16)
    assert evaluation.products == no_grad.products == num_chunks
    assert training.products == 3 * num_chunks


def test_nothing_valid() -> None:
    states, weight, targets, c = problem(2, 4, 3, 5)
    total, losses = weighted_token_losses(states, weight, torch.full_like(targets, -100), c)
    assert total.item() == 0.0
    assert losses.tolist() == [[0.0] * 4] * 2
    for gradient in gradients(total, [*states, weight, c]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_ignored_rows_may_hold_nan() -> None:
    states, weight, _, c = problem(1, 3, 4, 5)
    poisoned = states[0].detach().clone()
    poisoned[1] = math.nan
    poisoned.requires_grad_()
    total, losses = weighted_token_losses([poisoned], weight, torch.tensor([0, -100, 2]), c)
    assert losses.isfinite().all()
    for gradient in gradients(total, [poisoned, weight, c]):
        assert gradient.isfinite().all()


def test_user_mistakes() -> None:
    states, weight, targets, c = problem(2, 6, 4, 9)
    with pytest.raises(ValueError, match=r"targets span 0\.\.9; they must lie in 0\.\.8"):
        token_losses(states, weight, torch.tensor([0, 9, 1, 2, -100, 3]))
    with pytest.raises(ValueError, match=r"targets span -1\.\.3"):
        token_losses(states, weight, torch.tensor([0, -1, 1, 2, -100, 3]))
    with pytest.raises(ValueError, match="state of loop 2"):
        token_losses([states[0], states[1][:-1]], weight, targets)
    with pytest.raises(ValueError, match="coefficients have shape"):
        weighted_token_losses(states, weight, targets, c[:1])
    with pytest.raises(ValueError, match="float16"):
        token_losses([s.half() for s in states], weight.half(), targets)
