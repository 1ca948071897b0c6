"""Frozen positions are not run: results and gradients are those of running all and keeping what had been (`where`)."""

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VARIANTS, tiny_model, tokens
from torch import Tensor

from looplm.exits import Confidence, QExit, SampledExit, StateDifference
from looplm.model.cache import LoopCache
from looplm.model.context import PassContext
from looplm.model.modeling import OuroForCausalLM
from looplm.model.packing import Packing

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_:FutureWarning")  # until transformers 6

RULES = {
    "q": QExit(0.6),
    "sampled": SampledExit(7),
    "difference": StateDifference(0.9),
    "entropy": Confidence("entropy", 2.0),
}


# --- the slow reference ---


def by_where(
    model: OuroForCausalLM, ids: Tensor, mask: Tensor | None, depths: Tensor, past: LoopCache | None = None
) -> tuple[Tensor, Tensor]:
    """All T loops over every position; `torch.where` keeps state, keys and values of those past their exit.

    Returns:
        Logits (B, S, V) at the exits, and gate logits (B, S, T), which count up to the exit.
    """
    core, loops = model.model, model.config.total_ut_steps
    embedded = core.embed(ids, None)
    context = PassContext.build(core, embedded, mask, None, past, past is not None, loops)
    remember, looping, kept = PassContext.memory, torch.ones_like(ids, dtype=torch.bool), {}
    looped = range(core.config.num_prelude_layers, core.config.num_prelude_layers + core.config.num_hidden_layers)

    def memory(layer: int, loop: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        store = remember(context, layer, loop)

        def both(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            if layer in looped:
                old = kept.get(layer, (key, value))
                key, value = (
                    torch.where(looping[:, None, :, None], a, b) for a, b in zip((key, value), old, strict=True)
                )
                kept[layer] = key, value
            return (key, value) if store is None else store(key, value)

        return both

    context.memory = memory  # type: ignore[method-assign]
    state, gates = core.begin(context, embedded), []
    for loop in range(1, loops + 1):
        looping = depths.clamp(min=1) >= loop
        state = torch.where(looping[..., None], core.loop(state, context, loop)[0], state)
        gates.append(core.gate(state, context))
    logits = model.lm_head(core.finish(state, context))
    context.advance(depths)
    return logits, torch.stack(gates, dim=-1)


# --- drawing passes ---


@cache
def model_of(variant: str, loops: int, attention: str) -> OuroForCausalLM:
    model = tiny_model(**VARIANTS[variant], total_ut_steps=loops, rope_theta=500.0 if loops == 3 else 1e4)
    model.set_attn_implementation(attention)
    return model


@st.composite
def passes(draw: st.DrawFn) -> dict[str, Any]:
    """A model and rows of unequal length, padded on the left, on the right or in the mask only, or not at all."""
    loops, batch, length = draw(st.integers(2, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
    model = model_of(draw(st.sampled_from(list(VARIANTS))), loops, draw(st.sampled_from(["sdpa", "eager"])))
    lengths = torch.tensor(draw(st.lists(st.integers(1, length), min_size=batch, max_size=batch)))
    steps, side = torch.arange(length), draw(st.sampled_from(["left", "right", "none"]))
    there = steps >= length - lengths[:, None] if side == "left" else steps < lengths[:, None]
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    deepest = draw(st.integers(1, loops))  # sometimes nobody goes all the way
    depths = torch.randint(1, deepest + 1, (batch, length), generator=generator)
    return {
        "model": model,
        "ids": tokens(batch, length, seed=seed),
        "mask": None if side == "none" else there.long(),
        "depths": depths * (there if draw(st.booleans()) else 1),
    }


def gradients(model: OuroForCausalLM, logits: Tensor, gates: Tensor) -> dict[str, Tensor]:
    """Of a sum over logits and gate logits that weighs each of them differently."""
    weigh = [torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1)) for x in (logits, gates)]
    model.zero_grad()
    ((logits * weigh[0]).sum() + (gates * weigh[1]).sum()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_all(model: OuroForCausalLM, out: Any, logits: Tensor, gates: Tensor, tolerance: float = 1e-9) -> None:
    """Logits, gate logits up to the exits, and all gradients."""
    ran = torch.arange(1, gates.shape[-1] + 1) <= out.exit_depths[..., None]
    assert torch.equal(out.gate_logits.isnan(), ~ran)
    expected = gradients(model, logits, gates.masked_fill(~ran, 0))
    found = gradients(model, out.logits, out.gate_logits.masked_fill(~ran, 0))
    near = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(out.logits, logits, **near)
    torch.testing.assert_close(out.gate_logits[ran], gates[ran], **near)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1.0)
        torch.testing.assert_close(found[name] / scale, gradient / scale, **near, msg=lambda t, n=name: f"{n}: {t}")


# --- equal to the reference ---


@settings(max_examples=60, deadline=None)
@given(passes(), st.booleans())
def test_recorded_depths(case: dict[str, Any], checkpointing: bool) -> None:
    model, ids, mask, depths = (case[name] for name in ("model", "ids", "mask", "depths"))
    model.train()
    logits, gates = by_where(model, ids, mask, depths)
    if checkpointing:
        model.gradient_checkpointing_enable()
    try:
        check_all(model, model(ids, mask, exit_depths=depths), logits, gates)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


@settings(max_examples=30, deadline=None)
@given(passes(), st.sampled_from(list(RULES)))
def test_rules(case: dict[str, Any], rule: str) -> None:
    """At the depths that a rule finds; which depths those are is said by `test_replay` and the oracle."""
    model, ids, mask = (case[name] for name in ("model", "ids", "mask"))
    if model.config.exit_gate_pooling != "token" or (rule == "entropy" and model.config.num_coda_layers):
        return  # refused
    out = model(ids, mask, exit_rule=RULES[rule], exit_mode="freeze")
    check_all(model, out, *by_where(model, ids, mask, out.exit_depths))


@settings(max_examples=40, deadline=None)
@given(passes(), st.data())
@torch.no_grad()
def test_what_is_cached(case: dict[str, Any], data: st.DataObject) -> None:
    """A text in two parts on a cache: logits, and the keys and values of every layer and loop."""
    model, ids, mask, depths = (case[name] for name in ("model", "ids", "mask", "depths"))
    cut = data.draw(st.integers(0, ids.shape[1] - 1))
    parts = [(a, b) for a, b in itertools.pairwise((0, cut, ids.shape[1])) if a < b]
    mine, theirs = LoopCache(model.config), LoopCache(model.config)
    depths = depths.clamp(min=1)
    for a, b in parts:
        so_far, here = None if mask is None else mask[:, :b], depths[:, a:b]
        out = model(ids[:, a:b], so_far, exit_depths=here, past_key_values=mine, use_cache=True)
        logits, _ = by_where(model, ids[:, a:b], so_far, here, theirs)
        torch.testing.assert_close(out.logits, logits, rtol=1e-9, atol=1e-9)
    for left, right in zip(mine.slots, theirs.slots, strict=True):
        for name in ("keys", "values"):
            pair = [getattr(x, name)[:, :, :, : ids.shape[1]] for x in (left, right)]
            torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-9)


RAGGED = torch.tensor([[0, 0, 1, 3, 2, 2, 1, 3], [3, 1, 1, 2, 3, 3, 1, 2], [1, 1, 2, 1, 1, 1, 1, 0]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_precisions(dtype: str) -> None:
    """fp32 as tight as its sums are; the products in bf16, as `torch.autocast` makes them, as near as those."""
    model, ids = tiny_model(num_key_value_heads=2).float().train(), tokens(3, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        expected = by_where(model, ids, None, RAGGED)
        out = model(ids, exit_depths=RAGGED)
    check_all(model, out, *expected, tolerance=2e-5 if dtype == "float32" else 0.05)


def test_packed_documents() -> None:
    """Positions that start anew keep documents apart, in the packed loops too."""
    model, ids = tiny_model(), tokens(2, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0, 0, 1]])
    depths = RAGGED[:2].clamp(min=1)
    together = model(ids, position_ids=positions, exit_depths=depths).logits
    for row, (a, b) in ((0, (0, 3)), (0, (3, 8)), (1, (0, 5)), (1, (5, 6)), (1, (6, 8))):
        alone = model(ids[row : row + 1, a:b], exit_depths=depths[row : row + 1, a:b]).logits
        torch.testing.assert_close(together[row, a:b], alone[0], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_one_position_a_row() -> None:
    """The first loop runs as decoding does (`few_rows`), the packed ones through the layers."""
    model, ids, depths = tiny_model(), tokens(3, 1), torch.tensor([[1], [3], [2]])
    out = model(ids, exit_depths=depths)
    torch.testing.assert_close(out.logits, by_where(model, ids, None, depths)[0], rtol=1e-9, atol=1e-9)


# --- what is run ---


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_position_costs_no_layer(checkpointing: bool) -> None:
    """Every projection of the core meets each position as often as it loops, those of prelude and coda once."""
    model, ids = tiny_model(num_prelude_layers=1, num_coda_layers=1).train(), tokens(3, 8)
    if checkpointing:
        model.gradient_checkpointing_enable()
    met: dict[str, list[int]] = {}
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear) and "proj" in name:
            rows = met.setdefault(name, [])
            module.register_forward_hook(lambda _, inputs, __, rows=rows: rows.append(inputs[0].shape[:-1].numel()))
    model(ids, exit_depths=RAGGED).logits.sum().backward()
    again = [5, 10, 24] if checkpointing else []
    assert len(met) == 4 * 7, "seven projections in each of two core layers, prelude and coda"
    for name, rows in met.items():
        assert rows == ([24, 10, 5, *again] if name.startswith("layers") else [24]), name


def test_nothing_is_packed_while_all_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(), tokens(2, 6)
    expected = model(ids).logits
    monkeypatch.setattr(Packing, "of", None)  # would fail if called
    for depth in (1, 2, 3):
        model(ids, exit_depths=torch.full((2, 6), depth))
    torch.testing.assert_close(model(ids, exit_depths=torch.full((2, 6), 3)).logits, expected)


# --- the packing itself ---


def test_a_packing_by_hand() -> None:
    """Of rows 0 . . 3 / . . . . / . 9 10 11 of (3, 4) places: two and three of them, none in the middle."""
    packing = Packing.of(torch.tensor([0, 3, 9, 10, 11]), 3, 4)
    assert packing.slots.tolist() == [0, 1, 6, 7, 8]
    assert packing.filled.tolist() == [[0, 1, 0], [0, 0, 0], [2, 3, 4]]
    assert packing.columns.tolist() == [[0, 3, 3], [3, 3, 3], [1, 2, 3]]
    x = torch.arange(12).view(3, 4)
    assert packing.pack(x).tolist() == [[0, 3, 9, 10, 11]]
    back = packing.unpack(torch.tensor([[-1, -2, -3, -4, -5]]), x)
    assert back.tolist() == [[-1, 1, 2, -2], [4, 5, 6, 7], [8, -3, -4, -5]]
    look = packing.mask(None, 1, 4)[:, 0].int().tolist()  # one cached position before
    assert look[0] == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert look[2] == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


@settings(deadline=None)
@given(st.data())
def test_queries_come_back_from_their_rows(data: st.DataObject) -> None:
    batch, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    places = data.draw(st.sets(st.integers(0, batch * length - 1), min_size=1))
    packing = Packing.of(torch.tensor(sorted(places)), batch, length)
    query = torch.randn(1, 2, len(places), 3)
    laid_out = packing.by_row(query)
    for number, place in enumerate(sorted(places)):
        row, column = divmod(place, length)
        rank = sum(other // length == row and other < place for other in places)
        assert torch.equal(laid_out[row, :, rank], query[0, :, number])
        assert packing.columns[row, rank] == column
    assert torch.equal(packing.from_rows(laid_out.transpose(1, 2)), query.transpose(1, 2))
