"""Exit rules in the lab: oracles, thresholds and interpolation by hand and by brute force; rows against slow passes."""

import itertools
import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn.functional import cross_entropy

from looplm.exits import FixedDepth, QExit, StateDifference
from looplm.lab import frontier, training
from looplm.lab.frontier import (
    RULES,
    STAGE_ONE,
    Point,
    agreement,
    answered,
    at_budget,
    curves,
    fitted,
    hindsight,
    oracles,
    signals,
    thresholds,
)
from looplm.lab.settings import COMPARING, ORACLES, Rule, RunSettings
from looplm.lab.training import build_model, held_out, tensors
from looplm.training.frontier import STATIC, gate_of

SMALL = RunSettings(
    task="p-hop",
    task_settings={"levels": [1, 2], "test_levels": [1, 2], "symbols_a_row": 10},
    width=32,
    loops=3,
    steps=4,
    batch=8,
    objective="expected",
    evaluations=1,
    evaluation_items=24,
    frontier=[1.5, 2.0, 2.5],
)


# --- oracles ---


@pytest.mark.parametrize(
    ("answers", "target", "agreed", "first"),
    [
        ([5, 5, 5], 5, 1, 1),
        ([4, 5, 5], 5, 2, 2),
        ([5, 4, 5], 5, 3, 1),  # agrees at loop 1, but does not stay
        ([5, 4, 4], 5, 2, 1),  # the last loop forgets the right answer
        ([1, 2, 3], 9, 3, 3),  # never right: all loops
        ([1, 2, 2], -100, 2, 2),  # nothing is asked: agreement
        ([2, 9, 2], 9, 3, 2),
    ],
)
def test_oracles_by_hand(answers, target, agreed, first):
    row = torch.tensor([[answers]])
    assert agreement(row).tolist() == [[agreed]]
    assert hindsight(row, torch.tensor([[target]])).tolist() == [[first]]


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.int64, (7, 4), elements=st.integers(0, 2)), arrays(np.int64, 7, elements=st.sampled_from([-100, 0, 1]))
)
def test_oracles_equal_a_search(answers, targets):
    agreed = agreement(torch.from_numpy(answers)).tolist()
    first = hindsight(torch.from_numpy(answers), torch.from_numpy(targets)).tolist()
    for row, target, found, seen in zip(answers.tolist(), targets.tolist(), agreed, first, strict=True):
        stays = [t for t in range(1, 5) if all(answer == row[-1] for answer in row[t - 1 :])]
        right = [t for t in range(1, 5) if row[t - 1] == target]
        assert found == min(stays)
        assert seen == (min(stays) if target == -100 else min(right, default=4))


# --- thresholds and budgets ---


def test_thresholds_by_hand():
    # Positions stop where the signal is x or more: at 0.5 after loops 1 and 2, so 1.5 on average; at 0.8 after 3 and 2.
    signal = torch.tensor([[0.5, 0.7], [0.1, 0.8]])
    assert thresholds(signal, [1.5]) == pytest.approx([0.5])
    assert thresholds(signal, [1.0, 2.0, 2.5, 3.0]) == pytest.approx([0.1, 0.7, 0.8])


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, (9, 3), elements=st.floats(-4, 4, width=16)), st.floats(1, 4))
def test_thresholds_come_as_near_as_any(measure, depth):
    signal = torch.from_numpy(np.maximum.accumulate(measure, axis=1))

    def mean_depth(threshold):
        return float(np.mean([1 + sum(value < threshold for value in row) for row in signal.tolist()]))

    (found,) = thresholds(signal, [depth])
    reached = mean_depth(found)
    assert reached <= depth + 0.5 / 9 + 1e-9
    higher = [mean_depth(value) for value in signal.flatten().tolist() if value > found]
    assert not higher or min(higher) > depth - 1e-9 - 0.5 / 9


def test_budgets_by_hand():
    points = [Point(1.0, 1.0, 0.2, 3.0), Point(3.0, 2.0, 0.8, 1.0), Point(2.0, 1.5, 0.6, 1.5)]
    (graded,) = at_budget(points, 2.5)
    assert graded == {"over": "graded", "mean_loops": 2.5, "score": pytest.approx(0.7), "loss": pytest.approx(1.25)}
    graded, whole = at_budget(points, 1.25)
    assert (graded["score"], graded["loss"]) == pytest.approx((0.3, 2.625))
    assert (whole["over"], whole["score"], whole["loss"]) == ("all", pytest.approx(0.4), pytest.approx(2.25))
    assert list(at_budget(points, 3.5)) == []


_depths = st.integers(64, 256).map(lambda n: n / 64)  # apart: between neighbouring floats there is no line


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(_depths, st.floats(0, 1)), min_size=2, max_size=6, unique_by=lambda p: p[0]))
def test_budgets_lie_on_the_line_between_neighbours(given_points):
    points = [Point(depth, depth, score, -score) for depth, score in given_points]
    ordered = sorted(given_points)
    for (low, left), (high, right) in itertools.pairwise(ordered):
        for share in (0.0, 0.3, 1.0):
            row = next(iter(at_budget(points, low + share * (high - low))), None)
            if row is not None:  # rounding may leave the ends
                assert row["score"] == pytest.approx(left + share * (right - left), abs=1e-6)
                assert row["loss"] == pytest.approx(-row["score"], abs=1e-9)


# --- on a model ---


@pytest.fixture(scope="module")
def trained():
    """A model whose loops, gates and positions differ visibly, with its task and held-out items."""
    task = SMALL.make_task()
    model = build_model(SMALL, task)
    with torch.no_grad():
        model.model.early_exit_gate.weight.normal_(std=0.5)
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(3)
    return model.eval(), task, list(held_out(SMALL, task))


@torch.no_grad()
def test_points_are_those_of_one_freezing_pass_an_item(trained):
    model, task, items = trained
    for rule in (FixedDepth(2), QExit(0.5), StateDifference(3.0)):
        right, nats, depths, everywhere = [], [], [], []
        for batch, inputs in items:
            for row in range(len(batch["tokens"])):
                ids = inputs["input_ids"][row : row + 1]
                out = model(ids, exit_mode="freeze", exit_rule=rule)
                asked = int(np.flatnonzero(batch["answer"][row])[0])
                target = int(batch["targets"][row, asked])
                right.append(int(out.logits[0, asked].argmax()) == target)
                nats.append(float(cross_entropy(out.logits[0, asked], torch.tensor(target))))
                depths.append(int(out.exit_depths[0, asked]))
                everywhere += out.exit_depths[0].tolist()
        point = answered(model, task, items, [rule] * len(items))
        assert point == pytest.approx((np.mean(depths), np.mean(everywhere), np.mean(right), np.mean(nats)), abs=1e-5)


def test_positions_behind_the_last_target_cost_nothing(trained, monkeypatch):
    model, task, items = trained
    monkeypatch.setattr(model.config, "max_position_embeddings", 14)
    longer = []
    for batch, _ in items:
        wide = {name: np.pad(batch[name], ((0, 0), (0, 3))) for name in ("tokens", "answer")}
        wide |= {"targets": np.pad(batch["targets"], ((0, 0), (0, 3)), constant_values=-100)}
        wide["difficulty"] = batch["difficulty"]
        longer.append((wide, tensors(wide)))
    with torch.no_grad():
        rule = [QExit(0.5)] * len(items)
        assert answered(model, task, longer, rule) == pytest.approx(answered(model, task, items, rule), abs=1e-6)


@torch.no_grad()
def test_every_rule_stops_where_its_signal_reaches_the_threshold(trained):
    model, _, items = trained
    gates = {STAGE_ONE: gate_of(model)}
    found = signals(model, gates, items)
    assert set(found) == {STAGE_ONE, *RULES}
    for name, signal in found.items():
        assert bool((signal.diff(dim=1) >= 0).all()) and signal.shape == (24, 2)
        sign, rule_of = (1, QExit) if name == STAGE_ONE else RULES[name]
        finite = signal[signal.isfinite()].sort().values
        value = sign * float((finite[len(finite) // 2] + finite[len(finite) // 2 - 1]) / 2)  # between two of them
        depths = []
        for batch, inputs in items:
            out = model(inputs["input_ids"], exit_mode="select", exit_rule=rule_of(value))
            depths += out.exit_depths.numpy()[batch["answer"]].tolist()
        expected = 1 + (signal < sign * value).sum(1)
        assert depths == expected.tolist()
        assert name not in COMPARING or min(depths) == 2


def test_stage_two_gives_two_more_gates_and_leaves_the_model_its_own(trained, monkeypatch, capsys):
    model, task, _ = trained
    monkeypatch.setattr(frontier, "FIT", frontier.FIT.model_copy(update={"tokens": 100, "epochs": 2}))
    own = gate_of(model)
    fitting = (tensors(task.batch(0, n, 8)) for n in range(99))
    gates = fitted(model, fitting, 0)
    assert list(gates) == [STAGE_ONE, "Stage II published", "Stage II lookahead"]
    assert all(torch.equal(value, own[name]) for name, value in gate_of(model).items())
    weights = [gate["weight"].tolist() for gate in gates.values()]
    assert weights[0] != weights[1] != weights[2] != weights[0]
    assert capsys.readouterr().err == ""  # no progress of its own


def test_rows_of_a_run(monkeypatch):
    monkeypatch.setattr(training, "compile_layers", lambda model, setting: None)
    monkeypatch.setattr(frontier, "FIT", frontier.FIT.model_copy(update={"tokens": 100, "epochs": 2}))
    rows = training.run(SMALL)
    plain, ruled = [row for row in rows if "rule" not in row], [row for row in rows if "rule" in row]
    assert {row["rule"] for row in ruled} == set(get_args(Rule))
    for name in get_args(Rule):
        of_rule = [row for row in ruled if row["rule"] == name]
        budgets = [row["mean_loops"] for row in of_rule if row["over"] == "graded"]
        whole = [1.5, 2.0, 2.5] if name not in COMPARING else [2.0, 2.5]
        assert len(budgets) == 1 if name in ORACLES else budgets == whole
        assert all(row["items"] == 24 and row["step"] == 4 and 1 <= row["mean_loops"] <= 3 for row in of_rule)
        assert all(0 <= row["score"] <= 1 and math.isfinite(row["loss"]) for row in of_rule)
    full = [row for row in plain if row["loop"] == 2]
    mean = sum(row["loss"] * row["items"] for row in full) / sum(row["items"] for row in full)
    (static,) = [r for r in ruled if r["rule"] == STATIC and r["mean_loops"] == 2.0 and r["over"] == "graded"]
    assert static["loss"] == pytest.approx(mean, abs=1e-5)
    # the frontier is measured behind the training and changes none of it
    assert [row["loss"] for row in training.run(SMALL.changed(frontier=None))] == [row["loss"] for row in plain]


@torch.no_grad()
def test_ends_of_a_curve_are_fixed_depths(trained):
    model, task, items = trained
    found = curves(model, 3, task, {STAGE_ONE: gate_of(model)}, items)
    fixed = found[STATIC]
    assert [point.graded for point in fixed] == [1, 2, 3] == [point.all for point in fixed]
    for name, points in found.items():
        assert points[0] == fixed[int(name in COMPARING)] and points[-1] == fixed[-1]
        assert name == STATIC or len(points) > 2


@torch.no_grad()
def test_oracles_are_replayed_under_freezing(trained):
    model, task, items = trained
    found = oracles(model, items)
    assert tuple(found) == ORACLES
    answers = []
    for batch, inputs in items:
        states = model(inputs["input_ids"], output_hidden_states=True).hidden_states[1:]
        per_loop = np.stack([model.lm_head(state).argmax(-1).numpy() for state in states], axis=-1)
        answers.append(per_loop[batch["answer"]])
    by_loop = np.concatenate(answers)
    depth = np.mean([min(t for t in (1, 2, 3) if all(row[t - 1 :] == row[-1])) for row in by_loop])
    assert answered(model, task, items, found["agreement oracle"]).graded == pytest.approx(depth)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": "last"}, "frontier compares gates, but objective 'last' at 3 loops trains none"),
        ({"loops": 1}, "use 'expected' and 2 loops or more"),
        ({"frontier": [2.0, 3.5]}, r"mean loops must lie in 1..3"),
    ],
)
def test_a_frontier_needs_a_gate_and_budgets_within_reach(changes, said):
    with pytest.raises(ValueError, match=said):
        SMALL.changed(**changes)


def test_settings_without_a_frontier_keep_their_key():
    assert "frontier" not in SMALL.changed(frontier=None).canonical()
    assert SMALL.changed(frontier=[2.0]).key != SMALL.changed(frontier=None).key
