"""fp32 against bf16: the same as two whole copies of the model, and the weights are given back."""

import copy

import pytest
import torch
from tiny import VARIANTS, tiny_model, tokens

from looplm.model.precision import Agreement, compare_precision, computing_in

IDS = tokens(40)


@torch.no_grad()
def slow(model, ids):
    """The same from two converted copies, position by position."""
    wide, narrow = (
        copy.deepcopy(model).to(dtype)(ids[None], exit_threshold=1.0).logits[0].double().log_softmax(-1)
        for dtype in (torch.float32, torch.bfloat16)
    )
    picked = [0, 6, 11, 17, 22, 28, 33, 39]
    same = sum(int(wide[i].argmax() == narrow[i].argmax()) for i in picked)
    divergence = sum(float((wide[i].exp() * (wide[i] - narrow[i])).sum()) for i in picked) / len(picked)
    return Agreement(len(picked), same, divergence)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_what_two_whole_copies_give(fields, stored):
    model = tiny_model(**fields).to(stored)
    actual, expected = compare_precision(model, IDS), slow(model, IDS)
    assert (actual.positions, actual.same_token) == (expected.positions, expected.same_token)
    assert actual.divergence == pytest.approx(expected.divergence, rel=1e-5, abs=1e-9)


def test_the_weights_are_given_back():
    model = tiny_model().bfloat16()
    before = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    with pytest.raises(IndexError), computing_in(model, torch.float32):
        model(torch.tensor([[3, 4000]]))
    with computing_in(model, torch.float32):
        assert model(IDS[None]).logits.dtype == torch.float32
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == before
    assert model(IDS[None]).logits.dtype == torch.bfloat16


def test_one_module_at_a_time_is_cast():
    model, most = tiny_model().bfloat16(), 0

    def count(module, *_):
        nonlocal most
        most = max(most, sum(p.numel() for p in model.parameters() if p.dtype == torch.float32))

    with computing_in(model, torch.float32):
        hooks = [module.register_forward_pre_hook(count) for module in model.modules()]
        model(IDS[None])
    for hook in hooks:
        hook.remove()
    assert most == model.lm_head.weight.numel()


def test_weights_that_overflow_disagree():
    model = tiny_model().float()
    with torch.no_grad():
        model.lm_head.weight.mul_(3e38)
    assert not compare_precision(model, IDS).divergence <= 0.1  # NaN
