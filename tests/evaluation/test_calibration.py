"""Fitting thresholds: targets, choices by hand, and a whole calibration against its own statements."""

import numpy as np
import pytest
import torch
from tiny import tiny_model, tokens

from looplm.evaluation.calibration import (
    Measured,
    Target,
    calibrate_rules,
    choose_by_depth,
    choose_by_loss,
    free_depth,
    parse_target,
)
from looplm.evaluation.costs import TokenCosts, measure_costs
from looplm.evaluation.depths import Depth
from looplm.evaluation.scoring import score
from looplm.evaluation.texts import TextWindows


def test_targets() -> None:
    assert parse_target("mean-loops=2.5", 4) == Target("mean-loops", 2.5)
    assert parse_target("loss-increase=0.5%", 4) == parse_target("loss-increase=0.005", 4)
    assert (
        str(parse_target("loss-increase=0.005", 4)) == "loss-increase=0.5%"
        and str(Target("mean-loops", 2)) == "mean-loops=2"
    )


@pytest.mark.parametrize(
    "written",
    [
        "",
        "mean-loops",
        "mean-loops=1",
        "mean-loops=4",
        "mean-loops=50%",
        "loss-increase=0",
        "loss=1%",
        "mean-loops=nan",
    ],
)
def test_other_targets_are_refused(written: str) -> None:
    with pytest.raises(
        ValueError, match=r"target is .*; give mean-loops=D with D between 1 and 4, or loss-increase=P%"
    ):
        parse_target(written, 4)


def tried(*points: tuple[float, float, float]) -> list[Measured]:
    """Settings with their depth and a loss that is the same in all of 400 windows but for a known noise."""
    noise = np.random.default_rng(0).normal(0, 0.01, 400)
    return [Measured(setting, loss + noise, depth) for setting, depth, loss in points]


def test_a_depth_lies_between_two_settings() -> None:
    runs = tried((0.8, 3.0, 3.0), (0.2, 1.0, 3.3))
    assert choose_by_depth(2.5, runs) == (pytest.approx(0.65), "")
    assert choose_by_depth(3.5, runs) == (None, "its settings reach 1.00 to 3.00 loops only")
    assert choose_by_depth(2.0, runs[:1]) == (None, "the rule does not tell positions apart")


def test_the_most_economical_setting_within_the_loss_is_chosen() -> None:
    """Full loss 3, 1 % allowed (.03): .02 above passes, .04 does not, and nothing behind it is looked at."""
    full = tried((1.0, 4.0, 3.0))[0]
    runs = tried((0.2, 1.5, 3.0), (0.9, 3.5, 3.001), (0.6, 2.5, 3.02), (0.4, 2.0, 3.04))
    assert choose_by_loss(0.01, runs, full, 0.1) == (0.6, "")
    setting, why = choose_by_loss(0.0001, runs, full, 0.1)
    assert setting is None and "no setting passes" in why


def test_costs_by_hand() -> None:
    """4 loops of 2 s, a head of 1 s and a rest of 1 s take 10 s; depth 2 takes 6 s, or 7 with a head a loop."""
    costs = TokenCosts(2.0, 1.0, 1.0, 4)
    assert (costs.time(4, 1), costs.saved(2, 1)) == (10.0, pytest.approx(0.4))
    assert costs.saved(2, 2) == pytest.approx(0.3) and costs.saved(4, 4) == pytest.approx(-0.3)
    assert costs.shares() == {"loop": 0.2, "head": 0.1, "rest": 0.1}


def test_costs_are_measured_and_add_up() -> None:
    costs = measure_costs(tiny_model().float(), [5, 6, 7])
    assert costs.loop > 0 and costs.head > 0 and costs.rest >= 0
    shares = costs.shares()
    assert 3 * shares["loop"] + shares["head"] + shares["rest"] == pytest.approx(1)
    with pytest.raises(ValueError, match="nothing to save"):
        measure_costs(tiny_model(total_ut_steps=1), [5])


WINDOWS = TextWindows("words", 12, {"a": [(row[:1], row[1:]) for row in tokens(48, 13, seed=4).tolist()]})


@pytest.fixture(scope="module")
def model():
    return tiny_model(total_ut_steps=4).float()


@pytest.fixture(scope="module", autouse=True)
def short():
    """Fewer turns and shorter texts of its own: what is measured stays the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("looplm.evaluation.costs.TURNS", 3)
        patch.setattr("looplm.evaluation.calibration.FREE_TOKENS", 8)
        yield


@pytest.fixture(scope="module")
def by_depth(model):
    return calibrate_rules(
        model, WINDOWS, Target("mean-loops", 2.5), ["q", "entropy"], settings=6, delta=0.1, batch_size=8
    )


def test_a_mean_depth_is_reached_on_the_text_it_was_fitted_on(model, by_depth) -> None:
    fit, test = WINDOWS.halves()
    for name, rule in by_depth.rules.items():
        assert rule.setting is not None
        depth = Depth.of_rule(f"{name}={rule.setting!r}", 4, "freeze", "adaptive")
        reached = float(score(model, fit.requests, [depth], batch_size=8).mean_read_depth[0])
        assert reached == pytest.approx(2.5, abs=0.15) and [reached, rule.setting] in rule.table
        told = score(model, test.requests, [depth, Depth(4)], batch_size=8)
        assert rule.depth == pytest.approx(float(told.mean_read_depth[0]))
        losses = -told.sums.sum(1) / (12 * len(test.requests))
        assert rule.increase == pytest.approx(float(losses[0] / losses[1]) - 1, abs=1e-6)
        assert rule.increase_nats == pytest.approx(float(losses[0] - losses[1]), abs=1e-5)
        assert rule.increase_interval[0] <= rule.increase <= rule.increase_interval[1]
        assert rule.free_depth == free_depth(model, test.requests, name, rule.setting, 0)
        assert 1 <= rule.free_depth <= 4
    assert by_depth.rules["q"].table[-1] == [4.0, 1.0] and by_depth.rules["entropy"].table[-1][0] < 4


def test_the_figure_has_every_setting_and_rings_the_choice(model, by_depth) -> None:
    fit = WINDOWS.halves()[0]
    full = -score(model, fit.requests, [Depth(4)], batch_size=8).sums[0] / 12
    for name, rule in by_depth.rules.items():
        assert [[p["loops"], p["setting"]] for p in rule.curve] == [row for row in rule.table if row != [4.0, 1.0]]
        point = rule.curve[0]
        depth = Depth.of_rule(f"{name}={point['setting']!r}", 4, "freeze", "adaptive")
        above = -score(model, fit.requests, [depth], batch_size=8).sums[0] / 12 - full
        assert point["above_full"] == pytest.approx(float(above.mean()), abs=1e-5)
        assert point["above_full_interval"][0] <= point["above_full"] <= point["above_full_interval"][1]
    drawn = by_depth.chart()
    gate = by_depth.rules["q"]
    assert f"calibrated for mean-loops=2.5: q={gate.setting:.3g}" in drawn and drawn.count('class="ring"') >= 1
    assert drawn.count('<circle class="point"') == 1 + sum(len(rule.curve) for rule in by_depth.rules.values())
    assert "full depth" in drawn and "entropy" in drawn


def test_free_running_depth_is_that_of_generation(model) -> None:
    test = WINDOWS.halves()[1].requests
    assert free_depth(model, test, "q", 1.0, 0) == 4.0
    assert free_depth(model, test, "q", 1e-9, 0) == 1.0


def test_a_loss_target_is_kept_or_nothing_is_chosen(model) -> None:
    """A random model is no better for its loops: an increase of half is easily kept, one of next to nothing is not."""
    wide, narrow = (
        calibrate_rules(model, WINDOWS, Target("loss-increase", share), ["q"], settings=6, delta=0.2, batch_size=8)
        for share in (0.9, 1e-6)
    )
    assert wide.rules["q"].setting is not None and wide.rules["q"].increase < 0.9
    chosen = narrow.rules["q"]
    assert chosen.setting is None or chosen.increase is not None
    assert "expected increase is within the target" in wide.tabulate().markdown()
    if chosen.setting is None:
        assert "none: no setting passes" in narrow.tabulate().markdown()


def test_a_blind_gate_is_told_not_fitted(model) -> None:
    blind = tiny_model(total_ut_steps=4).float()
    with torch.no_grad():
        blind.model.early_exit_gate.weight.zero_()
        blind.model.early_exit_gate.bias.fill_(-1e4)
    found = calibrate_rules(blind, WINDOWS, Target("mean-loops", 2.5), ["q"], settings=4, delta=0.1, batch_size=8)
    assert found.rules["q"].setting is None and "does not tell positions apart" in found.rules["q"].why


def test_too_few_windows_are_refused(model) -> None:
    few = TextWindows("words", 12, {"a": WINDOWS.requests[:38]})
    with pytest.raises(ValueError, match="19 windows of 12 tokens to calibrate on; it takes 20 or more"):
        calibrate_rules(model, few, Target("mean-loops", 2.5), ["q"], settings=4, delta=0.1, batch_size=8)
