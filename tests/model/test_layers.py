"""The layers against hand-computed numbers and slow obvious references."""

import math
from pathlib import Path

import pytest
import torch
from tiny import tiny_config, tiny_model
from torch import Tensor, nn

from looplm.model.layers import (
    OuroAttention,
    OuroDecoderLayer,
    OuroMLP,
    OuroRMSNorm,
    OuroRotaryEmbedding,
    rotate,
)
from looplm.model.modeling import OuroForCausalLM


def randomise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def causal(length: int) -> Tensor:
    return torch.full((length, length), -math.inf).triu(1)[None, None]


def test_rms_norm_by_hand() -> None:
    norm = OuroRMSNorm(2, eps=0.0)
    norm.weight.data = torch.tensor([2.0, -1.0])
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([6.0, -4.0]) / math.sqrt(12.5))
    eps = OuroRMSNorm(1, eps=3.0)
    torch.testing.assert_close(eps(torch.tensor([1.0])), torch.tensor([0.5]))


def test_rms_norm_casts_before_the_weight() -> None:
    """As released: round the normalised value to bf16, multiply by the weight in bf16."""
    norm = OuroRMSNorm(64, eps=1e-6).to(torch.bfloat16)
    randomise(norm)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    wide = x.float() / (x.float().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), norm.weight * wide.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rms_norm_of_one_row_without_gradients_is_that_of_many(dtype: torch.dtype) -> None:
    norm = OuroRMSNorm(64, eps=1e-3).to(dtype)
    randomise(norm)
    rows = (3 * torch.randn(5, 64, generator=torch.Generator().manual_seed(1))).to(dtype)
    with torch.no_grad():
        alone = torch.cat([norm(row[None]) for row in rows])
    assert alone.dtype == dtype
    torch.testing.assert_close(alone, norm(rows), **({"rtol": 1e-6, "atol": 1e-7} if dtype != torch.bfloat16 else {}))


def test_rotation_is_complex_multiplication() -> None:
    config = tiny_config(head_dim=8, rope_theta=100.0)
    positions = torch.tensor([[0, 1, 5], [2, 3, 120]])
    cos, sin = OuroRotaryEmbedding(config)(positions, torch.float32)
    assert cos.shape == (2, 1, 3, 8)
    x = torch.randn(2, 3, 3, 8, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, cos, sin)
    for i in range(4):  # rotate-half: component i pairs with i + 4
        angle = positions[:, None, :] * 100.0 ** (-2 * i / 8)
        expected = torch.complex(x[..., i], x[..., i + 4]) * torch.exp(1j * angle)
        torch.testing.assert_close(turned[..., i], expected.real, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(turned[..., i + 4], expected.imag, rtol=1e-4, atol=1e-4)


def test_rotation_makes_scores_relative() -> None:
    rotary = OuroRotaryEmbedding(tiny_config())
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    scores = []
    for shift in (0, 17):
        turned = [rotate(x, *rotary(torch.tensor([[p + shift]]), torch.float32)) for x, p in ((q, 9), (k, 4))]
        scores.append(float((turned[0] * turned[1]).sum()))
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_attention_against_python_loops(kv_heads: int, backend: str) -> None:
    config = tiny_config(num_key_value_heads=kv_heads, head_dim=6)
    config._attn_implementation = backend
    attention = OuroAttention(config).eval()
    randomise(attention)
    rotary = OuroRotaryEmbedding(config)(torch.arange(5)[None], torch.float32)
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    got = attention(hidden, rotary, causal(5), None)

    q = rotate(attention.q_proj(hidden).view(2, 5, 4, 6).transpose(1, 2), *rotary)
    k = rotate(attention.k_proj(hidden).view(2, 5, kv_heads, 6).transpose(1, 2), *rotary)
    v = attention.v_proj(hidden).view(2, 5, kv_heads, 6).transpose(1, 2)
    mixed = torch.zeros(2, 5, 4, 6)
    for b in range(2):
        for head in range(4):
            group = head * kv_heads // 4
            for i in range(5):
                weights = torch.stack([q[b, head, i] @ k[b, group, j] / math.sqrt(6) for j in range(i + 1)]).softmax(0)
                mixed[b, i, head] = sum(w * v[b, group, j] for j, w in enumerate(weights))
    torch.testing.assert_close(got, attention.o_proj(mixed.flatten(2)), rtol=1e-4, atol=1e-5)


def test_attention_dropout_only_in_training() -> None:
    config = tiny_config(attention_dropout=0.5)
    config._attn_implementation = "eager"
    attention = OuroAttention(config)
    rotary = OuroRotaryEmbedding(config)(torch.arange(6)[None], torch.float32)
    hidden = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    first, second = (attention(hidden, rotary, causal(6), None) for _ in range(2))
    assert not torch.equal(first, second)
    attention.eval()
    first, second = (attention(hidden, rotary, causal(6), None) for _ in range(2))
    assert torch.equal(first, second)


def test_attention_goes_through_its_memory() -> None:
    config = tiny_config()
    attention = OuroAttention(config).eval()
    seen = []

    def memory(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((key.shape, value.shape))
        return key[:, :, :1], value[:, :, :1]  # every query sees the first position only

    rotary = OuroRotaryEmbedding(config)(torch.arange(3)[None], torch.float32)
    hidden = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(1))
    out = attention(hidden, rotary, torch.zeros(1, 1, 3, 1), memory)
    assert seen == [((1, 4, 3, 8), (1, 4, 3, 8))]
    torch.testing.assert_close(out, attention.o_proj(attention.v_proj(hidden[:, :1])).expand(1, 3, -1))


def test_mlp_is_swiglu() -> None:
    mlp = OuroMLP(tiny_config())
    randomise(mlp)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    z = x @ gate.T
    torch.testing.assert_close(mlp(x), (z * torch.sigmoid(z) * (x @ up.T)) @ down.T)


@pytest.mark.parametrize("sandwich", [True, False])
def test_sandwich_block(sandwich: bool) -> None:
    layer = OuroDecoderLayer(tiny_config(sandwich_norm=sandwich)).eval()
    randomise(layer)
    norms = {name for name, _ in layer.named_parameters() if "norm" in name}
    assert len(norms) == (4 if sandwich else 2)
    rotary = OuroRotaryEmbedding(tiny_config())(torch.arange(4)[None], torch.float32)
    hidden = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1))
    after = layer.input_layernorm_2 if sandwich else nn.Identity()
    h = hidden + after(layer.self_attn(layer.input_layernorm(hidden), rotary, causal(4), None))
    after = layer.post_attention_layernorm_2 if sandwich else nn.Identity()
    h = h + after(layer.mlp(layer.post_attention_layernorm(h)))
    torch.testing.assert_close(layer(hidden, rotary, causal(4)), h)


@pytest.mark.parametrize("how", ["cast", "loaded"])
def test_rotary_angles_stay_fp32_in_a_bf16_model(how: str, tmp_path: Path) -> None:
    model, positions = tiny_model(max_position_embeddings=65536), torch.tensor([[3, 65535]])
    expected = model.model.rotary_emb(positions, torch.float32)
    if how == "loaded":
        model.save_pretrained(tmp_path)
        model = OuroForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model = model.bfloat16()
    assert torch.equal(model.model.rotary_emb(positions, torch.float32)[0], expected[0])
    assert torch.equal(model.model.rotary_emb(positions, torch.bfloat16)[1], expected[1].bfloat16())
    assert not [name for name in model.state_dict() if "inv_freq" in name]
