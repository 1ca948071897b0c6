"""Retrofit: one loop is the dense model for every split; more loops are its layers run again; cores and influence."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_dense import FAMILIES, VOCABULARY, small_config, small_dense
from torch import Tensor, nn

from looplm.data.tokenizers import train_bpe
from looplm.model.loading import load_model
from looplm.model.retrofitting import block_influence, check_core, choose_core, cosine, retrofit

IDS = torch.randint(0, VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(1))
DENSE = {family: small_dense(family) for family in FAMILIES}
families = pytest.mark.parametrize("family", FAMILIES)
cores = st.tuples(st.integers(0, 4), st.integers(1, 5)).filter(lambda ends: ends[0] < ends[1])


@torch.no_grad()
def layer_by_layer(dense: Any, order: list[int]) -> Tensor:
    """The dense model's own layers in another order: logits."""
    hidden, positions = dense.model.embed_tokens(IDS), torch.arange(IDS.shape[1])[None]
    rotary = dense.model.rotary_emb(hidden, positions)
    mask = torch.full((IDS.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    for index in order:
        hidden = dense.model.layers[index](
            hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary
        )
    return dense.lm_head(dense.model.norm(hidden))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@families
@given(ends=cores, loops=st.integers(1, 3))
@settings(deadline=None, max_examples=20)
@torch.no_grad()
def test_every_split_is_the_dense_model_in_one_loop_and_its_layers_again_in_more(
    family: str, ends: tuple[int, int], loops: int
) -> None:
    dense, (first, end) = DENSE[family], ends
    looped = retrofit(dense, range(first, end), loops)
    close(looped(IDS, num_loop_steps=1).logits, dense(IDS).logits)
    order = [*range(first), *list(range(first, end)) * loops, *range(end, 5)]
    close(looped(IDS).logits, layer_by_layer(dense, order))


@families
@torch.no_grad()
def test_the_folder_that_is_saved_is_the_same_model(family: str, tmp_path: Path) -> None:
    dense = DENSE[family]
    looped = retrofit(dense, range(1, 3), 3)
    looped.save_pretrained(tmp_path)
    train_bpe(["the union"], 259).save_pretrained(tmp_path)
    again, _ = load_model(str(tmp_path))
    assert torch.equal(again(IDS).logits, looped(IDS).logits)
    tied = dense.config.tie_word_embeddings
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied


@families
@torch.no_grad()
def test_cached_generation_equals_whole_passes(family: str) -> None:
    looped, ids = retrofit(DENSE[family], range(2, 4), 2), IDS[:1]
    new = looped.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :].tolist()
    for token in new:
        assert int(looped(ids).logits[0, -1].argmax()) == token
        ids = torch.cat((ids, torch.tensor([[token]])), 1)


def test_the_weights_are_copies_and_nothing_is_random() -> None:
    dense = small_dense("llama", tie_word_embeddings=False).to(torch.bfloat16)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    one, two = (retrofit(dense, range(1, 4), 4) for _ in range(2))
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert one.dtype == torch.bfloat16 and not one.training
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


@pytest.mark.parametrize("core", [range(1, 3), range(0, 5)])
@torch.no_grad()
def test_the_gate_begins_with_a_hazard_of_one_in_T(core: range) -> None:
    # T = 3: p = 1/3, 2/3 x 1/3, and what is left
    probabilities = retrofit(DENSE["llama"], core, 3)(IDS).exit_probabilities
    torch.testing.assert_close(probabilities, torch.tensor([3 / 9, 2 / 9, 4 / 9]).expand(2, 15, 3))
    assert retrofit(DENSE["llama"], core, 1)(IDS).exit_probabilities.unique().tolist() == [1.0]


def test_the_loss_trains_gate_core_and_coda() -> None:
    looped = retrofit(DENSE["qwen3"], range(1, 3), 3).train()
    looped(IDS, labels=IDS).loss.backward()
    for name in ("early_exit_gate.weight", "layers.0.self_attn.q_norm.weight", "prelude.0.mlp.up_proj.weight"):
        gradient = looped.model.get_parameter(name).grad
        assert gradient is not None and gradient.isfinite().all() and gradient.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("core", "text"), [(range(3, 6), "3:6"), (range(2, 2), "2:2"), (range(4, 2), "4:2"), (range(-1, 2), "-1:2")]
)
def test_a_core_outside_the_layers(core: range, text: str) -> None:
    with pytest.raises(ValueError, match=rf"core {text} does not lie in the model's layers 0:5 .*FIRST < END <= 5"):
        retrofit(DENSE["llama"], core, 2)


def test_other_models_and_numbers_of_loops() -> None:
    with pytest.raises(ValueError, match="total_ut_steps is 0"):
        retrofit(DENSE["llama"], range(1, 3), 0)
    with pytest.raises(ValueError, match="attention_bias is true"):
        retrofit(small_dense("llama", attention_bias=True), range(1, 3), 2)


@given(layers=st.integers(1, 6), ends=cores)
def test_a_core_is_accepted_where_it_lies_in_the_layers(layers: int, ends: tuple[int, int]) -> None:
    if ends[1] <= layers:
        check_core(range(*ends), layers)
    else:
        with pytest.raises(ValueError, match=f"layers 0:{layers}"):
            check_core(range(*ends), layers)


# ---- block influence


class Turn(nn.Module):
    """A layer that turns the state (…, 2) by an angle and stretches it."""

    def __init__(self, degrees: float, stretch: float = 1.0) -> None:
        super().__init__()
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        self.matrix = stretch * torch.tensor([[c, s], [-s, c]])

    def forward(self, state: Tensor) -> Tensor:
        return state @ self.matrix


class Turning(nn.Module):
    """Stands in for a dense model: embeddings in the plane and layers that turn."""

    def __init__(self, *layers: Turn) -> None:
        super().__init__()
        self.config, self.device = small_config("llama", max_position_embeddings=4), torch.device("cpu")
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(layers)
        self.model.forward = self.run  # type: ignore[method-assign]

    def run(self, ids: Tensor, use_cache: bool) -> None:
        state = torch.stack((ids.cos(), ids.sin()), dim=-1)
        for layer in self.model.layers:
            state = layer(state)


def test_block_influence_by_hand() -> None:
    # cosines 1, 1/2, 0, -1; how long the state is does not matter; windows of 4 tokens, the last one of 2
    model: Any = Turning(Turn(0, 7.0), Turn(60), Turn(90, 0.1), Turn(180))
    assert block_influence(model, torch.arange(10)) == pytest.approx([0, 0.5, 1, 2], abs=1e-6)


@torch.no_grad()
def test_block_influence_is_that_of_the_states_before_and_after() -> None:
    dense, ids = DENSE["llama"], IDS.flatten()[:20]
    hooks = [len(layer._forward_hooks) for layer in dense.model.layers]
    measured = block_influence(dense, ids)
    assert [len(layer._forward_hooks) for layer in dense.model.layers] == hooks
    states = dense(ids[None], output_hidden_states=True).hidden_states  # the last of them is normed
    slow = [1 - float(cosine(a, b).mean()) for a, b in pairwise(states[:-1])]
    assert measured[:-1] == pytest.approx(slow, abs=1e-6) and len(measured) == 5


@given(st.lists(st.lists(st.floats(-9, 9), min_size=3, max_size=3), min_size=2, max_size=2), st.floats(0.1, 9))
def test_cosine_is_bounded_symmetric_and_blind_to_size(pair: list[list[float]], size: float) -> None:
    one, two = torch.tensor(pair, dtype=torch.float64).unbind(0)
    value = float(cosine(one, two))
    assert -1 - 1e-12 <= value <= 1 + 1e-12 and value == pytest.approx(float(cosine(two, one)))
    if min(float(one.norm()), float(two.norm())) > 1e-6:
        assert value == pytest.approx(float(cosine(size * one, two)), abs=1e-9)


def test_choosing_by_hand() -> None:
    influence = [0.875, 0.25, 0.125, 0.375, 0.125, 0.25, 0.125]
    assert choose_core(influence, 1) == range(2, 3)  # the first of three
    assert choose_core(influence, 2) == range(1, 3)
    assert choose_core(influence, 3) == range(4, 7)  # 0.5, against 0.625 of 2:5
    assert choose_core(influence, 7) == range(0, 7)
    for size in (0, 8):
        with pytest.raises(ValueError, match=f"a core of {size} layers cannot be chosen of 7; give 1 to 7"):
            choose_core(influence, size)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.data())
def test_no_other_run_of_layers_has_less_influence(influence: list[int], data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(influence)))
    chosen = choose_core(influence, size)
    total = sum(influence[index] for index in chosen)
    others = [sum(influence[first : first + size]) for first in range(len(influence) - size + 1)]
    assert len(chosen) == size and total == min(others) and others.index(total) == chosen.start
