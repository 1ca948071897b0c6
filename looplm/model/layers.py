"""The layers of the stack: RMSNorm, rotary positions, attention, SwiGLU and the sandwich block (Ouro section 4.1).

Weight names and arithmetic are the released ones: four RMSNorms a layer, h = h + norm2(attn(norm1(h))) and
h = h + norm4(mlp(norm3(h))), no biases, no QK norm, no loop embedding (a dense model made looped may bring the
first two). A layer knows nothing of loops: where its keys and values go is decided by the `memory` callable that it is
given (see `looplm.model.cache`).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from looplm.model.configuration import OuroConfig
from looplm.model.packing import Packing
from looplm.model.projections import OuroLinear

Memory = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes the new keys and values (B, H_kv, S, D_h), or (1, H_kv, N, D_h) of packed positions; returns those to attend to
(B, H_kv, S_past + S, D_h)."""
Adapt = Callable[[str, Tensor, Tensor], Tensor]
"""Takes a projection's name, input and output (B, S, ...); returns the output with the rows' adapters added."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64: the dtype of everything that must not be rounded."""
    return torch.promote_types(dtype, torch.float32)


class OuroRMSNorm(nn.Module):
    """RMSNorm with the variance in fp32 (fp64 for fp64), cast back *before* the weight is applied (as released)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., D), same dtype."""
        wide = hidden.to(wide_dtype(hidden.dtype))
        normed = nn.functional.rms_norm(wide, wide.shape[-1:], None, self.variance_epsilon)
        return self.weight * normed.to(hidden.dtype)


class OuroRotaryEmbedding(nn.Module):
    """cos and sin of the rotary positions, computed once a forward pass and reused by every loop.

    The frequencies are no buffer: a model cast to bf16 would round them, and far positions with them.
    """

    def __init__(self, config: OuroConfig) -> None:
        super().__init__()
        self.config = config

    @torch.no_grad()
    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(B, S) positions to cos and signed sin (-sin, sin), each (B, 1, S, D_h) of `dtype`; theta^(-2i / D_h)."""
        head_dim = self.config.head_dim or 0
        exponent = torch.arange(0, head_dim, 2, dtype=wide_dtype(dtype), device=positions.device) / head_dim
        angles = positions[:, None, :, None].to(wide_dtype(dtype)) * self.config.rope_theta**-exponent
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn (B, H, S, D_h) by its positions, rotate-half convention; `sin` carries the sign of the first half."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    """Plain softmax attention, the `eager` backend; returns (B, S, H, D_h) and the weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=wide_dtype(query.dtype)).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def _project(name: str, linear: nn.Module, x: Tensor, adapt: Adapt | None) -> Tensor:
    """A projection of (B, S, inputs), with what the rows' adapters add to it."""
    projected: Tensor = linear(x)
    return projected if adapt is None else adapt(name, x, projected)


class OuroAttention(nn.Module):
    """Causal attention with rotary positions; grouped-query where H_kv < H."""

    is_causal = True

    def __init__(self, config: OuroConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim or 0
        self.num_key_value_groups = config.num_attention_heads // (config.num_key_value_heads or 1)
        self.scaling = self.head_dim**-0.5
        width, queries = config.hidden_size, config.num_attention_heads * self.head_dim
        keys = (config.num_key_value_heads or 0) * self.head_dim
        linear = nn.Linear if config.qkv_bias else OuroLinear
        self.q_proj = linear(width, queries)
        self.k_proj = linear(width, keys)
        self.v_proj = linear(width, keys)
        if config.qk_norm:
            self.q_norm = OuroRMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = OuroRMSNorm(self.head_dim, config.rms_norm_eps)
        self.o_proj = OuroLinear(queries, width)

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        memory: Memory | None,
        adapt: Adapt | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """(B, S, D) to (B, S, D), or (1, N, D) of packed positions, whose queries meet the keys of their own rows."""
        shape = (*hidden.shape[:2], -1, self.head_dim)
        projections = {"q_proj": self.q_proj, "k_proj": self.k_proj, "v_proj": self.v_proj}
        projected = [_project(name, linear, hidden, adapt) for name, linear in projections.items()]
        query, key, value = (part.view(shape).transpose(1, 2) for part in projected)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if memory is not None:
            key, value = memory(key, value)
        query = query if packing is None else packing.by_row(query)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        mixed, _ = attend(self, query, key, value, mask, dropout=dropout, scaling=self.scaling)
        mixed = mixed if packing is None else packing.from_rows(mixed)
        mixed = mixed.reshape(*hidden.shape[:2], -1)
        return _project("o_proj", self.o_proj, mixed, adapt)


class OuroMLP(nn.Module):
    """SwiGLU: down(act(gate(h)) * up(h))."""

    def __init__(self, config: OuroConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = OuroLinear(width, inner)
        self.up_proj = OuroLinear(width, inner)
        self.down_proj = OuroLinear(inner, width)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor, adapt: Adapt | None = None) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        gate = self.act(_project("gate_proj", self.gate_proj, hidden, adapt))
        return _project("down_proj", self.down_proj, gate * _project("up_proj", self.up_proj, hidden, adapt), adapt)


class OuroDecoderLayer(nn.Module):
    """One block of the stack; `sandwich_norm=False` leaves out the norms after attention and MLP."""

    def __init__(self, config: OuroConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = OuroAttention(config)
        self.mlp = OuroMLP(config)
        self.input_layernorm = OuroRMSNorm(width, eps)
        self.post_attention_layernorm = OuroRMSNorm(width, eps)
        self.sandwich = config.sandwich_norm
        if self.sandwich:
            self.input_layernorm_2 = OuroRMSNorm(width, eps)
            self.post_attention_layernorm_2 = OuroRMSNorm(width, eps)

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        memory: Memory | None = None,
        adapt: Adapt | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """(B, S, D) to (B, S, D), or (1, N, D) of packed positions; `mask` as the attention backend wants it."""
        mixed = self.self_attn(self.input_layernorm(hidden), rotary, mask, memory, adapt, packing)
        hidden = hidden + (self.input_layernorm_2(mixed) if self.sandwich else mixed)
        mixed = self.mlp(self.post_attention_layernorm(hidden), adapt)
        return hidden + (self.post_attention_layernorm_2(mixed) if self.sandwich else mixed)
