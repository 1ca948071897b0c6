"""`looplm eval` and `looplm study depth-sweep` from end to end, killed and continued, and every refusal."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chat_server import chat_server
from eval_models import choice_records, question_records, save_pair, write_lines

import looplm
from looplm.evaluation.results import Result, load_results

ROOT = Path(looplm.__file__).parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model and two tasks."""
    folder = tmp_path_factory.mktemp("eval")
    save_pair(folder / "small" / "model")
    write_lines(folder / "choice.jsonl", choice_records())
    write_lines(folder / "free.jsonl", question_records())
    return folder


@pytest.fixture
def looplm_eval(looplm_command, monkeypatch, made):
    monkeypatch.chdir(made)
    monkeypatch.setenv("COLUMNS", "220")

    def run(*arguments):
        code, out, err = looplm_command(*arguments)
        assert code == 0 and "Traceback" not in err, err
        return out

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.json"))}


def test_depths_and_rules_in_one_command_with_their_recipe(looplm_eval, made, tmp_path):
    out = looplm_eval(
        *("eval", "small/model", "--tasks", "choice.jsonl,free.jsonl", "--loops", "1..4", "--output", tmp_path),
        *("--exit", "q=0.6", "--exit-mode", "freeze", "--prefill", "adaptive", "--limit", 22),
    )
    assert "4 loops *" in out and "beyond the 3 loops" in out and "q=0.6 freeze, prompt too" in out
    results = {result.name: result for result in load_results(tmp_path)}
    depths = ["loops-1", "loops-2", "loops-3", "loops-4", "q-0-6-freeze-adaptive"]
    assert len(results) == 10 and {name.partition(".")[0] for name in results} == {"choice", "free"}
    three = results["choice.loops-3"]
    assert len(three.items) == 22 and three.items[0].category == "even" and three.items[0].id == "q0"
    assert three.cost["loops_read"] == three.cost["loops_processed"] == 3.0
    recipe = three.recipe
    assert (recipe.model, recipe.task, recipe.loops, recipe.limit, recipe.num_fewshot) == ("small", "choice", 3, 22, 0)
    assert recipe.dtype == "float32" and len(recipe.fingerprint) == 64 and recipe.chat_template is None
    assert recipe.versions["lm-eval"] and recipe.command.startswith("looplm eval small/model --tasks")
    early = next(result for name, result in results.items() if name.startswith("choice.q"))
    assert early.recipe.exit_rule == "q=0.6" and early.recipe.exit_mode == "freeze"
    assert 1 <= early.cost["loops_processed"] < 3 and recipe.prompts == early.recipe.prompts
    assert results["free.loops-2"].items[0].outputs and results["free.loops-2"].recipe.generation["max_gen_toks"] == 64
    assert depths[0] in results["free.loops-1"].name


def test_a_run_that_is_done_is_read_from_disk(looplm_eval, tmp_path, monkeypatch):
    arguments = ("eval", "small/model", "--tasks", "choice.jsonl", "--loops", "1,2", "--output", tmp_path)
    looplm_eval(*arguments)
    first = files(tmp_path)
    monkeypatch.setattr("looplm.model.stack.OuroModel.loop", None)
    looplm_eval(*arguments)
    assert files(tmp_path) == first


def test_killed_and_continued_it_leaves_the_same_files(looplm_command, made, tmp_path, monkeypatch):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    write_lines(tmp_path / "long.jsonl", choice_records(80))
    monkeypatch.chdir(tmp_path)
    arguments = ("eval", made / "small" / "model", "--tasks", "long.jsonl", "--loops", "1..3", "--batch-size", 2)
    command = [sys.executable, "-m", "looplm", *map(str, arguments), "--output", "out"]
    killed = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    answers = tmp_path / "out" / "answers"
    deadline = time.monotonic() + 200
    while not any(path.stat().st_size > 9_000 for path in answers.glob("*.jsonl")):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.002)
    killed.kill()
    killed.wait()
    assert not files(tmp_path / "out")
    kept = sum(path.stat().st_size for path in answers.glob("*.jsonl"))
    assert looplm_command(*arguments, "--output", "out")[0] == 0
    again = files(tmp_path / "out")
    (path,) = answers.glob("*.jsonl")
    assert path.stat().st_size > kept
    shutil.move("out", "first")  # the command line is in the recipe: the run that was not killed has the same one
    assert looplm_command(*arguments, "--output", "out")[0] == 0
    assert files(tmp_path / "out") == again and len(again) == 3


def test_few_shot_and_chat_template_change_the_prompts(looplm_eval, tmp_path):
    common = ("eval", "small/model", "--tasks", "choice.jsonl")
    for name, more in {"a": (), "b": ("--num-fewshot", 2), "c": ("--chat-template",)}.items():
        looplm_eval(*common, *more, "--output", tmp_path / name)
    recipes = [Result.load(tmp_path / name / "choice.loops-3.json").recipe for name in "abc"]
    assert len({recipe.prompts for recipe in recipes}) == 3 and len({recipe.data for recipe in recipes}) == 1
    assert recipes[1].num_fewshot == 2 and recipes[2].chat_template is not None


def test_compare_explains_and_refuses(looplm_eval, refused, tmp_path):
    common = ("eval", "small/model", "--tasks", "choice.jsonl", "--loops", "1,3")
    looplm_eval(*common, "--output", tmp_path / "a")
    looplm_eval(*common, "--output", tmp_path / "b", "--num-fewshot", 2)
    first, deep, other = (
        tmp_path / name for name in ("a/choice.loops-1.json", "a/choice.loops-3.json", "b/choice.loops-3.json")
    )
    out = looplm_eval("eval", "compare", first, deep, "--json", tmp_path / "found.json")
    assert "loops: 1 against 3" in out and "McNemar" in out and "shared items" in out
    assert json.loads((tmp_path / "found.json").read_text())["test"]["items"] == 24
    line = refused("eval", "compare", deep, other)
    assert "num_fewshot: 0 against 2" in line and "--anyway" in line
    assert "measured differently" in looplm_eval("eval", "compare", deep, other, "--anyway")
    assert refused("eval", "compare", deep, tmp_path / "none.json").startswith("no such result file")
    (tmp_path / "x.json").write_text("{}")
    assert refused("eval", "compare", deep, tmp_path / "x.json").endswith("is no result file of `looplm eval`")


def test_a_judge_that_stops_ends_with_one_line_and_goes_on_later(
    looplm_eval, refused, looplm_command, tmp_path, monkeypatch
):
    monkeypatch.setattr("looplm.evaluation.judges.PAUSES", ())
    with chat_server(lambda messages: "verdict: wrong" if len(server.requests) <= 2 else 503) as server:
        command = ("eval", "small/model", "--tasks", "free.jsonl", "--output", tmp_path, "--judge", server.url)
        code, _, err = looplm_command(*command)
        assert code == 2 and "4 answers of free.loops-3 wait for it: run the command again" in err
        assert Result.load(tmp_path / "free.loops-3.json").judge["waiting"] == 4
        server.answer = lambda messages: "verdict: correct"
        assert "judged" in looplm_eval(*command)
    final = Result.load(tmp_path / "free.loops-3.json")
    assert final.judge["waiting"] == 0 and final.metrics["judged"].value == 4 / 6


def test_other_policies_and_selecting_rules(looplm_eval, tmp_path):
    looplm_eval("eval", "small/model", "--tasks", "choice.jsonl", "--kv-policy", "last", "--output", tmp_path)
    out = looplm_eval("eval", "small/model", "--tasks", "choice.jsonl", "--exit", "kl=0.5", "--output", tmp_path)
    assert "save nothing" in out
    assert {result.name for result in load_results(tmp_path)} == {"choice.loops-3.last", "choice.kl-0.5-select"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "--tasks", "choice.jsonl"], "no such model: nowhere"),
        (["small/model", "--tasks", "a,,b"], "a name is empty in 'a,,b'"),
        (["small/model", "--tasks", "choice.jsonl", "--loops", "4..1"], "loops is '4..1'"),
        (["small/model", "--tasks", "choice.jsonl", "--exit", "q=2"], "exit_threshold is 2.0"),
        (["small/model", "--tasks", "choice.jsonl", "--exit", "mood=2"], "exit rule 'mood=2' is not known"),
        (["small/model", "--tasks", "choice.jsonl", "--limit", "0"], "--limit is 0"),
        (
            ["small/model", "--tasks", "choice.jsonl", "--num-fewshot", "24"],
            "24 examples, too few for num_fewshot 24",
        ),
        (["small/model", "--tasks", "free.jsonl", "--exit", "q=0.5"], "this task generates text"),
        (["small/model", "--tasks", "humaneval"], "allow it with --allow-code-execution"),
        (["small/model", "--tasks", "free.jsonl", "--judge", "me"], "judge is 'me'; give an address"),
        (
            ["small/model", "--tasks", "choice.jsonl", "--exit", "q=0.5", "--kv-policy", "last"],
            "selects, but kv_policy 'last' freezes: use exit mode freeze",
        ),
    ],
)
def test_refusals_write_nothing(refused, made, monkeypatch, tmp_path, arguments, said):
    monkeypatch.chdir(made)
    assert said in refused("eval", *arguments, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gate_exits_of_a_model_without_a_gate_for_each_token(refused, made, monkeypatch, tmp_path):
    save_pair(tmp_path / "pooled", exit_gate_pooling="causal_mean")
    monkeypatch.chdir(made)
    line = refused("eval", tmp_path / "pooled", "--tasks", "choice.jsonl", "--exit", "q=0.5", "--exit-mode", "freeze")
    assert "the model has no gate for each token (exit_gate_pooling is 'causal_mean')" in line


def test_the_depth_sweep_of_a_small_model(looplm_eval, tmp_path):
    common = ("study", "depth-sweep", "small/model", "--tasks", "choice.jsonl", "--loops", "1..5")
    out = looplm_eval(*common, "--output", tmp_path, "--beside-paper")
    assert "5 *" in out and "extrapolation" in out and "gain from loop 1 to loop 3" in out
    assert "the paper has no number for it" in out
    study = json.loads((tmp_path / "depth-sweep.json").read_text())
    (sweep,) = study["sweeps"]
    assert list(sweep["by_loop"]) == ["1", "2", "3", "4", "5"] and sweep["items"] == 24
    assert set(sweep["gains"]) == {"even", "odd", "all"} and sweep["gains"]["even"]["low"] is None
    assert "too few" in (tmp_path / "depth-sweep.md").read_text()
    assert (tmp_path / "depth-sweep.svg").read_text().startswith("<svg ")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    looplm_eval(*common, "--output", tmp_path, "--beside-paper")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
