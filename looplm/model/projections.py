"""Projections that decode at the speed of memory on a CPU (benchmarks/decode.py).

A decode step reads every weight of the stack once a loop and does next to nothing with it, so its time is that of the
reading. Three things bring it close to what memory gives: a matrix-vector product, or W x^T for a few rows, instead of
x W^T; one product for the projections that share an input (q, k, v; gate, up); and few calls in between. The last two
are `looplm.model.few_rows`'.
Names, shapes and numbers are those of separate `nn.Linear` layers; elsewhere, and where gradients are taken, so is the
arithmetic.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

FEW_ROWS = 16
"""Rows up to which a product with a weight is bound by reading the weight, on CPUs."""


class OuroLinear(nn.Linear):
    """A projection without bias that reads its weight at memory speed when few rows meet it on a CPU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        return product(x, self.weight) if bound_by_memory(x, self.weight) else super().forward(x)


def bound_by_memory(x: Tensor, weight: Tensor) -> bool:
    """Few rows, on a CPU, without gradients: the time is that of reading the weight."""
    return 1 <= x.numel() // x.shape[-1] <= FEW_ROWS and runs_plainly(x, weight)


def runs_plainly(x: Tensor, weight: Tensor) -> bool:
    """On a CPU, in one dtype, without gradients, autocast or a compiler that looks on."""
    return (
        not torch.is_grad_enabled()
        and weight.is_cpu
        and x.dtype == weight.dtype
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T; of few rows as a matrix-vector product, or W x^T: 1.3 to 1.6 times the bandwidth of x W^T in bf16.

    That result is turned back into rows for real: on strided heads attention falls back to its slow kernel.
    """
    rows = x.numel() // x.shape[-1]
    if rows == 1:
        return torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], -1)
    if rows > FEW_ROWS:
        return linear(x, weight)
    return torch.mm(weight, x.reshape(rows, -1).t()).t().contiguous().view(*x.shape[:-1], -1)


def side_by_side(weights: Sequence[Tensor]) -> Tensor:
    """Weights (N_i, inputs) as one view (sum N_i, inputs); the first call moves them into one storage.

    They stay parameters of their own under their own names; only where they lie changes. Moving a model or its dtype
    parts them, and the next call joins them again.
    """
    first, home = weights[0], weights[0].untyped_storage().data_ptr()
    expected = first.data_ptr()
    for weight in weights:
        if weight.data_ptr() != expected or weight.untyped_storage().data_ptr() != home:
            return _join(weights)
        expected += weight.nbytes
    rows, inputs = sum(weight.shape[0] for weight in weights), first.shape[1]
    return first.as_strided((rows, inputs), (inputs, 1))


def _join(weights: Sequence[Tensor]) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        joined = torch.cat([weight.detach() for weight in weights])
        for weight, part in zip(weights, joined.split([weight.shape[0] for weight in weights]), strict=True):
            weight.data = part
    return joined
