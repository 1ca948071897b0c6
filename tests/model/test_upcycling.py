"""Upcycling: which layer is copied where, the function of the result against a slow reference, and what stays equal."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VARIANTS, tiny_model, tokens
from torch import nn

from looplm.model.context import PassContext
from looplm.model.upcycling import layer_origins, upcycle

variants = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
IDS = tokens(2, 9)


def slow_states(model, ids, plan, loops):
    """The state after each loop of a model whose core is the layers `plan` of `model`, run one by one."""
    stack = model.model
    embedded = stack.embed_tokens(ids)
    context = PassContext.build(stack, embedded, None, None, None, False, loops)
    state, states = stack.begin(context, embedded), []
    for loop in range(loops):
        if loop > 0 and model.config.input_injection == "add":
            state = state + context.core_input
        for index in plan:
            state = stack.layers[index](state, context.rotary, context.mask)
        state = stack.norm(state)
        states.append(state)
    return states


@torch.no_grad()
def states(model, loops=None):
    return model.model(IDS, num_loop_steps=loops).loop_states


@pytest.mark.parametrize(
    ("layers", "wanted", "arrangement", "expected"),
    [
        (2, 4, "ABAB", [0, 1, 0, 1]),
        (2, 4, "AABB", [0, 0, 1, 1]),
        (3, 9, "ABAB", [0, 1, 2, 0, 1, 2, 0, 1, 2]),
        (3, 9, "AABB", [0, 0, 0, 1, 1, 1, 2, 2, 2]),
        (1, 2, "AABB", [0, 0]),
        (3, None, "ABAB", [0, 1, 2]),
        (3, 3, "AABB", [0, 1, 2]),
    ],
)
def test_the_origin_of_every_layer(layers, wanted, arrangement, expected):
    assert layer_origins(layers, wanted, arrangement) == expected


@given(layers=st.integers(1, 12), times=st.integers(1, 5))
def test_every_layer_is_copied_equally_often(layers, times):
    abab, aabb = (layer_origins(layers, layers * times, name) for name in ("ABAB", "AABB"))
    assert sorted(abab) == aabb == sorted([*range(layers)] * times)
    assert all(abab[i] == abab[i + layers] for i in range(layers * (times - 1)))


@variants
@pytest.mark.parametrize(("arrangement", "plan"), [("ABAB", [0, 1, 0, 1, 0, 1]), ("AABB", [0, 0, 0, 1, 1, 1])])
def test_the_result_is_the_layers_in_that_order(fields, arrangement, plan):
    model = tiny_model(**fields)
    deeper = upcycle(model, num_hidden_layers=6, arrangement=arrangement, total_ut_steps=2)
    with torch.no_grad():
        expected = slow_states(model, IDS, plan, 2)
    for actual, wanted in zip(states(deeper), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
    assert deeper(IDS).logits.shape == (2, 9, 64)


@settings(deadline=None, max_examples=25)
@given(
    layers=st.integers(1, 3),
    times=st.integers(1, 3),
    loops=st.integers(1, 4),
    arrangement=st.sampled_from(["ABAB", "AABB"]),
    seed=st.integers(0, 99),
)
def test_any_size_is_the_layers_in_that_order(layers, times, loops, arrangement, seed):
    model = tiny_model(seed, num_hidden_layers=layers)
    deeper = upcycle(model, num_hidden_layers=layers * times, arrangement=arrangement, total_ut_steps=loops)
    with torch.no_grad():
        expected = slow_states(model, IDS, layer_origins(layers, layers * times, arrangement), loops)
    for actual, wanted in zip(states(deeper), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


@variants
def test_more_or_fewer_loops_alone_leave_the_common_states_alone(fields):
    model = tiny_model(**fields)
    before = states(model)
    for loops in (1, 2, 5):
        changed = upcycle(model, total_ut_steps=loops)
        after = states(changed)
        assert len(after) == loops and changed.config.total_ut_steps == loops
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=False))


def test_the_exit_distribution_gives_the_rest_to_the_last_loop():
    model = tiny_model()
    before = model(IDS).exit_probabilities
    after = upcycle(model, total_ut_steps=2)(IDS).exit_probabilities
    torch.testing.assert_close(after[..., 0], before[..., 0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(after[..., 1], before[..., 1:].sum(-1), rtol=1e-6, atol=1e-7)


def test_abab_with_half_the_loops_is_the_same_function_but_for_the_norm_between_the_copies():
    model = tiny_model(total_ut_steps=4)
    deeper = upcycle(model, num_hidden_layers=4, total_ut_steps=2)
    assert (states(deeper)[-1] - states(model)[-1]).abs().max() > 0.1  # the norm matters
    for each in (model, deeper):
        each.model.norm = nn.Identity()
    for new, old in zip(states(deeper), states(model)[1::2], strict=True):
        assert torch.equal(new, old)


def test_with_injection_the_norm_is_not_the_only_difference():
    model = tiny_model(total_ut_steps=4, input_injection="add")
    deeper = upcycle(model, num_hidden_layers=4, total_ut_steps=2)
    for each in (model, deeper):
        each.model.norm = nn.Identity()
    assert (states(deeper)[-1] - states(model)[-1]).abs().max() > 0.1


@pytest.mark.parametrize("arrangement", ["ABAB", "AABB"])
def test_layers_that_add_nothing_keep_the_function(arrangement):
    model = tiny_model()
    with torch.no_grad():
        for name, gain in model.named_parameters():
            if name.startswith("model.layers") and name.endswith("layernorm_2.weight"):
                gain.zero_()
    deeper = upcycle(model, num_hidden_layers=6, arrangement=arrangement)
    assert torch.equal(states(deeper)[-1], states(model)[-1])


def test_aabb_is_another_function_than_abab():
    model = tiny_model()
    results = [states(upcycle(model, num_hidden_layers=4, arrangement=name))[-1] for name in ("ABAB", "AABB")]
    assert (results[0] - results[1]).abs().max() > 0.1


@variants
def test_weights_are_copies_and_the_original_is_untouched(fields):
    model = tiny_model(**fields)
    before = copy.deepcopy(model.state_dict())
    deeper = upcycle(model, num_hidden_layers=4)
    assert not any(parameter.is_meta for parameter in deeper.parameters())
    with torch.no_grad():
        for parameter in deeper.parameters():
            parameter.add_(1)
    assert model.config.num_hidden_layers == 2 and len(model.model.layers) == 2
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    storages = {weight.data_ptr() for weight in deeper.parameters()}
    assert len(storages) == len(list(deeper.parameters()))  # the duplicates train apart


def test_dtype_mode_head_and_generation_settings_are_kept():
    model = tiny_model(tie_word_embeddings=True).bfloat16().train()
    model.generation_config.temperature = 0.3
    deeper = upcycle(model, num_hidden_layers=4)
    assert deeper.dtype == torch.bfloat16 and deeper.training
    assert deeper.lm_head.weight is deeper.model.embed_tokens.weight
    assert deeper.generation_config.temperature == 0.3
    assert all(parameter.requires_grad for parameter in deeper.parameters())


def test_it_draws_no_random_number():
    model = tiny_model()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    upcycle(model, num_hidden_layers=4)
    assert torch.equal(torch.rand(1), expected)


def test_layer_types_of_a_released_configuration_grow_along():
    model = tiny_model()
    model.config.layer_types = ["full_attention"] * 2
    assert upcycle(model, num_hidden_layers=4).config.layer_types == ["full_attention"] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1; upcycling only adds layers, and the model has 2"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; upcycling only adds layers"),
        ({"num_hidden_layers": 5}, "num_hidden_layers is 5; it must be a multiple of the model's 2, such as 6"),
        ({"total_ut_steps": 0}, "total_ut_steps is 0; it must be at least 1"),
        ({"arrangement": "ABBA"}, "arrangement is 'ABBA'; it must be ABAB"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        upcycle(tiny_model(), **arguments)
