"""Claims: the rules that a file of claims cannot get round, and how numbers are read from runs."""

import math

import pytest
import yaml

from looplm.lab.claims import best_rates, load_claims, missing_runs
from looplm.lab.readings import Reading, Side, value_of
from looplm.lab.settings import flops
from looplm.lab.statistics import p_greater
from tests.lab.ledgers import SEEDS, claim, results, rows


def test_the_shipped_claims_keep_the_rules():
    claims = {made.name: made for made in load_claims()}
    assert {"multi-hop", "p-hop", "addition", "mano", "capo", "reachability", "gate-collapse", "depth"} <= set(claims)
    for made in claims.values():
        assert (made.waiting is None) == bool(made.contrasts)
        if made.waiting is None:  # enough seeds to hold against the correction over the whole ledger
            assert len(claims) * p_greater([1.0] * len(made.seeds)) <= 0.05
        arms = made.runs() if made.waiting is None else {}
        has_wide = any(arm.endswith(" wide") for arm, _ in arms)
        assert has_wide or not made.matched
        if has_wide:  # of equal FLOPs
            looped = made.settings
            name = f"{looped['layers']}⊗{looped['loops']}"
            condition = next(iter(made.conditions))
            full = flops(arms[name, condition]) * arms[name, condition].steps
            wide = arms[f"{looped['layers']}⊗1 wide", condition]
            assert flops(wide) * wide.steps == pytest.approx(full, rel=0.02)
    assert any(made.quick for made in claims.values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": {"two": {"loops": 2, "batch": 9}, "one": {}}}, "arm 'two' changes batch"),
        ({"arms": {"two": {"objective": "mean"}, "one": {}}}, "arm 'two' changes objective, which is not under varies"),
        ({"varies": ["task_settings"]}, "varies names task_settings, by which arms are paired"),
        ({"seeds": [0, *SEEDS[:5]]}, "seeds must differ, from sweep_seed 0 as well"),
        ({"seeds": SEEDS[:4]}, "at least 5 seeds"),
        ({"seeds": [*SEEDS[:5], 101]}, "seeds must differ"),
        ({"learning_rates": []}, "learning_rates"),
        ({"contrasts": []}, "needs contrasts"),
        ({"contrasts": [{"left": {"arm": "two"}, "right": {"arm": "three"}, "margin": 0}]}, "no arm 'three'"),
        (
            {"contrasts": [{"left": {"arm": "two"}, "right": {"arm": "one"}, "kind": "equal", "margin": 0}]},
            "needs a margin above 0",
        ),
        ({"testable": {"arm": "one", "condition": "hard", "at_least": 0.5}}, "under condition 'hard'"),
        ({"reading": {"loop": 2}}, "loop 2 of 'one' is not scored, only 1"),
        ({"reading": {"step": 11}}, "'two' is read at step 11 of 10"),
        ({"settings": {"task": "p-hop", "loop": 1}}, "unknown key 'loop'"),
        ({"matched": True}, "matched arms are those of a looped model"),
    ],
)
def test_claims_that_break_a_rule_are_refused_in_a_line(changes, said):
    with pytest.raises(ValueError, match=said) as error:
        claim(**changes)
    assert "\n" not in str(error.value)


def test_a_sweep_is_judged_by_the_reading_of_the_claim_which_every_arm_must_have():
    sides = {"left": {"arm": "two"}, "right": {"arm": "one", "loop": 1}, "margin": 0.1}
    changes = {"reading": {"loop": 2, "step": 11}, "settings": {"task": "p-hop", "steps": 20}, "contrasts": [sides]}
    assert claim(**changes).sweep() == {}
    with pytest.raises(ValueError, match="learning_rates cannot be judged: loop 2 of 'one' is not scored, only 1"):
        claim(**changes, learning_rates=[0.003, 0.006])
    arms = {"two": {"loops": 2}, "one": {}, "brief": {"loops": 2, "steps": 10}}  # read at its end, and only there
    swept = claim(**{**changes, "reading": {"step": 11}, "arms": arms}, learning_rates=[0.003, 0.006])
    assert swept.of_sweep.step is None and len(swept.sweep()["brief"]) == 2


def test_two_claims_need_two_names(tmp_path):
    made = claim().model_dump(exclude={"waiting", "testable"})
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump({"claims": [made, made]}))
    with pytest.raises(ValueError, match="two claims are called 'made-up'"):
        load_claims(path)
    with pytest.raises(ValueError, match="no such file of claims"):
        load_claims(tmp_path / "none.yaml")


def test_numbers_are_read_as_the_side_says():
    made = claim()
    settings = made.reported({"two": 0.003, "one": 0.003})["two", ""][0]
    table = [
        *rows(settings, 0.2, step=5, loop=1, difficulty=1, items=10),
        *rows(settings, 0.4, step=10, loop=1, difficulty=1, items=10),
        *rows(settings, 0.5, step=10, loop=2, difficulty=1, items=10),
        *rows(settings, 0.9, step=10, loop=2, difficulty=2, items=30, exit_probability=None),
    ]
    assert value_of(table, Reading()) == pytest.approx((10 * 0.5 + 30 * 0.9) / 40)
    assert value_of(table, Reading(difficulty=2)) == 0.9
    assert value_of(table, Reading(loop=1)) == 0.4
    assert value_of(table, Reading(loop=1, step=3)) == 0.2
    assert value_of(table, Reading(difficulty=2), Side(arm="two", difficulty=1)) == 0.5
    assert value_of(table, Reading(), Side(arm="two", measure="loss", loop=1, step=1)) == pytest.approx(0.8)
    with pytest.raises(ValueError, match="no score at loop 3"):
        value_of(table, Reading(loop=3))
    with pytest.raises(ValueError, match="no exit_probability"):
        value_of(table, Reading(measure="exit_probability", difficulty=2))


def ruled(**changes):
    settings = {"task": "p-hop", "steps": 10, "loops": 3, "objective": "expected", "frontier": [1.5, 2.0]}
    return claim(**{"settings": settings, "arms": {"two": {}, "one": {"layers": 2}}, **changes})


def test_exit_rules_are_read_at_a_budget_and_an_oracle_at_its_own():
    settings = ruled().reported({"two": 0.003, "one": 0.003})["two", ""][0]
    same = {"loop": None, "difficulty": None, "exit_probability": None}
    table = [
        *rows(settings, 0.5),
        *rows(settings, 0.6, rule="entropy", over="graded", mean_loops=2.0, **same),
        *rows(settings, 0.7, rule="entropy", over="all", mean_loops=2.0, **same),
        *rows(settings, 0.8, rule="entropy", over="graded", mean_loops=2.5, **same),
        *rows(settings, 0.9, rule="agreement oracle", over="graded", mean_loops=2.2, **same),
    ]
    assert value_of(table, Reading()) == 0.5  # fixed loops are read as ever
    assert value_of(table, Reading(rule="entropy", mean_loops=2.0)) == 0.6
    assert value_of(table, Reading(), Side(arm="two", rule="entropy", mean_loops=2.0, over="all")) == 0.7
    assert value_of(table, Reading(rule="agreement oracle")) == 0.9
    assert value_of(table, Reading(rule="agreement oracle", measure="mean_loops")) == 2.2
    with pytest.raises(ValueError, match=r"no score at rule entropy, step 10, over graded, mean_loops 3.0"):
        value_of(table, Reading(rule="entropy", mean_loops=3.0))


@pytest.mark.parametrize(
    ("reading", "said"),
    [
        ({"rule": "entropy", "mean_loops": 2.0}, None),
        ({"rule": "hindsight oracle", "measure": "mean_loops"}, None),
        ({"mean_loops": 2.0}, "no rule is named"),
        ({"measure": "mean_loops"}, "no rule is named"),
        ({"rule": "entropy"}, "mean_loops is missing"),
        ({"rule": "entropy", "mean_loops": 2.5}, r"frontier has \[1.5, 2.0\]"),
        ({"rule": "agreement oracle", "mean_loops": 2.0}, "an oracle has no budget"),
        ({"rule": "state difference", "mean_loops": 1.5}, "no such rule stops before loop 2"),
        ({"rule": "entropy", "mean_loops": 2.0, "difficulty": 1}, "read at the end, over all levels"),
        ({"rule": "entropy", "mean_loops": 2.0, "measure": "exit_probability"}, "read at the end, over all levels"),
    ],
)
def test_rules_are_read_where_they_are_scored(reading, said):
    if said is None:
        ruled(reading=reading)
        return
    with pytest.raises(ValueError, match=said):
        ruled(reading=reading)


def test_rules_need_a_frontier():
    with pytest.raises(ValueError, match="the settings have no frontier"):
        claim(reading={"rule": "entropy", "mean_loops": 2.0})


def test_a_run_that_diverged_before_it_was_scored_has_no_number():
    made = claim(settings={"task": "p-hop", "steps": 10}, reading={"step": 7})
    settings = made.reported({"two": 0.003, "one": 0.003})["two", ""][0]
    assert math.isnan(value_of(rows(settings, 0.2, step=5, diverged=True), made.reading))
    with pytest.raises(ValueError, match="no score"):
        value_of(rows(settings, 0.2, step=5), made.reading)


def test_a_rate_that_diverged_is_never_chosen():
    made = claim(learning_rates=[0.001, 0.003], reading={"measure": "loss"})
    for lost in (0, 1):
        scores = [0.4, 0.4]
        scores[lost] = math.nan
        found = {
            run.key: rows(run, score) for runs in made.sweep().values() for run, score in zip(runs, scores, strict=True)
        }
        assert set(best_rates(made, found).values()) == {(0.003, 0.001)[lost]}


def test_every_arm_is_swept_alike_and_on_items_and_a_seed_that_are_not_reported():
    made = claim(learning_rates=[0.001, 0.003])
    swept = made.sweep()
    assert {arm: [run.learning_rate for run in runs] for arm, runs in swept.items()} == {
        "two": [0.001, 0.003],
        "one": [0.001, 0.003],
    }
    assert all(run.split == "validation" and run.seed == 0 for runs in swept.values() for run in runs)
    assert best_rates(made, {}) is None
    assert {run.key for run in missing_runs(made, {})} == {run.key for runs in swept.values() for run in runs}

    found = {run.key: rows(run, score) for run, score in zip(swept["two"], (0.4, 0.6), strict=True)}
    found |= {run.key: rows(run, 0.5) for run in swept["one"]}
    assert best_rates(made, found) == {"two": 0.003, "one": 0.001}  # of equals the lower
    wanted = list(missing_runs(made, found))
    assert len(wanted) == 16 and {run.seed for run in wanted} == set(SEEDS)
    assert {(run.loops, run.learning_rate) for run in wanted} == {(2, 0.003), (1, 0.001)}
    assert {run.split for run in wanted} == {"test"}


def test_the_best_rate_of_a_loss_is_the_one_with_the_lowest():
    made = claim(learning_rates=[0.001, 0.003], reading={"measure": "loss"})
    found = {
        run.key: rows(run, score) for runs in made.sweep().values() for run, score in zip(runs, (0.4, 0.6), strict=True)
    }
    assert best_rates(made, found) == {"two": 0.003, "one": 0.003}


def test_what_is_done_is_not_missing():
    made = claim()
    done = results(made, {"two": [0.9] * 8, "one": [0.1] * 7})
    (left,) = missing_runs(made, done)
    assert (left.loops, left.seed) == (1, 108)


def test_the_reduced_ledger_takes_three_seeds_and_the_middle_rate():
    short = claim(learning_rates=[0.001, 0.01, 0.003]).shortened()
    assert short.seeds == SEEDS[:3] and short.learning_rates == [0.003] and short.sweep() == {}


def test_the_reduced_ledger_takes_the_first_condition():
    conditions = {"short": {"symbols_a_row": 16}, "long": {"symbols_a_row": 24}}
    contrasts = [
        {"left": {"arm": "two", "condition": left}, "right": {"arm": "one", "condition": right}, "margin": 0.1}
        for left, right in (("short", "short"), ("short", "long"), ("long", "long"))
    ]
    short = claim(conditions=conditions, contrasts=contrasts, quick=True).shortened()
    assert set(short.runs()) == {("two", "short"), ("one", "short")}
    assert [contrast.label for contrast in short.contrasts] == ["two (short) > one (short)"]
    with pytest.raises(ValueError, match="quick needs a contrast under the first condition"):
        claim(conditions=conditions, contrasts=contrasts[1:], quick=True)
