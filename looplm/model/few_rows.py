"""A layer over one new position a row on a CPU, in as few calls as it takes (benchmarks/decode.py).

A decode step reads every weight of the stack once a loop and does next to nothing with it. Its time is that of the
reading, and of the calls in between: each reading throws whatever a call needs out of the caches, so a call costs
several times what it costs in a loop of its own; with many rows of a narrow model, too, calls are much of its time. The
arithmetic is that of `OuroDecoderLayer` (Ouro section 4.1), to the rounding of sums. Three things differ: the
projections that share an input (q, k, v; gate, up) are one product, q and k are turned together, and no module is
called: one that has a hook, an adapter or another forward is served by the layers themselves, and so are gradients,
other devices and other attention backends.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from looplm.model.layers import OuroAttention, OuroDecoderLayer, OuroMLP, OuroRMSNorm, wide_dtype
from looplm.model.projections import OuroLinear, product, runs_plainly, side_by_side

FewMemory = Callable[[Tensor, Tensor], tuple[Tensor, Tensor] | list[tuple[Tensor, Tensor]]]
"""As `Memory`; or the keys and values of each row by itself, (1, H_kv, S_row, D_h), all of which it sees."""


class FewRows(NamedTuple):
    """The weights of a layer as `step` takes them; `qkv` and `gate_up` are views of those side by side."""

    layer: OuroDecoderLayer
    before_attention: Tensor
    qkv: Tensor
    out: Tensor
    after_attention: Tensor | None
    before_mlp: Tensor
    gate_up: Tensor
    down: Tensor
    after_mlp: Tensor | None


def gather(layers: Iterable[nn.Module], hidden: Tensor) -> Sequence[FewRows] | None:
    """The weights of some layers for `step` on states like (R, 1, D); None where the layers are to be called."""
    found: list[FewRows] = []
    for layer in layers:
        if not isinstance(layer, OuroDecoderLayer) or not all(map(_untouched, _parts(layer))):
            return None
        if not found and not _serves(layer, hidden):  # of the first alone: asking takes longer than all else here
            return None
        attention, mlp = layer.self_attn, layer.mlp
        found.append(
            FewRows(
                layer,
                layer.input_layernorm.weight,
                side_by_side([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
                attention.o_proj.weight,
                layer.input_layernorm_2.weight if layer.sandwich else None,
                layer.post_attention_layernorm.weight,
                side_by_side([mlp.gate_proj.weight, mlp.up_proj.weight]),
                mlp.down_proj.weight,
                layer.post_attention_layernorm_2.weight if layer.sandwich else None,
            )
        )
    return found


def _serves(layer: OuroDecoderLayer, hidden: Tensor) -> bool:
    """One position a row, on a CPU, without gradients: what the layers of a stack have in common."""
    config = layer.self_attn.config
    if hidden.shape[1] != 1 or config._attn_implementation != "sdpa" or config.qk_norm or config.qkv_bias:
        return False
    return not layer.training and runs_plainly(hidden, layer.self_attn.o_proj.weight)


def _parts(layer: OuroDecoderLayer) -> list[nn.Module | None]:
    """The modules whose calls are left out: all but the activation, which is the last of the MLP's."""
    attention, mlp = layer.self_attn._modules.values(), layer.mlp._modules.values()
    return [layer, *layer._modules.values(), *attention, *list(mlp)[:-1]]


_OWN = frozenset({OuroDecoderLayer, OuroAttention, OuroMLP, OuroRMSNorm, OuroLinear})


def _untouched(module: nn.Module | None) -> bool:
    """No adapter around it, no hook on it, no replaced forward."""
    if type(module) not in _OWN:
        return False
    own = module.__dict__
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)


def step(
    weights: FewRows, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, memory: FewMemory | None
) -> Tensor:
    """What the layer makes of (R, 1, D); arguments as `OuroDecoderLayer.forward`."""
    layer, state = weights.layer, hidden[:, 0]
    attention, eps = layer.self_attn, layer.input_layernorm.variance_epsilon
    mixed = _attend(weights, attention.head_dim, _norm(state, weights.before_attention, eps), rotary, mask, memory)
    state = _add(state, product(mixed, weights.out), weights.after_attention, eps)
    gate, up = _columns(weights.gate_up, _norm(state, weights.before_mlp, eps).t()).chunk(2)
    mixed = _columns(weights.down, layer.mlp.act(gate).mul_(up)).t().contiguous()
    return _add(state, mixed, weights.after_mlp, eps)[:, None]


def _attend(
    weights: FewRows,
    head_dim: int,
    x: Tensor,
    rotary: tuple[Tensor, Tensor],
    mask: Tensor | None,
    memory: FewMemory | None,
) -> Tensor:
    """(R, D) to (R, H x D_h), before the output projection."""
    rows, queries = x.shape[0], weights.out.shape[1]
    turned = queries + (weights.qkv.shape[0] - queries) // 2
    projected = product(x, weights.qkv)
    heads = projected[:, :turned].view(rows, -1, 1, head_dim)
    cos, sin = rotary
    heads = torch.addcmul(heads * cos, heads.roll(head_dim // 2, -1), sin)
    query, key = heads.split_with_sizes((queries // head_dim, (turned - queries) // head_dim), dim=1)
    value = projected[:, turned:].view(rows, -1, 1, head_dim)
    scale, grouped = weights.layer.self_attn.scaling, query.shape[1] != key.shape[1]
    seen = (key, value) if memory is None else memory(key, value)
    if isinstance(seen, tuple):
        return scaled_dot_product_attention(query, *seen, mask, scale=scale, enable_gqa=grouped).view(rows, -1)
    mixed = [
        scaled_dot_product_attention(own, *kept, scale=scale, enable_gqa=grouped).view(1, -1)
        for own, kept in zip(query.split(1), seen, strict=True)
    ]
    return mixed[0] if rows == 1 else torch.cat(mixed)


def _columns(weight: Tensor, x: Tensor) -> Tensor:
    """W x of (inputs, R), a column a row: between two products nothing is turned back (see `projections.product`)."""
    return torch.mv(weight, x[:, 0])[:, None] if x.shape[1] == 1 else torch.mm(weight, x)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of (R, D) as `OuroRMSNorm`, whose composite takes twice as many calls."""
    return _unit(x, eps).mul_(weight)


def _add(state: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """What a block adds to the residual stream, (R, D): itself, or its norm where the layer has sandwich norms."""
    return state + x if weight is None else torch.addcmul(state, _unit(x, eps), weight)


def _unit(x: Tensor, eps: float) -> Tensor:
    """(R, D) over its root mean square, which is taken wide and rounded once, at the end."""
    wide = wide_dtype(x.dtype)
    if x.shape[0] == 1:
        norm = cast(float, torch.linalg.vector_norm(x, dtype=wide).item())
        return x * (norm * norm / x.shape[1] + eps) ** -0.5
    rows = x.to(wide)
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return (rows * torch.addcmul(_number(eps, wide), norms, norms, value=1 / x.shape[1]).rsqrt_()).to(x.dtype)


@cache
def _number(value: float, dtype: torch.dtype) -> Tensor:
    """A number for ops that take tensors only; making one costs as much as such an op."""
    return torch.tensor(value, dtype=dtype, device="cpu")
