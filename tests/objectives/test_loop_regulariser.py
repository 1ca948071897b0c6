"""The cosine of layers a block apart: by hand, against the paper's double sum, and which way it pulls."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from looplm.model.configuration import OuroConfig
from looplm.model.layers import OuroDecoderLayer
from looplm.objectives.loop_regulariser import LoopRegulariserSettings, loop_regulariser

F64 = torch.float64


def stack(*layers: dict[str, list[float]]) -> nn.ModuleList:
    """Layers with named matrices of one row, and a norm that is in no group."""
    modules = []
    for matrices in layers:
        module = nn.Module()
        for name, row in matrices.items():
            module.register_parameter(name, nn.Parameter(torch.tensor([row], dtype=F64)))
        module.norm = nn.RMSNorm(2, dtype=F64)
        modules.append(module)
    return nn.ModuleList(modules)


def test_table() -> None:
    # L = 4, k = 2: the pairs are (1, 3) and (2, 4).
    # Group q: cos of (1, 0) and (3, 4) = 3/5; of (1, 1) and (-2, -2) = -1; R_q = (3/5 - 1) / 2 = -1/5.
    # Group k: cos of (1, 2) and (2, 4) = 1; of (0, 1) and (5, 0) = 0; R_k = 1/2.
    # mean R = 3/20, and with weight 10 the term is 10 (1 - 3/20) = 8.5.
    layers = stack(
        {"q": [1.0, 0.0], "k": [1.0, 2.0]},
        {"q": [1.0, 1.0], "k": [0.0, 1.0]},
        {"q": [3.0, 4.0], "k": [2.0, 4.0]},
        {"q": [-2.0, -2.0], "k": [5.0, 0.0]},
    )
    assert loop_regulariser(layers, LoopRegulariserSettings(block=2)).item() == pytest.approx(8.5, rel=1e-12)
    assert loop_regulariser(layers, LoopRegulariserSettings(block=2, weight=2)).item() == pytest.approx(1.7, rel=1e-12)
    # k = 1, with r = 1 / sqrt 2: group q: r, 7r/5, -7r/5, so R_q = r / 3; group k: 2, 2 and 1, each over sqrt 5, so
    # R_k = sqrt 5 / 3.
    expected = 1 - (0.5**0.5 / 3 + 5**0.5 / 3) / 2
    found = loop_regulariser(layers, LoopRegulariserSettings(block=1, weight=1))
    assert found.item() == pytest.approx(expected, rel=1e-12)


def random_stack(number: int, seed: int = 0) -> nn.ModuleList:
    """Decoder layers in fp64 whose every parameter is random."""
    config = OuroConfig(vocab_size=8, hidden_size=16, intermediate_size=24, num_attention_heads=2)
    layers = nn.ModuleList(OuroDecoderLayer(config) for _ in range(number)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64))
    return layers


def printed(layers: nn.ModuleList, k: int) -> Tensor:
    """Mean over the groups of R_G(k), the double sum as the paper prints it (layers from 0)."""
    depth, groups = len(layers), [n for n, p in layers[0].named_parameters() if n.endswith("_proj.weight")]
    means = []
    for name in groups:
        theta = [dict(layer.named_parameters())[name].flatten() for layer in layers]
        total = torch.zeros((), dtype=F64)
        for i in range(depth // k - 1):
            for j in range(k):
                a, b = theta[i * k + j], theta[(i + 1) * k + j]
                total = total + (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()
        means.append(total / (depth - k))
    assert len(groups) == 7
    return torch.stack(means).mean()


@given(block=st.sampled_from([1, 2, 3]), seed=st.integers(0, 2**31), weight=st.floats(0.1, 20))
@settings(max_examples=15, deadline=None)
def test_equals_the_printed_sum_with_the_sign_turned(block: int, seed: int, weight: float) -> None:
    layers = random_stack(6, seed)
    found = loop_regulariser(layers, LoopRegulariserSettings(block=block, weight=weight))
    torch.testing.assert_close(found, weight * (1 - printed(layers, block)), rtol=1e-9, atol=1e-9)
    assert 0 <= found <= 2 * weight


@given(block=st.sampled_from([1, 2]), seed=st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_zero_for_a_looped_stack_whatever_the_scale_of_its_layers(block: int, seed: int) -> None:
    layers = random_stack(4, seed)
    looped = nn.ModuleList(copy.deepcopy(layers[i % block]) for i in range(4))
    with torch.no_grad():
        for scale, layer in enumerate(looped, start=1):
            for parameter in layer.parameters():
                parameter.mul_(scale)
    assert loop_regulariser(looped, LoopRegulariserSettings(block=block)).item() == pytest.approx(0, abs=1e-9)
    assert loop_regulariser(layers, LoopRegulariserSettings(block=block)).item() > 1


def test_minimising_it_pulls_the_blocks_together() -> None:
    layers = random_stack(4)
    chosen = LoopRegulariserSettings(block=2)
    before, optimizer = printed(layers, 2), torch.optim.Adam(layers.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loop_regulariser(layers, chosen).backward()
        optimizer.step()
    assert before < 0.1 and printed(layers, 2) > 0.9
    untouched = [n for n, p in layers.named_parameters() if p.grad is None]
    assert untouched and all("norm" in name for name in untouched)


@pytest.mark.parametrize("block", [3, 4, 5, 8])
def test_a_block_that_does_not_fit(block: int) -> None:
    layers = random_stack(4)
    with pytest.raises(ValueError, match=f"block is {block}; it must divide the number of layers, 4, and be below it"):
        loop_regulariser(layers, LoopRegulariserSettings(block=block))


def test_half_precision_weights_are_compared_in_fp32() -> None:
    layers = random_stack(4).bfloat16()
    found = loop_regulariser(layers, LoopRegulariserSettings(block=2))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), 10 * (1 - printed(copy.deepcopy(layers).double(), 2)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("values", [{"block": 0}, {"block": 2, "weight": 0}, {"block": 2, "weight": -1}, {}])
def test_settings_are_checked(values: dict) -> None:
    with pytest.raises(ValueError, match="recipe"):
        LoopRegulariserSettings.validated(values, "recipe")
