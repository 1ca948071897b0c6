"""A layer over one position a row: equal to the layer itself, and used where nothing has been put around it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layers import randomise
from tiny import tiny_config, tiny_model
from torch import Tensor, nn

from looplm.model import few_rows
from looplm.model.layers import OuroDecoderLayer, OuroRotaryEmbedding
from looplm.model.projections import FEW_ROWS


def layer_of(**fields: object) -> OuroDecoderLayer:
    torch.manual_seed(0)
    config = tiny_config(**fields)
    config._attn_implementation = "sdpa"
    layer = OuroDecoderLayer(config).eval()
    randomise(layer)
    return layer


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, FEW_ROWS + 4),
    past=st.integers(0, 5),
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1), (2, 2)]),
    sandwich=st.booleans(),
    masked=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_it_is_the_layer(
    rows: int, past: int, heads: tuple[int, int], sandwich: bool, masked: bool, dtype: torch.dtype
) -> None:
    layer = layer_of(num_attention_heads=heads[0], num_key_value_heads=heads[1], sandwich_norm=sandwich).to(dtype)
    config, draw = layer.self_attn.config, torch.Generator().manual_seed(rows * 7 + past)
    hidden = torch.randn(rows, 1, config.hidden_size, generator=draw, dtype=dtype)
    earlier = torch.randn(2, rows, heads[1], past, config.head_dim, generator=draw, dtype=dtype)
    positions = torch.randint(0, 9, (rows, 1), generator=draw)
    mask = torch.rand(rows, 1, 1, past + 1, generator=draw) < 0.7
    mask[..., -1] = True

    def memory(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat((earlier[0], key), 2), torch.cat((earlier[1], value), 2)

    with torch.no_grad():
        rotary = OuroRotaryEmbedding(config)(positions, dtype)
        given = rotary, mask if masked else None, memory if past else None
        weights = few_rows.gather([layer], hidden)
        assert weights is not None
        torch.testing.assert_close(few_rows.step(weights[0], hidden, *given), layer(hidden, *given))


@pytest.mark.parametrize("rows", [1, 5])
def test_in_bf16_the_normalised_value_is_rounded_before_the_weight(rows: int) -> None:
    layer = layer_of(sandwich_norm=False).bfloat16()
    x = torch.randn(rows, layer.self_attn.config.hidden_size).bfloat16()
    norm = layer.input_layernorm
    with torch.no_grad():
        torch.testing.assert_close(few_rows._norm(x, norm.weight, norm.variance_epsilon), norm(x), rtol=2**-7, atol=0)
        assert few_rows._norm(x, norm.weight, norm.variance_epsilon).dtype == torch.bfloat16


def test_the_norm_by_hand() -> None:
    x, weight = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([2.0, -1.0])
    expected = torch.tensor([[6 / 12.5**0.5, -4 / 12.5**0.5], [0.0, -(2**0.5)]])
    torch.testing.assert_close(few_rows._norm(x, weight, 0.0), expected)
    torch.testing.assert_close(few_rows._norm(x[:1], weight, 0.0), expected[:1])


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("positions", [1, 2])
def test_it_serves_one_position_a_row(rows: int, positions: int) -> None:
    layer = layer_of()
    hidden = torch.zeros(rows, positions, layer.self_attn.config.hidden_size)
    with torch.no_grad():
        served = few_rows.gather([layer], hidden) is not None
    assert served == (positions == 1)
    assert few_rows.gather([layer], hidden) is None  # gradients


def hooked(layer: OuroDecoderLayer) -> None:
    layer.mlp.down_proj.register_forward_hook(lambda module, args, output: output)


def wrapped(layer: OuroDecoderLayer) -> None:
    layer.self_attn.q_proj = nn.Sequential(layer.self_attn.q_proj)  # type: ignore[assignment]


def replaced(layer: OuroDecoderLayer) -> None:
    layer.self_attn.forward = lambda *args: args[0]  # type: ignore[method-assign]


def eager(layer: OuroDecoderLayer) -> None:
    layer.self_attn.config._attn_implementation = "eager"


def training(layer: OuroDecoderLayer) -> None:
    layer.train()


@pytest.mark.parametrize("change", [hooked, wrapped, replaced, eager, training])
def test_a_layer_that_says_more_than_its_weights_is_called(change) -> None:
    layer = layer_of()
    hidden = torch.zeros(1, 1, layer.self_attn.config.hidden_size)
    with torch.no_grad():
        assert few_rows.gather([layer], hidden) is not None
        change(layer)
        assert few_rows.gather([layer], hidden) is None


def test_in_decoding_no_layer_is_called_and_changed_weights_are_seen() -> None:
    model, ids = tiny_model(), torch.arange(1, 6)[None]
    model.config._attn_implementation = "sdpa"
    calls: list[int] = []
    real = OuroDecoderLayer.forward

    def counted(self: OuroDecoderLayer, hidden: Tensor, *args: object) -> Tensor:
        calls.append(hidden.shape[1])
        return real(self, hidden, *args)  # type: ignore[arg-type]

    def text() -> list[int]:
        return model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[0].tolist()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OuroDecoderLayer, "forward", counted)
        before = text()
        assert set(calls) == {5}  # the prompt only
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(-3.0)
            layer.self_attn.v_proj.weight.data = layer.self_attn.v_proj.weight.data.roll(1, 0)
    after = text()
    fresh = tiny_model()
    fresh.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    assert after == fresh.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[0].tolist()
    assert after != before
