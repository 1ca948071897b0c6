"""Settings of runs, the arms a looped model is compared with, and grids."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.lab.settings import Grid, RunSettings, flops, load_grid, matched


def test_flops_by_hand():
    # p-hop, 33 tokens, 8 words: 2 (4 D^2 + 3 D F) + attention 4 D (S + 1) / 2 a layer pass, and the head once.
    run = RunSettings(task="p-hop", loops=4)
    layer = 4 * 64 * 64 + 3 * 64 * 128
    assert flops(run) == 2 * (4 * layer + 8 * 64) + 4 * 4 * 64 * 34 / 2
    assert flops(run, loops=1) == flops(run.changed(loops=1))


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 2), st.integers(2, 6), st.sampled_from([32, 64, 96]))
def test_matched_arms_cost_the_same(layers, loops, width):
    looped = RunSettings(task="mano", layers=layers, loops=loops, width=width, steps=10)
    arms = matched(looped)
    cost = {name: flops(arm) * arm.steps for name, arm in arms.items()}
    full = cost.pop(f"{layers}⊗{loops}")
    assert cost.pop(f"{layers}⊗1") < full
    assert len(cost) == 3
    for other in cost.values():
        assert other == pytest.approx(full, rel=0.12)  # the head is read once a step, whatever the loops
    assert cost[f"{layers}⊗1 wide"] == pytest.approx(full, rel=0.02)
    paired = {"task", "scale", "task_settings", "batch", "seed", "objective", "learning_rate", "weight_decay"}
    for arm in arms.values():
        assert arm.model_dump(include=paired) == looped.model_dump(include=paired)


def test_results_made_before_a_setting_existed_keep_their_key():
    # Worked out on the day before `frontier` and `curriculum_score` came.
    gate = {"task_settings": {"levels": [1, 2, 3], "test_levels": [1, 2, 3]}, "loops": 4, "objective": "expected"}
    run = RunSettings(task="p-hop", **gate, evaluations=10, evaluation_loops=8, seed=101)
    assert run.key == "cf8f733974b85f26" and "frontier" not in run.plain()
    assert run.changed(frontier=[2.0]).key != run.key
    assert run.changed(curriculum=5).key != run.changed(curriculum=5, curriculum_score=0.9).key


def test_heads_are_as_wide_as_they_fit():
    for width, heads in ((32, 1), (48, 1), (64, 2), (80, 2), (96, 3)):
        run = RunSettings(task="mano", width=width)
        assert run.model(run.make_task()).num_attention_heads == heads


def test_only_looped_models_have_matched_arms():
    with pytest.raises(ValueError, match="loops is 1"):
        matched(RunSettings(task="mano"))


def test_the_key_is_that_of_all_settings():
    run = RunSettings(task="mano", task_settings={"modulus": 5, "dense": True})
    same = RunSettings(task="mano", task_settings={"dense": True, "modulus": 5})
    assert run.key == same.key and len(run.key) == 16
    changes = ({"seed": 1}, {"steps": 999}, {"task_settings": {"modulus": 7}}, {"exit_beta": 0.1})
    assert len({run.key, *(run.changed(**change).key for change in changes)}) == 5
    assert run.changed(task_settings={"modulus": 7}).task_settings == {"modulus": 7, "dense": True}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": 40}, "width is 40"),
        ({"loops": 0}, "loops is 0"),
        ({"layer": 2}, "unknown key 'layer'; did you mean 'layers'"),
        ({"loop_counts": {"distribution": "uniform", "most": 9}}, "loop_counts.most is 9, more than the 1 loops"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_a_line(change, said):
    with pytest.raises(ValueError, match=said):
        RunSettings(task="mano").changed(**change)


def test_unknown_tasks_and_empty_answer_spaces_are_refused():
    with pytest.raises(ValueError, match="mano"):
        RunSettings(task="manno").make_task()
    with pytest.raises(ValueError, match="modulus"):
        RunSettings(task="mano", task_settings={"modulus": 1}).make_task()


def test_a_grid_is_every_combination(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({"settings": {"task": "mano"}, "vary": {"layers": [1, 2], "loops": [1, 4]}}))
    grid = load_grid(path)
    arms = grid.arms()
    assert list(arms) == [f"layers {k}, loops {loops}" for k in (1, 2) for loops in (1, 4)]
    assert arms["layers 2, loops 4"].layers == 2 and arms["layers 2, loops 4"].loops == 4 and grid.seeds == 5
    assert list(Grid(settings=RunSettings(task="mano")).arms()) == ["1⊗1"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("settings: {task: mano}\nvary: {seed: [1]}", "vary names 'seed'"),
        ("settings: {task: mano}\nvary: {depth: [1]}", "vary names 'depth'"),
        ("settings: {task: mano}\nseeds: 0", "seeds is 0"),
        ("settings: [", "not valid YAML"),
    ],
)
def test_a_faulty_grid_is_refused_in_a_line(tmp_path, text, said):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        load_grid(path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no such grid"):
        load_grid(tmp_path / "none.yaml")
