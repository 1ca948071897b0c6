"""The frontier's points against one plain or freezing pass a text, its costs by hand, and items."""

import json
import re
from functools import partial

import pytest
import torch
from tiny import tiny_model, tokens

from looplm.evaluation.depths import parse_rule
from looplm.evaluation.exit_frontier import (
    SAVES_NOTHING,
    UNTRAINED,
    earlier_gate,
    item_frontier,
    read_curves,
    text_frontier,
)
from looplm.evaluation.frontier_tables import flops_chart, shown
from looplm.evaluation.items import Item
from looplm.exits import FixedDepth
from looplm.training.frontier import STATIC, gate_of
from looplm.training.planning import token_flops

LOOPS, LENGTH, TEXTS = 4, 16, 6
KEYS = (LENGTH + 1) / 2


@pytest.fixture(scope="module")
def model():
    return tiny_model(total_ut_steps=LOOPS)


@pytest.fixture(scope="module")
def rows():
    return tokens(TEXTS, LENGTH + 1, seed=5)


@pytest.fixture(scope="module")
def found(model, rows):
    untrained = {name: -value for name, value in gate_of(model).items()}
    requests = [(row[:1], row[1:]) for row in rows.tolist()]
    read = read_curves(model, requests, ["q", "difference", "max_probability"], untrained, settings=3, batch_size=4)
    return read, text_frontier(read, model.config, KEYS, seed=0)


@torch.no_grad()
def slow(model, rows, rule, mode):
    """Mean loss, mean loops, mean loops that were run, and share right, one pass a text."""
    nats, loops, right = 0.0, 0, 0
    for row in rows:
        out = model(row[None, :-1], exit_rule=rule, exit_mode=mode)
        log_p = out.logits[0].log_softmax(-1)
        nats -= float(log_p.gather(1, row[1:, None]).sum())
        loops, right = loops + int(out.exit_depths.sum()), right + int((log_p.argmax(-1) == row[1:]).sum())
    return nats / (TEXTS * LENGTH), loops / (TEXTS * LENGTH), right / (TEXTS * LENGTH)


def test_static_points_are_those_of_plain_passes(model, rows, found) -> None:
    points = found[1]["curves"][STATIC]
    assert [point["setting"] for point in points] == [1, 2, 3, 4]
    for loop, point in enumerate(points, start=1):
        loss, depth, right = slow(model, rows, FixedDepth(loop), "select")
        assert (point["loss"], point["loops"], point["right"]) == pytest.approx((loss, depth, right), abs=1e-9)
        assert point["processed_loops"] == loop


@pytest.mark.parametrize("rule", ["q", "difference", "max_probability"])
@pytest.mark.parametrize("mode", ["freeze", "select"])
def test_points_of_rules_are_those_of_their_own_passes(model, rows, found, rule, mode) -> None:
    points = found[1]["curves"][rule if mode == "freeze" else f"{rule}, {SAVES_NOTHING}"]
    assert len(points) >= 2
    for point in points:
        loss, depth, right = slow(model, rows, parse_rule(f"{rule}={point['setting']!r}"), mode)
        assert (point["loss"], point["loops"], point["right"]) == pytest.approx((loss, depth, right), abs=1e-9)
        assert point["processed_loops"] == (pytest.approx(depth) if mode == "freeze" else LOOPS)


def test_the_untrained_gate_is_a_curve_and_the_own_one_comes_back(model, rows, found) -> None:
    points = found[1]["curves"][UNTRAINED]
    other = tiny_model(total_ut_steps=LOOPS)
    with torch.no_grad():
        for parameter in other.model.early_exit_gate.parameters():
            parameter.neg_()
    for point in points:
        loss, depth, _ = slow(other, rows, parse_rule(f"q={point['setting']!r}"), "freeze")
        assert (point["loss"], point["loops"]) == pytest.approx((loss, depth), abs=1e-9)
    assert all(
        bool((value == gate_of(tiny_model(total_ut_steps=LOOPS))[name]).all()) for name, value in gate_of(model).items()
    )


def test_costs_by_hand(model, found) -> None:
    """The tiny model: D 32, 4 heads of 8, MLP 48, V 64, 2 layers. A loop: 2 x (4 x 32 x 32 + 3 x 32 x 48) = 17,408
    weights and 2 layers of 4 x 32 x 8.5 attention FLOPs; a read-out 32 x 64 = 2,048 weights."""
    loop, read = 2 * 17_408 + 2 * 4 * 32 * 8.5, 2 * 2_048
    assert token_flops(model.config, 3, 1, KEYS) == 3 * loop + read
    curves = found[1]["curves"]
    static = curves[STATIC]
    assert [point["flops"] for point in static] == [t * loop + read for t in (1, 2, 3, 4)]
    for point in curves["difference"]:  # one read-out a position, at its exit
        assert point["flops"] == pytest.approx(point["loops"] * loop + read)
    for point in curves["max_probability"]:  # and one after every loop
        assert point["flops"] == pytest.approx(point["loops"] * (loop + read))
    for point in curves[f"max_probability, {SAVES_NOTHING}"]:
        assert point["flops_share"] == pytest.approx(4 * (loop + read) / (4 * loop + read))


def test_only_what_freezes_is_compared(found) -> None:
    compared = {row["curve"] for row in found[1]["comparisons"]}
    assert compared <= {"q", "difference", "max_probability", UNTRAINED} and "q" in compared


@torch.no_grad()
def test_oracles_are_those_of_every_loops_prediction(model, rows, found) -> None:
    agreed, right, depths, losses = [], [], [], []
    for row in rows:
        logits = torch.stack([model(row[None, :-1], exit_at_step=t).logits[0] for t in range(LOOPS)])
        guesses = logits.argmax(-1)
        for place in range(LENGTH):
            said = guesses[:, place].tolist()
            stay = next(t for t in range(LOOPS) if len(set(said[t:])) == 1)
            hit = [guess == int(row[place + 1]) for guess in said]
            agreed.append(stay + 1)
            losses.append(-float(logits[stay, place].log_softmax(-1)[row[place + 1]]))
            depths.append(hit.index(True) + 1 if any(hit) else 1)
            right.append(any(hit))
    agreement, hindsight = found[1]["oracles"]
    count = len(agreed)
    assert agreement["loops"] == pytest.approx(sum(agreed) / count)
    assert agreement["loss"] == pytest.approx(sum(losses) / count)
    assert (hindsight["loops"], hindsight["right"]) == pytest.approx((sum(depths) / count, sum(right) / count))
    assert hindsight["right"] >= max(point["right"] for point in found[1]["curves"][STATIC])


def test_an_earlier_gate_has_to_be_of_this_model() -> None:
    model, same, other = (tiny_model(seed, total_ut_steps=LOOPS) for seed in (0, 0, 1))
    with torch.no_grad():
        same.model.early_exit_gate.bias.fill_(3.0)
    assert float(earlier_gate(model, same, "earlier")["bias"]) == 3.0
    with pytest.raises(ValueError, match=r"other is not an earlier stage of this model: model\.\S+ differs"):
        earlier_gate(model, other, "other")


def items(number: int) -> list[Item]:
    return [Item(str(n), "?", ("a", "b", "c"), n % 3, None) for n in range(number)]


@pytest.fixture(scope="module")
def answered(model):
    draws = tokens(24, 12, seed=9).tolist()
    requests = [(row[:9], [choice]) for row in draws for choice in row[9:]]
    read = read_curves(model, requests, ["q", "max_probability"], None, settings=3, batch_size=8)
    return draws, read, item_frontier(read, items(24), model.config, keys=5.0)


@torch.no_grad()
def test_accuracy_is_that_of_one_pass_an_item(model, answered) -> None:
    draws, _, found = answered
    run = partial(model, exit_mode="freeze")
    for curve, points in found["curves"].items():
        if curve.endswith(SAVES_NOTHING):
            continue
        for point in points:
            rule = FixedDepth(int(point["setting"])) if curve == STATIC else parse_rule(f"{curve}={point['setting']!r}")
            outs = [run(torch.tensor([row[:9]]), exit_rule=rule) for row in draws]
            hits = [
                int(out.logits[0, -1, row[9:]].argmax()) == n % 3
                for n, (out, row) in enumerate(zip(outs, draws, strict=True))
            ]
            assert point["accuracy"] == pytest.approx(sum(hits) / 24)
            assert point["loops"] == pytest.approx(sum(int(out.exit_depths[0, -1]) for out in outs) / 24)
            assert point["processed_loops"] == pytest.approx(sum(int(out.exit_depths.sum()) for out in outs) / (24 * 9))
            assert point["accuracy_interval"][0] < point["accuracy"] < point["accuracy_interval"][1] or point[
                "accuracy"
            ] in (0, 1)


def test_prompts_pay_loops_but_no_read_outs(model, answered) -> None:
    """Nine positions are run for one that is read: a static depth pays a ninth of a read-out each position."""
    _, read, found = answered
    positions = sum(scored.positions for scored in read.scores.requests)
    assert positions == 24 * 3 * 9
    assert found["curves"][STATIC][0]["flops"] == pytest.approx(token_flops(model.config, 1, 1 / 9, 5.0))
    for point in found["curves"]["max_probability"]:
        expected = token_flops(model.config, point["processed_loops"], point["processed_loops"], 5.0)
        assert point["flops"] == pytest.approx(expected)


def test_too_few_items_carry_no_interval(model, answered) -> None:
    with pytest.raises(ValueError, match="19 items; an interval needs 20 or more"):
        item_frontier(answered[1], items(19), model.config, 5.0)


def test_figures_against_flops_are_in_loops_of_a_full_pass(answered) -> None:
    """Four static depths: a circle stands at 4 times its share of the full FLOPs, 1 at x = 46 and 4 at 372."""
    drawn = flops_chart(answered[2], "accuracy", "share")
    circles = [float(x) for x in re.findall(r'<circle class="point" cx="([0-9.]+)"', drawn)]
    shares = [point["flops_share"] for point in answered[2]["curves"][STATIC]]
    assert circles[:4] == pytest.approx([46 + (4 * part - 1) / 3 * 326 for part in shares], abs=0.06)


def test_what_is_shown_holds_every_point(found, answered) -> None:
    values = {"text": {**found[1], "name": "words"}, "items": {**answered[2], "name": "questions"}}
    json.dumps(values)
    tables, figures = shown(values)
    assert len(tables) == 3 and len(figures) == 4
    for part, count in (("text", 2), ("items", 1)):
        alone = shown({part: values[part]})
        assert len(alone[0]) == count and len(alone[1]) == 2 and set(alone[1]) < set(figures)
    text = tables[0].markdown()
    assert text.count(SAVES_NOTHING) == sum(len(p) for c, p in found[1]["curves"].items() if c.endswith(SAVES_NOTHING))
    assert "oracle: agreement" in text and "oracle: hindsight" in text
    assert all(SAVES_NOTHING not in chart for chart in figures.values())
