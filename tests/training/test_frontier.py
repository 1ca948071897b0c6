"""Frontiers against one plain pass a window, intervals and interpolation by hand, and the model given back."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from small_run import encoded, small_model
from torch import Tensor
from torch.nn.functional import cross_entropy

from looplm.data.pipeline import Windows, validation_batches
from looplm.exits import Confidence, ExitRule, FixedDepth, QExit, StateDifference
from looplm.model.modeling import OuroForCausalLM
from looplm.training.bootstrap import RESAMPLES
from looplm.training.frontier import (
    STATIC,
    Comparison,
    Curve,
    compare_gates,
    frontier,
    gate_of,
    loss_at,
    summarise,
    thresholds_for,
)

WINDOWS = Windows(encoded([30, 5, 2, 41, 17, 60, 44]), 16, separate_documents=True, keep_remainder=True)
BATCHES = list(validation_batches(WINDOWS, 4))


@pytest.fixture(scope="module")
def model() -> OuroForCausalLM:
    """Weights large enough that loops, tokens and exits differ visibly."""
    torch.manual_seed(0)
    model = small_model(tie_word_embeddings=False).double().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(10)
    return model


def other_gate(model: OuroForCausalLM) -> dict[str, Tensor]:
    return {name: -2 * value + 0.3 for name, value in gate_of(model).items()}


@torch.no_grad()
def slow(model: OuroForCausalLM, rule: ExitRule) -> tuple[float, float]:
    """Mean loops and mean loss over the targets of every window, one freezing pass with logits each."""
    nats, loops, tokens = 0.0, 0, 0
    model.eval()
    for index in range(len(WINDOWS)):
        ids, labels, places = (
            torch.tensor(WINDOWS[index][name])[None] for name in ("input_ids", "labels", "position_ids")
        )
        out = model(ids, position_ids=places, exit_mode="freeze", exit_rule=rule)
        valid = labels != -100
        nats += float(cross_entropy(out.logits[valid], labels[valid], reduction="sum"))
        loops, tokens = loops + int(out.exit_depths[valid].sum()), tokens + int(valid.sum())
    model.train()
    return loops / tokens, nats / tokens


RULES: dict[str, list[ExitRule]] = {
    "gate": [QExit(0.2), QExit(0.6), QExit(0.9)],
    "confidence": [Confidence("max_probability", 0.2), Confidence("max_probability", 0.6)],
    "difference": [StateDifference(5.0)],
}


def test_points_are_those_of_one_freezing_pass_a_window(model: OuroForCausalLM) -> None:
    found = frontier(model, BATCHES, {name: Curve(rules) for name, rules in RULES.items()})
    assert list(found.curves) == [STATIC, *RULES] and found.tokens == WINDOWS.corpus.text_tokens
    rules = {STATIC: [FixedDepth(1), FixedDepth(2), FixedDepth(3)], **RULES}
    for name, points in found.curves.items():
        for point, rule in zip(points, rules[name], strict=True):
            assert (point.loops, point.loss) == pytest.approx(slow(model, rule), rel=1e-9)
            for value, (low, high) in ((point.loops, point.loops_interval), (point.loss, point.loss_interval)):
                assert low - 1e-12 <= value <= high + 1e-12
    assert [p.setting for p in found.curves["gate"]] == [0.2, 0.6, 0.9]
    assert len({round(p.loops, 3) for p in found.curves["gate"]}) == 3


def test_gates_are_swapped_and_given_back(model: OuroForCausalLM) -> None:
    own, other = gate_of(model), other_gate(model)
    found = compare_gates(model, BATCHES, {"stage I": own, "stage II": other})
    first, second = (found.curves[name][2].setting for name in ("stage I", "stage II"))
    assert model.training and all(torch.equal(a, b) for a, b in zip(own.values(), gate_of(model).values(), strict=True))
    plain = frontier(model, BATCHES, {"a": Curve([QExit(first)]), "b": Curve([QExit(second)], other)})
    assert plain.curves["a"][0] == found.curves["stage I"][2]
    assert plain.curves["b"][0] == found.curves["stage II"][2]
    assert plain.curves["a"][0] != plain.curves["b"][0]
    assert list(found.curves) == [STATIC, "stage I", "stage II", "max probability"]
    pairs = {(c.curve, c.baseline) for c in found.comparisons}
    assert pairs <= {
        ("stage I", STATIC),
        ("stage II", STATIC),
        ("max probability", STATIC),
        ("stage II", "stage I"),
        ("max probability", "stage I"),
    }
    assert ("max probability", STATIC) in pairs


@torch.no_grad()
def test_thresholds_reach_their_depths_on_a_plain_pass(model: OuroForCausalLM) -> None:
    wanted = [1.2, 1.5, 2.0, 2.5, 2.9]
    found = thresholds_for(model, BATCHES, wanted)
    assert len(found) == 5 and found == sorted(found) and model.training
    model.eval()
    for depth, threshold in zip(wanted, found, strict=True):
        depths = [
            model(batch["input_ids"], position_ids=batch["position_ids"], exit_threshold=threshold).exit_depths[valid]
            for batch in BATCHES
            for valid in [batch["labels"] != -100]
        ]
        # the first positions of the 7 documents are alike, so up to 7 go together
        assert torch.cat(depths).double().mean().item() == pytest.approx(depth, abs=8 / WINDOWS.corpus.text_tokens)
    model.train()


def test_thresholds_need_a_target(model: OuroForCausalLM) -> None:
    nothing = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in BATCHES]
    with pytest.raises(ValueError, match="the batches hold no target token"):
        thresholds_for(model, nothing, [1.5])
    assert model.training


def test_the_model_is_given_back_after_a_fault(model: OuroForCausalLM) -> None:
    own = gate_of(model)
    with pytest.raises(ValueError, match="FixedDepth has no setting to vary; use QExit, Confidence"):
        frontier(model, BATCHES, {"a": Curve([QExit(0.5), FixedDepth(2)], other_gate(model))})
    assert model.training and all(torch.equal(a, b) for a, b in zip(own.values(), gate_of(model).values(), strict=True))


def test_without_confidence_behind_a_coda() -> None:
    torch.manual_seed(0)
    model = small_model(num_coda_layers=1)
    assert list(compare_gates(model, BATCHES, {"stage I": gate_of(model)}).curves) == [STATIC, "stage I"]


def test_more_loops_than_trained(model: OuroForCausalLM) -> None:
    with pytest.warns(UserWarning, match="running 4 loops"):
        found = frontier(model, BATCHES, {"a": Curve([QExit(1.0)])}, loops=4)
    assert [p.loops for p in found.curves[STATIC]] == [1, 2, 3, 4]
    assert found.curves["a"][0].loss == pytest.approx(found.curves[STATIC][3].loss, rel=1e-9)


def test_rows_without_a_target_count_for_nothing(model: OuroForCausalLM) -> None:
    curves = {"a": Curve([QExit(0.3), QExit(0.6)])}
    padded = [
        {
            name: torch.cat((rows, torch.full_like(rows[:2], -100 if name == "labels" else 0)))
            for name, rows in batch.items()
        }
        for batch in BATCHES
    ]
    mine, theirs = frontier(model, padded, curves), frontier(model, BATCHES, curves)
    assert mine.windows == theirs.windows and mine.tokens == theirs.tokens
    for a, b in zip(mine.curves["a"], theirs.curves["a"], strict=True):
        assert dataclasses.astuple(a)[1] == pytest.approx(b.loops) and a.loss == pytest.approx(b.loss)
        assert a.loss_interval == pytest.approx(b.loss_interval)


def test_one_window_has_no_interval(model: OuroForCausalLM) -> None:
    first = [{name: rows[:1] for name, rows in BATCHES[0].items()}]
    with pytest.raises(ValueError, match="1 windows have a target; an interval needs 2 or more"):
        frontier(model, first, {})


# --- the arithmetic, on sums made by hand ---


def sums(tokens: Any, losses: Any, depths: Any) -> np.ndarray:
    """(W, 3) from tokens, mean loss and mean depth of every window."""
    tokens = np.asarray(tokens, dtype=np.float64)
    return np.stack((tokens, tokens * losses, tokens * depths), axis=1)


def static(tokens: Any, *losses: Any) -> list[tuple[float, np.ndarray]]:
    return [(float(t), sums(tokens, loss, t)) for t, loss in enumerate(losses, start=1)]


def test_means_are_over_tokens_not_windows() -> None:
    found = summarise({STATIC: static([1, 3], np.array([4.0, 2.0]))}, 0)
    assert found.curves[STATIC][0].loss == 2.5 and (found.windows, found.tokens) == (2, 4)


def test_interpolation_by_hand() -> None:
    # Between (1, 4) and (3, 2) the line has 3 at 2; the order of the points is no matter; beyond, the nearest end.
    depths, losses = np.array([3.0, 1.0]), np.array([2.0, 4.0])
    assert [loss_at(x, depths, losses) for x in (1.0, 2.0, 2.5, 3.0, 0.5, 9.0)] == [4.0, 3.0, 2.5, 2.0, 4.0, 2.0]


def test_comparisons_are_at_equal_loops_and_paired() -> None:
    """Windows differ by whole nats, the rules by 0.1 in each: unpaired intervals overlap, paired ones are a point."""
    level = np.arange(20) / 2.0
    line = static(np.full(20, 8), level + 3, level + 2, level + 1)
    rule = [(0.1, sums(np.full(20, 8), level + 2.9, 1.0)), (0.9, sums(np.full(20, 8), level + 0.9, 3.0))]
    found = summarise({STATIC: line, "rule": rule}, 0)
    assert [c.loops for c in found.comparisons] == [1.5, 2.0, 2.5]
    for c in found.comparisons:
        assert (c.difference, *c.interval) == pytest.approx((-0.1, -0.1, -0.1), abs=1e-9)
        assert (c.curve, c.baseline, c.verdict) == ("rule", STATIC, "better")
    first = found.curves["rule"][0]
    assert first.loss_interval[1] - first.loss_interval[0] > 1
    assert (first.above_full, *first.above_full_interval) == pytest.approx((1.9, 1.9, 1.9), abs=1e-9)
    assert [p.above_full for p in found.curves[STATIC]] == pytest.approx([2, 1, 0], abs=1e-9)


def test_only_depths_that_both_reach_are_compared() -> None:
    line = static(np.full(9, 8), 3.0, 2.0, 1.0, 1.0)
    rule = [(0.1, sums(np.full(9, 8), 2.5, 1.7)), (0.9, sums(np.full(9, 8), 1.6, 3.1))]
    other = [(0.1, sums(np.full(9, 8), 2.4, 2.2)), (0.9, sums(np.full(9, 8), 1.6, 2.8))]
    found = summarise({STATIC: line, "rule": rule, "other": other}, 0)
    assert [(c.curve, c.baseline, c.loops) for c in found.comparisons] == [
        ("rule", STATIC, 2.0),
        ("rule", STATIC, 2.5),
        ("rule", STATIC, 3.0),
        ("other", STATIC, 2.5),
        ("other", "rule", 2.5),
    ]
    # Static at 2.5: 1.5. Rule: 2.5 - 0.9 * 0.8 / 1.4. Other: 2.0.
    differences = {(c.curve, c.baseline): c.difference for c in found.comparisons if c.loops == 2.5}
    assert differences["rule", STATIC] == pytest.approx(2.5 - 0.9 * 0.8 / 1.4 - 1.5)
    assert differences["other", STATIC] == pytest.approx(0.5)
    assert differences["other", "rule"] == pytest.approx(2.0 - (2.5 - 0.9 * 0.8 / 1.4))


@given(windows=st.integers(2, 40), seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_intervals_are_those_of_resampled_windows(windows: int, seed: int) -> None:
    """Against drawing windows by index, one resample at a time, from the same generator."""
    draw = np.random.default_rng(seed)
    scored = {STATIC: static(draw.integers(1, 9, windows), draw.random(windows), draw.random(windows))}
    found = summarise(scored, seed)
    counts = np.random.default_rng(seed).multinomial(windows, [1 / windows] * windows, RESAMPLES)
    for point, (_, table) in zip(found.curves[STATIC], scored[STATIC], strict=True):
        means = []
        for row in counts:
            picked = np.repeat(table, row, axis=0)
            means.append(picked[:, 1].sum() / picked[:, 0].sum())
        assert point.loss_interval == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))
        assert point.loss == pytest.approx(table[:, 1].sum() / table[:, 0].sum())


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draw, covered = np.random.default_rng(0), 0
    for seed in range(200):
        losses = draw.normal(2.0, 0.5, 60)
        low, high = summarise({STATIC: static(np.full(60, 5), losses)}, seed).curves[STATIC][0].loss_interval
        covered += low <= 2.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_verdicts() -> None:
    cases = (((-2.0, -1.0), "better"), ((1.0, 2.0), "worse"), ((-1.0, 2.0), "level"))
    for interval, verdict in cases:
        assert Comparison("a", "b", 2.0, 0.0, interval).verdict == verdict


# --- what people see ---


def shown(table: Any) -> str:
    console = Console(width=110, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_tables_and_json() -> None:
    line = static(np.full(9, 8), 3.0, 2.0, 1.0)
    found = summarise({STATIC: line, "gate": [(0.25, sums(np.full(9, 8), 2.5, 1.0)), (0.75, line[2][1])]}, 0)
    text = shown(found.table())
    assert (
        "9 windows, 72 tokens" in text and "3.000 (3.000 to 3.000)" in text and "+1.5000 (+1.5000 to +1.5000)" in text
    )
    assert [row.split("│")[1].strip() for row in text.splitlines() if "│" in row].count("gate") == 1
    assert "0.25" in text and "0.75" in text
    text = shown(found.comparison_table())
    assert "-0.1250 (-0.1250 to -0.1250)" in text and "better" in text
    again = json.loads(json.dumps(dataclasses.asdict(found)))
    assert again["curves"]["gate"][0]["setting"] == 0.25
    assert again["comparisons"][0] == {
        "curve": "gate",
        "baseline": STATIC,
        "loops": 1.5,
        "difference": pytest.approx(-0.375),
        "interval": [pytest.approx(-0.375)] * 2,
    }
