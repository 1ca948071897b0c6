"""A run: what it writes down, what it depends on, and scores against a slow reference."""

import math

import numpy as np
import pytest
import torch

from looplm.lab import training
from looplm.lab.settings import RunSettings, flops
from looplm.lab.training import Curriculum, build_model, level_score, run, tensors

SMALL = RunSettings(
    task="p-hop",
    task_settings={"levels": [1, 2], "test_levels": [1, 2], "symbols_a_row": 10},
    width=32,
    loops=2,
    steps=6,
    batch=8,
    evaluations=2,
    evaluation_items=16,
    evaluation_loops=3,
)


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    monkeypatch.setattr(training, "compile_layers", lambda model, setting: None)


def test_a_run_scores_every_loop_and_level_at_every_evaluation():
    told: list[int] = []
    rows = run(SMALL.changed(steps=20), told.append)
    assert {(row["step"], row["loop"], row["difficulty"]) for row in rows} == {
        (step, loop, level) for step in (10, 20) for loop in (1, 2, 3) for level in (1, 2)
    }
    assert told == [10, 20]
    for row in rows:
        assert 0 <= row["score"] <= 1 and row["loss"] > 0 and not row["diverged"]
        assert (row["exit_probability"] is None) == (row["loop"] == 3)
        assert row["flops"] == pytest.approx(3 * row["step"] * 8 * 11 * flops(SMALL))
    for step in (10, 20):
        mass = [row["exit_probability"] for row in rows if row["step"] == step and row["loop"] < 3]
        assert sum(mass) == pytest.approx(2, abs=1e-5)  # two levels, each a distribution


def test_the_same_settings_give_the_same_rows_and_other_seeds_others():
    def scores(seed):
        return [row["loss"] for row in run(SMALL.changed(seed=seed))]

    assert scores(1) == scores(1)
    assert scores(1) != scores(2)


def test_scores_equal_those_of_a_plain_loop_over_items():
    settings = SMALL.changed(evaluation_items=8)
    task = settings.make_task()
    model = build_model(settings, task)
    rows = list(training.evaluate(model, settings, task))
    batch = task.batch(settings.seed, 0, 8, "test")
    for loop in (1, 2, 3):
        for level in (1, 2):
            right, losses = [], []
            for item in np.flatnonzero(batch["difficulty"] == level):
                tokens = torch.from_numpy(batch["tokens"][item : item + 1])
                logits = model(tokens, num_loop_steps=loop).logits[0].detach()
                asked = np.flatnonzero(batch["answer"][item])
                targets = torch.from_numpy(batch["targets"][item, asked])
                right.append(bool((logits[asked].argmax(-1) == targets).all()))
                losses.append(torch.nn.functional.cross_entropy(logits[asked], targets).item())
            (row,) = [row for row in rows if row["loop"] == loop and row["difficulty"] == level]
            assert row["items"] == len(right) and row["score"] == pytest.approx(np.mean(right))
            assert row["loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_arms_see_the_same_items_in_the_same_order(monkeypatch):
    seen: list[bytes] = []
    inner = training.accumulate

    def watch(model, batches, *rest, **named):
        seen.append(batches[0]["input_ids"].numpy().tobytes())
        return inner(model, batches, *rest, **named)

    monkeypatch.setattr(training, "accumulate", watch)
    run(SMALL)
    run(SMALL.changed(loops=1, evaluation_loops=1, steps=9))
    looped, longer = seen[:6], seen[6:]
    assert longer[:6] == looped and len(set(longer)) == 9


def test_targets_stand_where_they_are_predicted():
    batch = SMALL.make_task().batch(0, 0, 4)
    named = tensors(batch)
    assert named["labels"].tolist() == batch["targets"].tolist()
    assert named["position_ids"].tolist() == [list(range(11))] * 4


def never(level):
    raise AssertionError("nobody asked how well a level is answered")


def test_the_curriculum_lets_levels_in_one_by_one():
    task = SMALL.make_task()
    curriculum = Curriculum(SMALL.changed(curriculum=3), task)
    assert [curriculum.hardest(step, never) for step in range(8)] == [1, 1, 1, 2, 2, 2, 2, 2]
    assert Curriculum(SMALL, task).hardest(0, never) is None


def test_the_curriculum_waits_until_a_level_is_solved():
    task = SMALL.changed(task_settings={"levels": [1, 2, 3]}).make_task()
    curriculum, asked = Curriculum(SMALL.changed(curriculum=2, curriculum_score=0.9), task), []
    scores = iter([0.5, 0.9, 0.89, 1.0])

    def score(level):
        asked.append(level)
        return next(scores)

    found = [curriculum.hardest(step, score) for step in range(12)]
    assert found == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3] and asked == [1, 1, 2, 2]  # the last one is not asked about
    with pytest.raises(ValueError, match=r"curriculum_score is 0.9, but curriculum, the steps, is missing"):
        SMALL.changed(curriculum_score=0.9)


def test_a_level_is_scored_on_its_own_validation_items():
    settings = SMALL.changed(split="validation", evaluation_items=training.LOOKED_AT)
    task = settings.make_task()
    model = build_model(settings, task)
    last = {row["difficulty"]: row["score"] for row in training.evaluate(model, settings, task) if row["loop"] == 2}
    assert level_score(model, settings, task, 2) == pytest.approx(last[2])


def test_a_run_grows_with_what_it_has_solved(monkeypatch):
    seen = []
    inner = training.accumulate

    def watch(model, batches, *rest, **named):
        seen.append(int(batches[0]["input_ids"][:, 0].max()))  # the first token tells the hops
        return inner(model, batches, *rest, **named)

    monkeypatch.setattr(training, "accumulate", watch)
    easy = SMALL.changed(curriculum=2, curriculum_score=0.9)
    monkeypatch.setattr(training, "level_score", lambda *given: 0.0)
    run(easy)
    assert len(set(seen)) == 1
    monkeypatch.setattr(training, "level_score", lambda *given: 1.0)
    run(easy)
    assert set(seen[6:8]) == set(seen[:6]) and max(seen[8:]) == seen[0] + 1


def test_a_run_that_diverges_ends_and_says_so(monkeypatch):
    inner, steps = training.accumulate, []

    def spoilt(*given, **named):
        steps.append(1)
        values = inner(*given, **named)
        return values if len(steps) < 3 else type(values)(**{**vars(values), "loss": math.nan})

    monkeypatch.setattr(training, "accumulate", spoilt)
    rows = run(SMALL.changed(evaluations=1))
    assert len(steps) == 3 and {row["step"] for row in rows} == {3}
    assert all(row["diverged"] and math.isfinite(row["loss"]) for row in rows)


def test_capo_is_counted_in_bits_a_parameter():
    settings = RunSettings(
        task="capo", task_settings={"people": 20}, width=32, steps=1, batch=10, evaluations=1, evaluation_items=20
    )
    (row,) = run(settings)
    task = settings.make_task()
    # An untrained model of V words knows at best nothing: bits = N (log2 N_0 + log2 S_0 - losses / ln 2) is negative.
    assert row["bits_per_parameter"] * row["parameters"] < 20 * 3
    model = build_model(settings, task)
    batch = task.batch(0, 0, 10, "test")
    named = tensors(batch)
    losses = model(named["input_ids"], shift_labels=named["labels"], skip_logits=True).token_losses[..., 0].numpy()
    names, rest = (losses * batch["names"]).sum() / 10, (losses * batch["answer"]).sum() / 10
    (first,) = training.evaluate(model, settings.changed(evaluation_items=10), task)
    assert first["bits_per_parameter"] == pytest.approx(task.bits(names, rest) / row["parameters"], rel=1e-5)


def test_drawn_loops_are_counted_as_they_come():
    settings = SMALL.changed(loop_counts={"distribution": "uniform", "least": 1, "most": 2}, steps=30, evaluations=1)
    spent = run(settings)[0]["flops"]
    one, two = (3 * 30 * 8 * 11 * flops(SMALL, loops) for loops in (1, 2))
    assert one < spent < two
