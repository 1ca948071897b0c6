"""Exact resume: real processes, killed for real, leave what an uninterrupted run leaves, bit for bit."""

import functools
import hashlib
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from killing import Moment, Runs
from small_run import read_lines, small_recipe, small_values

from looplm.training.checkpoint import Checkpoints
from looplm.training.resume import SAME_TO, RunLock, Stopped, differences
from looplm.training.run import train
from looplm.training.trainer import Trainer

pytestmark = pytest.mark.skipif(os.name != "posix", reason="SIGKILL")

STAGES = [
    {"name": "first", "steps": 7},
    {"name": "grown", "steps": 6, "upcycle": {"num_hidden_layers": 4}, "sequence_length": 16},
]


def runs(folder: Path, every: int = 2, prepare=None, **changes) -> Runs:
    """A recipe of two stages, the second with more layers and shorter sequences."""
    folder.mkdir(exist_ok=True)
    values = small_values(folder, stages=STAGES, **changes)
    return Runs(folder, {**values, "checkpoints": {"every_steps": every}}, prepare)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Runs:
    """The run that nobody interrupts."""
    started = runs(tmp_path_factory.mktemp("whole"))
    code, said = started.run()
    assert code == 0, said
    return started


STEP = "torch.nn.utils:clip_grad_norm_"
FILE = "looplm.training.checkpoint"
SEQUENCES = {
    "in steps": [
        Moment(STEP, 2),  # before the first checkpoint but the one at the start
        Moment("torch.optim:AdamW.step", 3, "after"),
        Moment("looplm.training.tracking:MetricsLog.write", 2, "half_a_line"),
        Moment("looplm.training.tracking:Tracker.step", 2, "after"),
        Moment("looplm.training.trainer:evaluate_loops", 1, "after"),
        Moment(STEP, 6),
    ],
    "in saves": [
        Moment(f"{FILE}:_Writer.write_data", 1),  # the very first
        Moment("torch:save", 20, "half_a_file"),
        Moment(f"{FILE}:_Writer.finish", 2),
        Moment(f"{FILE}:write_text", 2),  # all but the manifest
        Moment(f"{FILE}:write_text", 2, "after"),  # all but the rename
        Moment(f"{FILE}:Checkpoints._finish", 2, "after"),
        Moment(f"{FILE}:Checkpoints._remove", 1, "half_a_removal"),
    ],
    "between stages": [
        Moment("looplm.training.tracking:Tracker.stage", 1),
        Moment("looplm.training.tracking:Tracker.stage", 1, "after"),
        Moment("looplm.files:Path.rename", 6, "after"),
        Moment("looplm.training.run:begin_stage", 2),
        Moment("looplm.training.run:begin_stage", 2, "after"),
        Moment("looplm.training.resume:Keeper.between_stages", 1, "after"),
        Moment("looplm.training.tracking:Tracker.stage", 1, "after"),
        Moment("looplm.training.resume:Keeper.save", 1),
    ],
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_killed_again_and_again_it_ends_as_if_nothing_had_been(whole, tmp_path, name):
    killed = runs(tmp_path)
    for moment in SEQUENCES[name]:
        code, said = killed.run(moment)
        assert code == -signal.SIGKILL, (moment, said)
    code, said = killed.run()
    assert code == 0 and "going on from stage" in said, said
    assert killed.left() == whole.left()


def test_killed_at_random_moments(whole, tmp_path):
    killed, draw, kills = runs(tmp_path), random.Random(11), 0
    metrics = killed.output / "metrics.jsonl"
    for _ in range(5):
        child, before = killed.begin(), None
        while child.is_alive():
            size = metrics.stat().st_size if metrics.exists() else 0
            before = size if before is None else before
            if size > before and draw.random() < 0.3:
                time.sleep(draw.random() / 20)
                os.kill(child.pid, signal.SIGKILL)
                break
            time.sleep(0.003)
        child.join(60)
        kills += child.exitcode == -signal.SIGKILL
    assert kills >= 3
    code, said = killed.run()
    assert code == 0, said
    assert killed.left() == whole.left()


def wait_for(condition, child) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert child.is_alive() and time.monotonic() < deadline
        time.sleep(0.003)


def test_sigterm_saves_and_says_how_to_go_on(whole, tmp_path):
    stopped = runs(tmp_path, every=100)  # no checkpoint but the one it writes on its way out
    child = stopped.begin()
    wait_for(lambda: (stopped.output / "metrics.jsonl").exists(), child)
    os.kill(child.pid, signal.SIGTERM)
    child.join(60)
    said = stopped.log.read_text()
    assert child.exitcode == 0 and "start the same command again to go on" in said
    done = len(stopped.records())
    assert Checkpoints(stopped.output / "checkpoints").names()[-1] != "001-00000000"
    assert f"stopped and saved at stage {1 if done < 10 else 2}, step " in said
    code, said = stopped.run()
    assert code == 0 and "going on from stage" in said
    assert stopped.left() == whole.left()


def tree(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_finished_run_says_so_and_only_writes_its_report_again(whole):
    before = tree(whole.output)
    code, said = whole.run()
    assert code == 0 and "all stages are finished; for another run choose another output folder" in said
    changed = {path for path, content in tree(whole.output).items() if before.get(path) != content}
    assert {Path(path).name for path in changed} <= {"report.json", "report.html"}


def test_another_recipe_is_refused_with_the_differences_and_nothing_changes(whole, tmp_path):
    other = Runs(tmp_path, {**whole.values, "seed": 9})
    other.write(defaults={**whole.values["defaults"], "learning_rate": 1e-3}, tracking=[])
    before = tree(whole.output)
    code, said = other.run()
    assert code == 2 and said.count("\n") == 1
    assert f"{whole.output} holds a run of another recipe (" in said and "choose another output folder" in said
    for difference in ("seed: 3 before, 9 now", "stages.1.learning_rate: 0.003 before, 0.001 now"):
        assert difference in said
    assert tree(whole.output) == before


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(whole, tmp_path):
    killed = runs(tmp_path)
    code, _ = killed.run(Moment(f"{FILE}:Checkpoints._finish", 6, "after"))  # stage 1 has five, this is 002-00000002
    assert code == -signal.SIGKILL
    *_, before, last = Checkpoints(killed.output / "checkpoints").names()
    assert (before, last) == ("002-00000000", "002-00000002")
    file = killed.output / "checkpoints" / last / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    code, said = killed.run()
    assert code == 0 and f"checkpoint {last} is damaged: __0_0.distcp does not match its checksum" in said
    assert "going on from stage 2, step 0" in said
    assert killed.left() == whole.left()


def other_torch() -> None:
    torch.__version__ = "0.0"


def two_threads() -> None:
    torch.set_num_threads(2)


def test_other_surroundings_are_said(whole, tmp_path):
    killed = runs(tmp_path)
    assert killed.run(Moment(STEP, 11))[0] == -signal.SIGKILL
    killed.prepare = other_torch
    code, said = killed.run()
    before = repr(str(torch.__version__))
    assert code == 0 and f"agree to about 0.001, not bit for bit (torch: {before} before, '0.0' now)" in said
    assert killed.left() == whole.left()  # a version is only a name here


@pytest.mark.slow
def test_with_other_threads_losses_agree_to_rounding(whole, tmp_path):
    killed = runs(tmp_path)
    assert killed.run(Moment(STEP, 4))[0] == -signal.SIGKILL
    killed.prepare = two_threads
    code, said = killed.run()
    assert code == 0 and "(threads: 1 before, 2 now)" in said
    pairs = [(a["loss"], b["loss"]) for a, b in zip(killed.records(), whole.records(), strict=True) if "loss" in a]
    assert len(pairs) == 13 and all(a == pytest.approx(b, rel=SAME_TO) for a, b in pairs)


def test_two_runs_never_write_to_the_same_folder(whole):
    with RunLock(whole.output):
        code, said = whole.run()
    assert code == 2 and f"another run is writing to {whole.output}" in said


def test_missing_records_are_refused(tmp_path):
    killed = runs(tmp_path)
    assert killed.run(Moment(f"{FILE}:Checkpoints._finish", 2, "after"))[0] == -signal.SIGKILL  # of step 2
    os.truncate(killed.output / "metrics.jsonl", 10)
    code, said = killed.run()
    assert code == 2 and "metrics.jsonl has 10 bytes, but had " in said and "put it back" in said


def small_disk() -> None:
    """No file may grow beyond 300 kB: models still can, checkpoints cannot."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_disk_that_is_full_ends_the_run_in_one_line_and_loses_nothing(whole, tmp_path):
    full = runs(tmp_path)
    assert full.run(Moment(STEP, 4))[0] == -signal.SIGKILL
    whole_ones = Checkpoints(full.output / "checkpoints").names()  # the kill may have left half of one, hidden
    good = {name: tree(full.output / "checkpoints" / name) for name in whole_ones}
    full.prepare = small_disk
    code, said = full.run()
    last = said.splitlines()[-1]
    assert code == 2 and "could not be written to" in last and "File too large; the last good one is 001-000000" in last
    assert last.endswith("make room and start the same command again") and "Traceback" not in said
    assert {name.name: tree(name) for name in (full.output / "checkpoints").iterdir()} == good
    full.prepare = None
    assert full.run()[0] == 0
    assert full.left() == whole.left()


@pytest.mark.slow
def test_compiled_runs_are_exact_too(tmp_path):
    changes = {"defaults": {"compile": "on", "autocast": "bfloat16"}}
    whole, killed = runs(tmp_path / "whole", **changes), runs(tmp_path / "killed", **changes)
    assert whole.run()[0] == 0
    for moment in (Moment(STEP, 4), Moment(f"{FILE}:_Writer.finish", 3), Moment(STEP, 6)):
        assert killed.run(moment)[0] == -signal.SIGKILL
    code, said = killed.run()
    assert code == 0, said
    assert killed.left() == whole.left()


def poison(last: int = 9) -> None:
    """The samples of the steps 9 to `last`, of 16, are noise."""
    from looplm.training import trainer

    real = trainer.batch

    def poisoned(mixture, first, size):
        part = real(mixture, first, size)
        if 9 <= first // 4 <= last:
            draw = torch.Generator().manual_seed(0)
            part["labels"] = torch.randint(0, 300, part["labels"].shape, generator=draw)
        return part

    trainer.batch = poisoned


poison_all = functools.partial(poison, last=16)


SPIKY = [{"name": "only", "steps": 16, "learning_rate": 1e-2, "rollback": {"window": 4, "sigmas": 4.0}}]


def spiky(folder: Path, prepare=poison, **stage) -> Runs:
    folder.mkdir(exist_ok=True)
    values = small_values(folder, stages=[{**SPIKY[0], **stage}])
    return Runs(folder, {**values, "checkpoints": {"every_steps": 4}}, prepare)


def test_a_spike_goes_back_and_passes_over_its_batch_and_a_kill_changes_nothing(tmp_path):
    steady = spiky(tmp_path / "steady")
    code, said = steady.run()
    assert code == 0, said
    warnings = [record["warning"] for record in steady.records() if "warning" in record]
    assert [warning["step"] for warning in warnings] == [8]
    assert warnings[0]["text"].startswith("stage 1 only, step 9: the loss spikes to ")
    assert warnings[0]["text"].endswith(": back to step 8, to pass over the batch of step 9")
    steps = [record for record in steady.records() if "loss" in record]
    assert [record["step"] for record in steps] == [*range(9), *range(10, 16)]
    assert steps[-1]["tokens"] == 15 * 128 and steps[-1]["loss"] < steps[0]["loss"] - 1
    killed = spiky(tmp_path / "killed")
    for moment in (
        Moment("looplm.training.resume:Keeper.go_back", 1, "after"),
        Moment(STEP, 4),  # it has gone back, and dies before the next checkpoint
        Moment(STEP, 6),
    ):
        assert killed.run(moment)[0] == -signal.SIGKILL
    assert killed.run()[0] == 0
    assert killed.left() == steady.left()


def test_without_rollback_or_too_often_a_spike_is_not_passed_over(tmp_path):
    code, said = spiky(tmp_path / "often", poison_all, rollback={"window": 4, "sigmas": 4.0, "most": 2}).run()
    assert code == 1 and "2 batches were passed over already; lower learning_rate" in said
    code, said = spiky(tmp_path / "never", rollback=None, steps=12).run()
    assert code == 0 and "spikes" not in said


def test_minutes_go_on_where_they_stopped(tmp_path, monkeypatch):
    now, stop_at = [0.0], [4]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stage = {"name": "only", "minutes": 1.0, "final_learning_rate": 1e-3, "warmup_steps": 0}
    recipe = small_recipe(tmp_path, stages=[stage])
    real = Trainer.step

    def step(self, progress):
        now[0] += 6
        if self.state.step + 1 == stop_at[0]:
            self.keeper.stop.requested = True
        return real(self, progress)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(Stopped, match="stopped and saved at stage 1, step 4"):
        train(recipe)
    now[0] += 1e6  # a long night
    stop_at[0] = 0
    result = train(recipe).results[0]
    records = [record for record in read_lines(Path(recipe.output) / "metrics.jsonl") if "loss" in record]
    assert [record["minutes"] for record in records] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert (result.steps, result.minutes) == (10, pytest.approx(1.0))
    rates = [record["learning_rate"] for record in records]
    assert rates[3:] == pytest.approx([3e-3 - 2e-3 * n / 10 for n in range(3, 10)])


def test_anew_replaces_a_run_of_the_same_data_and_model_only(tmp_path):
    recipe = small_recipe(tmp_path, stage={"name": "only", "steps": 2})
    metrics = Path(recipe.output) / "metrics.jsonl"
    train(recipe)
    first = metrics.read_bytes()
    assert train(recipe).results[0].steps == 2 and metrics.read_bytes() == first  # finished
    train(recipe.with_stages(steps=3), anew=True)
    assert [record["step"] for record in read_lines(metrics) if "loss" in record] == [0, 1, 2]
    assert Checkpoints(Path(recipe.output) / "checkpoints").names() == ["001-00000000", "002-00000000"]
    with pytest.raises(ValueError, match=r"holds a run of another recipe \(seed: 3 before, 4 now\)"):
        train(recipe.model_copy(update={"seed": 4}), anew=True)


@pytest.mark.parametrize(
    ("before", "now", "lines"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": 2}, ["a: 1 before, 2 now"]),
        ({"a": {"b": None, "c": 1}}, {"a": {"b": 0.5, "c": 1}}, ["a.b: None before, 0.5 now"]),
        ({"a": [{"b": 1}, {"b": 2}]}, {"a": [{"b": 1}, {"b": 3}]}, ["a.2.b: 2 before, 3 now"]),
        ({"a": [1]}, {"a": [1, 2]}, ["a: [1] before, [1, 2] now"]),
        ({"a": 1}, {"b": 1}, ["a: 1 before, absent now", "b: absent before, 1 now"]),
        ({"a": {"b": 1}}, {"a": None}, ["a: {'b': 1} before, None now"]),
    ],
)
def test_differences_by_hand(before, now, lines):
    assert differences(before, now) == lines


values_of_recipes = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["x", "y"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


@given(before=values_of_recipes, now=values_of_recipes)
def test_there_are_differences_exactly_where_values_differ(before, now):
    assert (differences(before, now) == []) == (before == now)
    assert len(differences(before, now)) == len(differences(now, before))


def test_the_lock_is_of_a_process_and_an_absent_folder_has_none(tmp_path):
    with RunLock(tmp_path / "absent") as lock:
        (tmp_path / "absent").mkdir()
        lock.take()
        lock.take()
        with pytest.raises(ValueError, match="another run is writing"), RunLock(tmp_path / "absent"):
            pass
    with RunLock(tmp_path / "absent"):
        pass
