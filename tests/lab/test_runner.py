"""Runs in real processes: results that survive interruptions, folders that belong to one, and the command line."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from looplm.cli import main
from looplm.lab import runner
from looplm.lab.results import FILE, SCHEMA, by_run, finished, load, save, settings_of, table_of
from looplm.lab.runner import code_commit, locked, run_all
from looplm.lab.settings import RunSettings
from looplm.lab.study import Study, study_of

SMALL = RunSettings(
    task="multi-hop", width=32, steps=4, batch=8, evaluations=2, evaluation_items=8, task_settings={"people": 10}
)


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling takes longer than these runs


def test_two_processes_give_what_one_gives_and_go_on_where_they_were(tmp_path):
    runs = [SMALL.changed(seed=seed) for seed in (1, 2)]
    table = run_all(runs, tmp_path / "two", workers=2)
    assert finished(table) == {run.key for run in runs} == finished(load(tmp_path / "two" / FILE))
    assert table.schema == SCHEMA and settings_of(table.to_pylist()[0]).key == table["run"][0].as_py()

    before = (tmp_path / "two" / FILE).stat().st_mtime_ns
    again = run_all(runs, tmp_path / "two", workers=2)  # nothing is left to do
    assert again.equals(table) and (tmp_path / "two" / FILE).stat().st_mtime_ns == before

    from looplm.lab.training import run

    mine = [{name: row[name] for name in ("step", "loop", "difficulty", "score", "loss")} for row in run(runs[0])]
    theirs = [{name: row[name] for name in mine[0]} for row in by_run(table)[runs[0].key]]
    assert mine == theirs


def test_settings_that_cannot_be_are_refused_before_anything_is_written(tmp_path):
    empty = SMALL.changed(seed=3, task_settings={"people": 4, "relations": 1})
    with pytest.raises(ValueError, match="relations is 1"):
        run_all([SMALL, empty], tmp_path / "new", workers=1)
    with pytest.raises(ValueError, match="workers is 0"):
        run_all([SMALL], tmp_path / "new", workers=0)
    assert not (tmp_path / "new").exists()


def test_a_folder_has_one_writer(tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="another process writes to"):
        run_all([SMALL], tmp_path, workers=1)


def test_results_are_replaced_as_a_whole(tmp_path, monkeypatch):
    rows = [{"step": 4, "loop": 1, "difficulty": 1, "items": 8, "score": 0.5}]
    one = table_of(SMALL, "0123456789ab", rows)
    save(one, tmp_path / FILE)

    def fails(*given, **named):
        Path(given[1]).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(pq, "write_table", fails)
    with pytest.raises(OSError, match="no space"):
        save(one, tmp_path / FILE)
    assert load(tmp_path / FILE).equals(one) and os.listdir(tmp_path) == [FILE]


def test_files_that_are_something_else_are_refused(tmp_path):
    (tmp_path / FILE).write_text("nothing of the kind")
    with pytest.raises(ValueError, match="is no Parquet file"):
        load(tmp_path / FILE)
    assert load(tmp_path / "none.parquet").num_rows == 0


def test_files_from_before_exit_rules_are_read(tmp_path):
    table = table_of(SMALL, "0123456789ab", [{"step": 4, "loop": 1, "difficulty": 1, "items": 8, "score": 0.5}])
    save(table.drop_columns(["rule", "over", "mean_loops"]), tmp_path / FILE)
    assert load(tmp_path / FILE).equals(table)
    save(table.drop_columns(["mean_loops"]), tmp_path / FILE)
    with pytest.raises(ValueError, match="has other columns than results of the lab"):
        load(tmp_path / FILE)


def test_the_commit_says_whether_the_code_was_committed(monkeypatch):
    answers = {"rev-parse": "0123456789ab\n", "status": ""}
    monkeypatch.setattr(runner, "git", lambda place, command, *rest: answers[command])
    assert code_commit() == "0123456789ab"
    answers["status"] = " M looplm/exits.py\n"
    assert code_commit() == "0123456789ab-dirty"

    def missing(*given):
        raise OSError("no git")

    monkeypatch.setattr(runner, "git", missing)
    assert code_commit() == "unknown"


def test_a_study_draws_grows_and_refuses_other_settings(tmp_path):
    study = Study({"1⊗1": SMALL}, seeds=1)
    table = study.run(tmp_path, workers=1)
    assert table.row_count == 1
    for name in ("by-loop", "by-difficulty", "learning-curves"):
        assert (tmp_path / f"{name}.svg").read_text().startswith("<svg ")
    with pytest.raises(ValueError, match=r"holds runs with steps = 4, not 5 \(1⊗1\)"):
        Study({"1⊗1": SMALL.changed(steps=5)}, seeds=1).run(tmp_path, workers=1)
    with pytest.raises(ValueError, match="holds runs of 1⊗1, not 1⊗2"):
        Study({"1⊗2": SMALL.changed(loops=2)}, seeds=1).run(tmp_path, workers=1)
    before = by_run(load(tmp_path / FILE))
    Study({"1⊗1": SMALL}, seeds=2).run(tmp_path, workers=1)
    after = by_run(load(tmp_path / FILE))
    assert len(after) == 2 and all(after[key] == rows for key, rows in before.items())


def test_a_study_is_a_task_or_a_grid(tmp_path):
    assert list(study_of("mano", {"loops": 2}, None, True).arms) == ["1⊗2", "1⊗1", "1⊗1 long", "2⊗1", "1⊗1 wide"]
    path = tmp_path / "grid.yaml"
    path.write_text("settings: {task: mano}\nvary: {loops: [1, 2]}\nseeds: 3\n")
    assert study_of(str(path), {}, None, False).seeds == 3
    assert study_of(str(path), {}, 7, False).seeds == 7
    with pytest.raises(ValueError, match="--learning-rate goes with a task"):
        study_of(str(path), {"learning_rate": 0.1}, None, False)
    with pytest.raises(ValueError, match="manno"):
        study_of("manno", {}, None, False)
    with pytest.raises(ValueError, match="seeds is 0"):
        study_of("mano", {}, 0, False)


def test_an_interrupted_command_keeps_finished_runs(tmp_path):
    grid, out = tmp_path / "grid.yaml", tmp_path / "out"
    grid.write_text(
        "settings: {task: multi-hop, width: 32, batch: 8, evaluations: 1, evaluation_items: 8}\n"
        "vary: {steps: [4, 100000]}\nseeds: 1\n"
    )
    command = [sys.executable, "-m", "looplm", "lab", "run", str(grid), "--workers", "1", "--output", str(out)]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs would ignore it
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    deadline = time.monotonic() + 240
    while not (out / FILE).exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "looplm: interrupted" in errors and "Traceback" not in errors
    assert len(finished(load(out / FILE))) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "manno"], "no such task: manno"),
        (["run", "mano", "--width", "40"], "width is 40"),
        (["claims", "--only", "p-hops"], "no such claim: p-hops; did you mean 'p-hop'"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["looplm", "lab", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    errors = capsys.readouterr().err
    assert end.value.code == 2 and said in errors and errors.count("\n") == 1
    assert os.listdir(tmp_path) == []
