"""Weighted cross-entropy of every loop and token, without the (T, N, V) logits (the first term of Ouro eq. 4).

    total = sum_t sum_n c[t, n] * CE(h[t, n] @ W^T, y[n]),   c = p_t / number of tokens, differentiable

The paper states the sum only; how it is computed is ours. The rows of all loops (ignored targets left out) form one
list of M <= T*N rows, which is worked off in chunks of C rows. The weight c of a row is known when its chunk runs, so
its gradient G = c * (softmax - onehot) is formed there and then, in the buffer that held the logits, and both products
with it are taken; backward only multiplies by the upstream scalar. That is the plain three matrix products a loop,
nothing is computed twice, and `d total / d c` is the loss itself, which is how the gate learns.

Memory, with b bytes an element in the products' dtype (bf16 2) and the numbers for V = 49152, D = 512, T*N = 8192:

    logits buffer   C*V*b   a constant, LOGITS_BYTES at most                     96 MiB
    scratch         R*V*4   the rows under softmax in fp32, sized for the cache   1.5 MiB
    weight copy     V*D*b   only if the products' dtype is not the weight's       48 MiB
    dW              V*D*4   fp32 sum over the chunks, (D, V) until backward       96 MiB, twice in backward
    rows, dRows     M*D     twice                                                 8 MiB each (16 in fp32)

The plain version holds T*N*V*(2 + 4) = 2.3 GiB of logits and log-probabilities before backward begins.

dW is kept transposed because dW^T = h^T @ G reads G as it lies; G^T @ h runs at half the speed on CPUs.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = -100
LOGITS_BYTES = 96 << 20
SCRATCH_BYTES = 3 << 19
VOCABULARY_TILE = 4096


def weighted_token_losses(
    states: Sequence[Tensor],
    weight: Tensor,
    targets: Tensor,
    coefficients: Tensor,
    *,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of c[t, n] * CE[t, n], differentiable in the states, the weight and c, and every CE[t, n].

    Args:
        states: T tensors (..., D): the (normed) states that the head reads.
        weight: (V, D) the head.
        targets: (...) int64, already shifted; -100 is ignored.
        coefficients: (T, ...) c; ignored positions are not read.
        chunk_rows: rows of logits held at a time; the default fits them in `LOGITS_BYTES`.

    Returns:
        The total, a scalar, and the losses in nats, (T, ...), detached, 0 where ignored. Both are fp32 (fp64 for fp64
        states). The products run in the autocast dtype if autocast is on, else in the states' dtype.

    Raises:
        ValueError: shapes that do not fit, a target outside the vocabulary, or float16.
        RuntimeError: in backward with `create_graph=True`; there is no second derivative.
    """
    _check(states, weight, targets)
    if coefficients.shape != (len(states), *targets.shape):
        raise ValueError(
            f"coefficients have shape {tuple(coefficients.shape)};"
            f" they must be {(len(states), *targets.shape)}, one for every loop and target"
        )
    valid = (targets != IGNORED).flatten().nonzero().squeeze(1)
    rows, row_targets = _valid_rows(states, targets, valid)
    c = coefficients.flatten(1).index_select(1, valid).flatten()
    total, losses = _WeightedCrossEntropy.apply(rows, weight, row_targets, c, chunk_rows, torch.is_grad_enabled())
    return total, _scatter(losses, valid, targets.shape, len(states))


@torch.no_grad()
def token_losses(states: Sequence[Tensor], weight: Tensor, targets: Tensor, *, chunk_rows: int | None = None) -> Tensor:
    """CE of every loop and token in nats, without gradients.

    Args:
        states, weight, targets, chunk_rows: as in `weighted_token_losses`.

    Returns:
        (T, ...) fp32 (fp64 for fp64 states), 0 where the target is ignored.

    Raises:
        ValueError: as `weighted_token_losses`.
    """
    _check(states, weight, targets)
    valid = (targets != IGNORED).flatten().nonzero().squeeze(1)
    rows, row_targets = _valid_rows(states, targets, valid)
    losses, _, _ = _run(rows, weight, row_targets, None, chunk_rows)
    return _scatter(losses, valid, targets.shape, len(states))


def _check(states: Sequence[Tensor], weight: Tensor, targets: Tensor) -> None:
    expected = (*targets.shape, weight.shape[1])
    for loop, state in enumerate(states, 1):
        if state.shape != expected:
            raise ValueError(
                f"the state of loop {loop} has shape {tuple(state.shape)}; targets {tuple(targets.shape)} and a head"
                f" {tuple(weight.shape)} need {expected}"
            )
    labels = targets[targets != IGNORED]
    if labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) < weight.shape[0]):
        raise ValueError(
            f"targets span {int(labels.min())}..{int(labels.max())}; they must lie in 0..{weight.shape[0] - 1},"
            f" or be {IGNORED} to be ignored"
        )


def _valid_rows(states: Sequence[Tensor], targets: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    rows = torch.cat([state.flatten(0, -2).index_select(0, valid) for state in states])
    return rows, targets.flatten()[valid].repeat(len(states))


def _scatter(losses: Tensor, valid: Tensor, shape: torch.Size, num_loops: int) -> Tensor:
    out = losses.new_zeros(num_loops, shape.numel())
    return out.index_copy_(1, valid, losses.view(num_loops, len(valid))).view(num_loops, *shape)


class _WeightedCrossEntropy(torch.autograd.Function):
    """(M, D) rows, (V, D) weight, (M,) targets, (M,) c -> sum of c * CE, and CE (M,)."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        targets: Tensor,
        c: Tensor,
        chunk_rows: int | None,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        needs_rows, needs_weight = (need and grad_enabled for need in ctx.needs_input_grad[:2])
        gradients = _Gradients(c, needs_rows, needs_weight) if needs_rows or needs_weight else None
        losses, d_rows, d_weight_t = _run(rows, weight, targets, gradients, chunk_rows)
        ctx.save_for_backward(losses, d_rows, d_weight_t)
        ctx.dtypes = rows.dtype, weight.dtype, c.dtype
        ctx.mark_non_differentiable(losses)
        return torch.dot(losses, c.to(losses.dtype)), losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("token losses can be differentiated once only; call backward without create_graph=True")
        losses, d_rows, d_weight_t = ctx.saved_tensors
        rows_dtype, weight_dtype, c_dtype = ctx.dtypes
        if d_rows is not None:
            d_rows = d_rows.to(rows_dtype) * upstream.to(rows_dtype)
        d_weight = None
        if d_weight_t is not None:
            d_weight = d_weight_t.t().contiguous().mul_(upstream).to(weight_dtype)
        d_c = (losses * upstream).to(c_dtype) if ctx.needs_input_grad[3] else None
        return d_rows, d_weight, None, d_c, None, None


class _Gradients(NamedTuple):
    """Which gradients to take, and the weights c (M,) of the rows."""

    c: Tensor
    of_rows: bool
    of_weight: bool


def _run(
    rows: Tensor, weight: Tensor, targets: Tensor, gradients: _Gradients | None, chunk_rows: int | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses (M,); d total / d rows (M, D) in the products' dtype; d total / d weight, transposed (D, V)."""
    dtype = _product_dtype(rows)
    rows, weight = rows.detach().to(dtype), weight.detach().to(dtype)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    losses = rows.new_empty(len(rows), dtype=statistics)
    d_rows = torch.empty_like(rows) if gradients and gradients.of_rows else None
    d_weight_t = None
    if gradients and gradients.of_weight:
        d_weight_t = rows.new_zeros(weight.shape[::-1], dtype=statistics)
    size = chunk_rows or max(1, LOGITS_BYTES // (weight.shape[0] * weight.element_size()))
    buffer = rows.new_empty(min(size, len(rows)), weight.shape[0])
    for start in range(0, len(rows), size):
        at = slice(start, start + size)
        logits = torch.mm(rows[at], weight.t(), out=buffer[: len(rows[at])])
        c = None if gradients is None else gradients.c[at].to(statistics)
        losses[at] = _softmax_cross_entropy_(logits, targets[at], c)
        if d_rows is not None:
            torch.mm(logits, weight, out=d_rows[at])
        if d_weight_t is not None:
            _add_product_(d_weight_t, rows[at], logits)
    return losses, d_rows, d_weight_t


def _product_dtype(rows: Tensor) -> torch.dtype:
    """The autocast dtype, or the rows' own; like torch's products, fp64 is never cast."""
    device, dtype = rows.device.type, rows.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    if dtype == torch.float16:
        raise ValueError(
            "token losses in float16 would lose c * (softmax - onehot) to underflow; use bfloat16 or float32"
        )
    return dtype


def _softmax_cross_entropy_(logits: Tensor, targets: Tensor, c: Tensor | None) -> Tensor:
    """Losses (C,) of logits (C, V), which become their gradient c * (softmax - onehot) if c (C,) is given."""
    statistics = torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses = logits.new_empty(len(logits), dtype=statistics)
    # Elsewhere than on a CPU there is no cache to stay in, and small blocks would only be many launches.
    blocks = SCRATCH_BYTES // (logits.shape[1] * statistics.itemsize) if logits.is_cpu else len(logits)
    size = min(max(blocks, 1), len(logits))
    scratch = logits.new_empty(size, logits.shape[1], dtype=statistics)
    for start in range(0, len(logits), size):
        at = slice(start, start + size)
        block, target = logits[at], targets[at, None]
        x = scratch[: len(block)].copy_(block)
        top = x.amax(-1, keepdim=True)
        at_target = x.gather(1, target)
        normaliser = x.sub_(top).exp_().sum(-1, keepdim=True)
        losses[at] = (top + normaliser.log() - at_target).squeeze(1)
        if c is not None:
            row_c = c[at, None]
            x.mul_(row_c / normaliser).scatter_add_(1, target, -row_c)
            block.copy_(x)
    return losses


def _add_product_(total: Tensor, rows: Tensor, gradient: Tensor) -> None:
    """total (D, V) += rows^T (D, C) @ gradient (C, V), each tile of columns rounded once and summed in fp32."""
    rows_t = rows.t().contiguous()
    for start in range(0, total.shape[1], VOCABULARY_TILE):
        at = slice(start, start + VOCABULARY_TILE)
        total[:, at] += rows_t @ gradient[:, at]
