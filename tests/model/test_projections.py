"""Projections in decoding: one product for several weights, equal to separate layers; the weights stay themselves."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import tiny_model
from torch import nn
from torch.nn.functional import linear

from looplm.model.modeling import OuroForCausalLM
from looplm.model.projections import FEW_ROWS, OuroLinear, project, side_by_side


def layers(inputs: int, *outputs: int) -> list[OuroLinear]:
    torch.manual_seed(sum(outputs))
    return [OuroLinear(inputs, n) for n in outputs]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.lists(st.integers(1, 7), min_size=1, max_size=4),
    st.lists(st.integers(1, 6), max_size=2),
    st.booleans(),
)
def test_together_is_the_same_as_apart(inputs: int, outputs: list[int], shape: list[int], gradients: bool) -> None:
    linears = layers(inputs, *outputs)
    x = torch.randn(*shape, inputs)
    expected = [linear(x, one.weight) for one in linears]
    with torch.set_grad_enabled(gradients):
        for part, whole in zip(project(x, *linears), expected, strict=True):
            torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-6)
            assert part.requires_grad == gradients


@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
def test_one_product_up_to_few_rows(rows: int) -> None:
    linears = layers(8, 4, 6)
    with torch.no_grad():
        project(torch.randn(rows, 8), *linears)
    joined = linears[1].weight.data_ptr() == linears[0].weight.data_ptr() + linears[0].weight.nbytes
    assert joined == (rows <= FEW_ROWS)


def test_weights_are_moved_once_and_joined_again_after_a_cast() -> None:
    linears = layers(8, 4, 6)
    values = [one.weight.detach().clone() for one in linears]
    first = side_by_side([one.weight for one in linears])
    assert first.data_ptr() == side_by_side([one.weight for one in linears]).data_ptr() == linears[0].weight.data_ptr()
    assert all(torch.equal(one.weight, value) for one, value in zip(linears, values, strict=True))
    for one in linears:
        one.double()
    again = side_by_side([one.weight for one in linears])
    assert again.dtype == torch.float64 and torch.equal(again, torch.cat(values).double())


def test_a_change_of_one_weight_is_seen() -> None:
    linears = layers(8, 4, 6)
    x = torch.randn(1, 8)
    with torch.no_grad():
        project(x, *linears)
        linears[1].weight.add_(1.0)
        torch.testing.assert_close(project(x, *linears)[1], linear(x, linears[1].weight))
        linears[0].weight.data = torch.zeros(4, 8)
        assert project(x, *linears)[0].abs().sum() == 0


def test_hooks_adapters_and_other_modules_are_called() -> None:
    linears, x, seen = layers(8, 4, 6), torch.randn(1, 8), []
    handle = linears[1].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        project(x, *linears)
        assert len(seen) == 1
        handle.remove()
        wrapped = nn.Sequential(linears[0])
        torch.testing.assert_close(project(x, wrapped, linears[1])[0], linears[0](x))
    assert len(seen) == 1


def test_a_model_that_has_decoded_saves_copies_and_trains_as_before(tmp_path: Path) -> None:
    model, twin = tiny_model(), tiny_model()
    ids = torch.arange(1, 6)[None]
    with torch.inference_mode():  # the worst case: what is made here could not be trained
        model.generate(ids, max_new_tokens=3, do_sample=False)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.untyped_storage().data_ptr() == attention.k_proj.weight.untyped_storage().data_ptr()
    model.save_pretrained(tmp_path)
    saved, expected = load_file(tmp_path / "model.safetensors"), twin.state_dict()
    assert all(torch.equal(saved[name], expected[name]) for name in saved) and len(saved) >= len(expected) - 1
    loaded = OuroForCausalLM.from_pretrained(tmp_path)
    for one in (model, twin, loaded, copy.deepcopy(model)):
        one.train()
        one(ids, labels=ids).loss.backward()
    for name, parameter in twin.named_parameters():
        assert torch.equal(parameter.grad, model.get_parameter(name).grad)
        assert torch.equal(parameter, loaded.get_parameter(name))


def test_an_optimizer_step_reaches_joined_weights() -> None:
    model = tiny_model()
    ids = torch.arange(1, 6)[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.generate(ids, max_new_tokens=2, do_sample=False)
    model.train()
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    model.eval()
    fresh = tiny_model()
    fresh.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, fresh(ids).logits)
