"""`looplm grpo`: every mode end to end, what is learnt, records, resuming, faults."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from killing import Moment, run_command
from tuned import grpo_recipe, grpo_values, save_base

from looplm.model.loading import load_model
from looplm.tuning.grpo import reinforce
from looplm.tuning.rl_recipe import load_grpo_recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


def records_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(folder: Path) -> list[dict]:
    return [{key: value for key, value in r.items() if "time" not in key} for r in records_of(folder)]


MODES = {
    "fixed": {"depth": {"mode": "fixed", "loops": 2}},
    "adaptive": {"depth": {"mode": "adaptive", "exit_threshold": 0.6}},
    "sampled": {"depth": {"mode": "sampled", "cost": 0.05, "gate_entropy": 0.01}},
    "separate": {
        "depth": {"mode": "sampled", "ratio": "separate", "exit_gradients": "gate"},
        "algorithm": "dapo",
        "overlong_buffer": 2,
        "updates": 2,
        "epochs": 2,
        "kl": 0.1,
    },
    "per-loop": {"depth": {"mode": "per-loop", "credit": "progressive"}},
    "paper": {"depth": {"mode": "paper-off-policy", "exit_threshold": 0.6}},
    "adapter": {"depth": {"mode": "sampled"}, "lora": {"rank": 4}, "kl": 0.1},
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_runs_and_learner_and_rollout_agree(tmp_path, base, name):
    recipe = grpo_recipe(tmp_path, base, **MODES[name])
    report = reinforce(recipe)
    out = tmp_path / "out"
    sampled = recipe.depth.mode == "sampled"
    assert report["agreement"]["token_difference"] < 1e-4
    assert (report["agreement"]["exit_difference"] is not None) == sampled
    assert not sampled or report["agreement"]["exit_difference"] < 1e-4
    steps = [record for record in records_of(out) if "step" in record]
    assert len(steps) == 3 * recipe.updates * recipe.epochs
    rolled = [record for record in steps if "reward" in record]
    assert len(rolled) == 3  # one rollout for `updates x epochs` steps
    for key in ("outcome", "mean_depth", "length", "groups_without_signal", "token_difference"):
        assert key in rolled[0]
    assert ("kl" in steps[0]) == bool(recipe.kl) and ("gate_entropy" in steps[0]) == (
        recipe.depth.mode in ("sampled", "adaptive")
    )
    model, _ = load_model(str(out / "model"))
    before, _ = load_model(str(base))
    gate = "model.early_exit_gate.weight"
    changed = not torch.equal(model.get_parameter(gate), before.get_parameter(gate))
    assert changed == (sampled and recipe.lora is None)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight) or recipe.lora is not None
    assert (out / "model" / "recipe.yaml").read_text() == recipe.to_yaml()
    assert load_grpo_recipe(out / "recipe.yaml") == recipe
    assert reinforce(recipe) == report  # finished: nothing is done again


@pytest.mark.parametrize("depth", [{"mode": "fixed"}, {"mode": "sampled", "cost": 1.0}])
def test_what_is_rewarded_is_learnt(tmp_path, base, depth):
    recipe = grpo_recipe(tmp_path, base, depth=depth, steps=12, prompts=8, samples=8, checkpoints={"every_steps": 50})
    report = reinforce(recipe)
    rolled = [record for record in records_of(tmp_path / "out") if "reward" in record]
    assert rolled[-1]["reward"] > rolled[0]["reward"] + 0.15
    if depth["mode"] == "sampled":  # so high a cost that the gate cannot settle at full depth by luck
        assert rolled[-1]["mean_depth"] < rolled[0]["mean_depth"] - 0.3
    else:
        assert report["after"]["outcome"] > report["before"]["outcome"]


def test_micro_batches_change_nothing(tmp_path, base):
    depth = {"mode": "sampled", "cost": 0.1}
    for size in (2, 16):
        reinforce(grpo_recipe(tmp_path / str(size), base, depth=depth, steps=2, micro_batch_size=size))
    small, large = ([r for r in records_of(tmp_path / str(size) / "out") if "step" in r] for size in (2, 16))
    for one, other in zip(small, large, strict=True):
        assert one["reward"] == other["reward"] and one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_dull_groups_are_drawn_again(tmp_path, base):
    dull = tmp_path / "dull.py"
    dull.write_text("def sums(prompt, completion, answer, entry):\n    return float(int(answer) % 2 == 0)\n")
    values = grpo_values(tmp_path, base, steps=1, algorithm="dapo", rewards=[{"python": f"{dull}:sums"}])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    reinforce(load_grpo_recipe(recipe))
    (rolled,) = [record for record in records_of(tmp_path / "out") if "reward" in record]
    assert rolled["groups_without_signal"] == 1 and rolled["groups_tried"] == 4 * (1 + 3)


def test_nothing_to_learn_from_is_said_with_the_remedy(tmp_path, base, capfd):
    dull = tmp_path / "dull.py"
    dull.write_text("def one(prompt, completion, answer, entry):\n    return 1.0\n")
    reinforce(grpo_recipe(tmp_path, base, steps=5, rewards=[{"python": f"{dull}:one"}]))
    said = " ".join(capfd.readouterr().err.split())
    assert "no group of the last 5 rollouts has both better and worse samples" in said
    assert "take easier (or harder) problems, more samples" in said


def test_a_reward_that_raises_is_counted_and_named(tmp_path, base, capfd):
    moody = tmp_path / "moody.py"
    moody.write_text(
        "def moody(prompt, completion, answer, entry):\n"
        "    if answer == '7' and len(completion) % 2:\n"
        "        raise RuntimeError('not today')\n"
        "    return sum(c.isalpha() for c in completion) / 6\n"
    )
    reinforce(grpo_recipe(tmp_path, base, steps=6, rewards=[{"python": f"{moody}:moody"}]))
    rolled = [record for record in records_of(tmp_path / "out") if "reward" in record]
    missed = [record for record in rolled if record["not_scored"]]
    assert all(("faults" in record) == bool(record["not_scored"]) for record in rolled)
    for record in missed:
        assert "moody raised RuntimeError: not today" in record["faults"][0]


def test_a_reward_that_always_raises_ends_the_run(tmp_path, base):
    broken = tmp_path / "broken.py"
    broken.write_text("def broken(prompt, completion, answer, entry):\n    raise KeyError('nothing')\n")
    with pytest.raises(ValueError, match="broken"):
        reinforce(grpo_recipe(tmp_path, base, rewards=[{"python": f"{broken}:broken"}]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 250}, "the longest prompt has .* lower max_new_tokens"),
        ({"depth": {"mode": "sampled", "min_loops": 4}}, "depth.min_loops is 4; the model goes to 3"),
        ({"lora": {"target_modules": ["lm_head"]}}, "lm_head"),
        ({"model": "nowhere/at-all"}, "nowhere/at-all"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, base, changes, message):
    with pytest.raises(ValueError, match=message):
        reinforce(grpo_recipe(tmp_path, base, **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": {"mode": "adaptive"}}, "exit_threshold is missing, which mode 'adaptive' needs"),
        ({"depth": {"exit_threshold": 0.5}}, "exit_threshold goes with adaptive and paper-off-policy"),
        ({"depth": {"cost": 0.5}}, "cost goes with mode sampled; drop it in mode 'fixed'"),
        ({"depth": {"mode": "sampled", "min_loops": 3, "loops": 2}}, "min_loops is 3; it must be at most loops = 2"),
        (
            {"micro_batch_size": 5},
            "prompts x samples is 16; it must be a multiple of micro_batch_size x updates = 5 x 1",
        ),
        ({"overlong_buffer": 6}, "overlong_buffer is 6; it must be below max_new_tokens = 6"),
        ({"depth": {"mode": "per-loop"}, "epochs": 2}, "has no ratios: updates and epochs must be 1"),
        ({"depth": {"mode": "per-loop"}, "kl": 0.1}, "kl is 0.1; mode 'per-loop' has no single log-probability"),
        ({"sample": 3}, "unknown key 'sample'; did you mean 'samples'"),
    ],
)
def test_faults_of_a_recipe(tmp_path, base, changes, message):
    with pytest.raises(ValueError, match=message):
        grpo_recipe(tmp_path, base, **changes)


# ---- killed


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_again_and_again_it_ends_as_if_nothing_had_been(tmp_path, base):
    recipes = {}
    for name in ("whole", "killed"):
        recipes[name] = tmp_path / name / "recipe.yaml"
        values = grpo_values(tmp_path / name, base, depth={"mode": "sampled", "cost": 0.05}, steps=4, updates=2, kl=0.1)
        recipes[name].write_text(yaml.safe_dump(values))
    code, said = run_command(["grpo", str(recipes["whole"])], tmp_path / "log")
    assert code == 0, said
    moments = [
        Moment("looplm.tuning.grpo_trainer:roll_out", 2),
        Moment("torch.optim:AdamW.step", 2),  # between the two updates of a rollout
        Moment("looplm.tuning.grpo:write_model"),  # trained, but not saved
    ]
    for moment in moments:
        code, said = run_command(["grpo", str(recipes["killed"])], tmp_path / "log", moment)
        assert code == -signal.SIGKILL, (moment, said)
    code, said = run_command(["grpo", str(recipes["killed"])], tmp_path / "log")
    assert code == 0 and "going on from step 8" in said and "learner and rollout" in said, said
    whole, killed = (tmp_path / name / "out" for name in ("whole", "killed"))
    assert without_times(killed) == without_times(whole) and len(without_times(whole)) == 8
    weights = "model/model.safetensors"
    assert (killed / weights).read_bytes() == (whole / weights).read_bytes()
