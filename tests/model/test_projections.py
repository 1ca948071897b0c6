"""Projections in decoding: one product for several weights, equal to separate layers; the weights stay themselves."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model
from torch.nn.functional import linear

from looplm.model.modeling import OuroForCausalLM
from looplm.model.projections import FEW_ROWS, OuroLinear, side_by_side


def layers(inputs: int, *outputs: int) -> list[OuroLinear]:
    torch.manual_seed(sum(outputs))
    return [OuroLinear(inputs, n) for n in outputs]


@pytest.mark.parametrize("shape", [(1,), (2, 1), (FEW_ROWS, 1), (FEW_ROWS + 1,)])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_projection_of_few_rows_is_that_of_many(shape: tuple[int, ...], gradients: bool) -> None:
    (one,), x = layers(9, 7), torch.randn(*shape, 9)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(one(x), linear(x, one.weight), rtol=1e-5, atol=1e-6)
        assert one(x).requires_grad == gradients


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
