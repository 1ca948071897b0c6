"""The command line from end to end: what it makes and prints, and one line with exit code 2 for every bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from small_run import read_lines, small_recipe, small_values
from transformers import GPT2Config

import looplm
from looplm.commands import generating
from looplm.training.run import train
from looplm.training.tracking import read_metrics

ROOT = Path(looplm.__file__).parent.parent
HEAVY = ("torch", "transformers", "grain", "datasets", "numpy", "looplm.exits", "looplm.training.run")


def write_recipe(folder: Path, **sections) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_values(folder, **sections)))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a small trained model with a context of 64 tokens."""
    recipe = small_recipe(tmp_path_factory.mktemp("cli"))
    train(recipe)
    return Path(recipe.output) / "model"


# ---- what works


def fresh(code: str, *arguments: str) -> str:
    """Standard output of code in a fresh interpreter, with looplm's arguments in sys.argv."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


INSPECT = f"""
import sys
from looplm.cli import main
try:
    main()
except SystemExit as end:
    print("exit code", end.code)
print("loaded", [name for name in {HEAVY!r} if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], ["demo", "train", "data", "generate", "The toolkit for looped language models"]),
        (["demo", "--help"], ["--minutes", "--output", "runs/demo"]),
        (["retrofit", "--help"], ["--core", "--choose", "--loops", "--text"]),
        (["upcycle", "--help"], ["--layers", "--arrangement", "--loops", "--text"]),
        (["convert", "--help"], ["--output", "--dtype", "ChatML"]),
        (["verify", "--help"], ["--text", "--json"]),
        (["train", "--help"], ["a YAML recipe", "--output", "--dry-run"]),
        (["sft", "--help"], ["a YAML recipe", "--output"]),
        (["grpo", "--help"], ["a YAML recipe", "--output"]),
        (["merge", "--help"], ["ADAPTER", "--output", "--model"]),
        (["data", "--help"], ["{prepare}", "a YAML recipe", "--workers", "--anew"]),
        (["bench", "--help"], ["--batches", "--exit-threshold", "--json"]),
        (["generate", "--help"], ["--prompt", "--exit-threshold", "--loops", "--json", "--seed"]),
        (["trace", "--help"], ["--prompt", "--html", "--json", "--loops", "--top-k"]),
        (["lab", "--help"], ["list", "Describe each task: what it asks"]),
        (["lab", "list", "--help"], ["TASK", "--scale", "{laptop,paper}"]),
        (["lab", "run", "--help"], ["TASK", "--layers", "--loops", "--seeds", "--scale", "--matched"]),
        (["lab", "claims", "--help"], ["--only", "--quick", "--workers"]),
        (["study", "exit-frontier", "--help"], ["MODEL", "--untrained-gate", "--items", "--rules"]),
        (["calibrate", "--help"], ["MODEL", "--target", "loss-increase=0.5%", "--delta"]),
        (["eval", "report", "--help"], ["DIR"]),
        (["eval", "run", "--help"], ["MODEL", "--tasks", "--loops", "--exit-mode", "--kv-policy", "--judge"]),
        (["eval", "compare", "--help"], ["--anyway", "--second-metric"]),
        (["study", "depth-sweep", "--help"], ["--tasks", "--loops", "--beside-paper"]),
    ],
)
def test_help_loads_no_heavy_library(arguments, shown):
    out = fresh(INSPECT, *arguments)
    assert all(text in out for text in shown) and "exit code 0" in out and "loaded []" in out


@pytest.mark.parametrize(
    "arguments",
    [["train"], ["dance"], ["generate", "x", "--prompt", "y", "--loops", "many"], ["train", "nowhere.yaml"]],
)
def test_wrong_arguments_are_refused_before_a_heavy_library_is_loaded(arguments):
    out = fresh(INSPECT, *arguments)
    assert "exit code 2" in out and "loaded []" in out


def test_values_out_of_range_are_refused_before_a_heavy_library_is_loaded():
    out = fresh(INSPECT, "generate", "x", "--prompt", "y", "--top-p", "2")
    assert "exit code 2" in out and "loaded []" in out


def test_python_dash_m():
    command = [sys.executable, "-m", "looplm", "train", "nowhere.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "looplm: no such recipe: nowhere.yaml; see recipes/demo.yaml for an example\n"


def test_train_then_generate_as_real_processes(tmp_path):
    recipe = write_recipe(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*arguments) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "looplm", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    trained = run("train", recipe)
    assert trained.returncode == 0, trained.stderr
    assert "Traceback" not in trained.stderr and "Warning" not in trained.stderr and "jax" not in trained.stderr
    generated = run("generate", tmp_path / "out" / "model", "--prompt", "the union", "--max-new-tokens", 4)
    assert (generated.returncode, generated.stderr) == (0, "")
    assert generated.stdout.startswith("the union") and generated.stdout.endswith("3.00 loops a token\n")


def test_train_writes_model_metrics_recipe_and_report(looplm_command, tmp_path):
    code, out, err = looplm_command("train", write_recipe(tmp_path))
    assert code == 0, err
    folder = tmp_path / "out"
    files = {"model", "metrics.jsonl", "recipe.yaml", "report.json", "report.html"}
    assert {p.name for p in folder.iterdir()} == files | {"data", "checkpoints"}
    assert "beyond training" in out and f"model   {folder}/model\nreport  {folder}/report.html\n" in out
    report = json.loads((folder / "report.json").read_text())
    assert report["title"] == f"looplm train {tmp_path}/recipe.yaml" == report["command"]
    assert read_lines(folder / "metrics.jsonl")
    code, out, _ = looplm_command("generate", folder / "model", "--prompt", "the union", "--max-new-tokens", 3)
    assert code == 0 and out.startswith("the union")


def test_output_overrides_the_recipe(looplm_command, tmp_path):
    other = tmp_path / "other [x]"
    code, out, err = looplm_command("train", write_recipe(tmp_path, stage={"steps": 2}), "--output", other)
    assert code == 0, err
    assert (other / "model").is_dir() and not (tmp_path / "out").exists()
    assert yaml.safe_load((other / "recipe.yaml").read_text())["output"] == str(other)
    assert f"report  {other}/report.html\n" in out


def test_training_again_gives_the_same_losses(looplm_command, tmp_path):
    recipe, runs = write_recipe(tmp_path), []
    for name in "ab":
        assert looplm_command("train", recipe, "--output", tmp_path / name)[0] == 0
        metrics = read_metrics(tmp_path / name / "metrics.jsonl")
        runs.append(([{**record, "minutes": 0} for record in metrics["step"]], metrics["evaluation"]))
    assert runs[0] == runs[1]


def generate(run, model, *more):
    code, out, err = run("generate", model, "--prompt", "the union", "--max-new-tokens", 6, *more)
    assert (code, err) == (0, ""), err
    return out


def test_json_output(looplm_command, model):
    result = json.loads(generate(looplm_command, model, "--json"))
    assert result["prompt"] == "the union" and len(result["tokens"]) <= 6
    assert {token["depth"] for token in result["tokens"]} == {3} and result["mean_depth"] == 3.0


@pytest.mark.parametrize(
    ("options", "depths"), [(["--loops", 1], {1}), (["--loops", 2], {2}), (["--exit-threshold", 1], {3})]
)
def test_depth_options(looplm_command, model, options, depths):
    result = json.loads(generate(looplm_command, model, "--json", *options))
    assert {token["depth"] for token in result["tokens"]} == depths


def test_an_exit_threshold_leaves_early(looplm_command, model):
    options = ["--json", "--exit-threshold", 0.01, "--temperature", 0]
    tokens = json.loads(generate(looplm_command, model, *options))["tokens"]
    assert [token["depth"] for token in tokens] == [3] + [1] * (len(tokens) - 1)  # the prompt ran to full depth


def test_the_seed_decides_the_sample(looplm_command, model):
    def texts(seed):
        options = ["--json", "--seed", seed, "--temperature", 2, "--top-p", 1]
        return [token["text"] for token in json.loads(generate(looplm_command, model, *options))["tokens"]]

    assert texts(1) == texts(1) and len({tuple(texts(seed)) for seed in range(4)}) > 1


def test_plain_output_has_superscripts(looplm_command, model):
    out = generate(looplm_command, model)
    assert out.startswith("the union") and "³" in out and out.endswith("\n3.00 loops a token\n") and "\x1b" not in out


def test_a_terminal_gets_colours_and_the_prompt_as_it_is(monkeypatch, capsys):
    import rich.console

    monkeypatch.setattr(
        rich.console, "Console", lambda: Console(force_terminal=True, color_system="truecolor", width=60)
    )
    generating._show("a [b] :smile: ", [("x" * 80, 1), ("y", 3)], 2.0, 3, as_json=False, budget=None)
    out = capsys.readouterr().out
    assert "a [b] :smile: " in out and ";48;2;" in out and "x" * 80 in out and "2.00 loops a token" in out


# ---- what does not: each bad input is one line, exit code 2, and nothing half-written


def train_refused(refused, folder: Path, **sections) -> str:
    """The line for a recipe; nothing but the corpus and the recipe itself may be there afterwards."""
    path = write_recipe(folder, **sections)
    before = sorted(folder.rglob("*"))
    line = refused("train", path)
    assert sorted(folder.rglob("*")) == before
    return line


def test_a_missing_file(refused, tmp_path):
    line = train_refused(refused, tmp_path, data={"sources": {"x": {"location": "nowhere.txt"}}})
    assert line.startswith("source x: no such file or folder: nowhere.txt; give an existing path")


def test_a_missing_recipe(refused, tmp_path):
    assert refused("train", tmp_path / "r.yaml") == (
        f"no such recipe: {tmp_path}/r.yaml; see recipes/demo.yaml for an example"
    )


def test_an_empty_corpus(refused, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n\n")
    line = train_refused(refused, tmp_path, data={"sources": {"x": {"location": str(empty)}}})
    assert line == "source x: corpus is empty: no text; give at least one document"


def test_a_corpus_smaller_than_one_sequence(looplm_command, tmp_path):
    small = tmp_path / "small.txt"
    small.write_text("the union of states shall make peace\n")
    recipe = write_recipe(tmp_path, data={"sources": {"x": {"location": str(small)}}})
    code, out, err = looplm_command("train", recipe)
    assert (code, out) == (2, "")  # known when the text is tokenised, so that is said, and stays
    assert err.splitlines()[-1] == (
        "looplm: source x: corpus has 7 tokens, fewer than one sequence of 33: use more text or a shorter sequence"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["data"]


def test_an_unknown_recipe_key(refused, tmp_path):
    line = train_refused(refused, tmp_path, defaults={"learning_rte": 1})
    assert line == f"{tmp_path}/recipe.yaml: unknown key 'defaults.learning_rte'; did you mean 'learning_rate'?"


def test_a_value_out_of_range(refused, tmp_path):
    line = train_refused(refused, tmp_path, defaults={"learning_rate": -1})
    assert line == f"{tmp_path}/recipe.yaml: defaults.learning_rate is -1: Input should be greater than 0"


@pytest.mark.parametrize(
    "sections",
    [
        {"defaults": {"betas": [0.9, 1.0]}},
        {"model": {"num_key_value_heads": 3}},
        {"defaults": {"sequence_length": 65}},
        {"tokenizer": {"pretrained": "./nowhere"}},
        {"output": ""},
    ],
)
def test_other_recipes_that_cannot_run(refused, tmp_path, sections):
    train_refused(refused, tmp_path, **sections)


def test_a_recipe_that_is_not_yaml(refused, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("a: [1,\n\tb")
    assert refused("train", path).startswith(f"{path}: not valid YAML: ")


def test_an_output_that_cannot_be_made(refused, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("mine")
    line = refused("train", write_recipe(tmp_path), "--output", blocked / "out")
    assert str(blocked) in line and blocked.read_text() == "mine"


def generate_refused(refused, model, *more, prompt="the union") -> str:
    return refused("generate", model, "--prompt", prompt, *more)


def test_a_folder_that_is_not_a_model(refused, tmp_path):
    assert generate_refused(refused, tmp_path) == f"{tmp_path} is not a model folder: it has no config.json"
    GPT2Config().save_pretrained(tmp_path)
    assert generate_refused(refused, tmp_path) == f"{tmp_path} is a 'gpt2' model; looplm runs 'ouro' models"


def test_a_model_that_is_not_there(refused):
    assert generate_refused(refused, "nowhere").startswith("no such model: nowhere is no folder here")


def test_a_model_with_a_nan_weight(refused, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    line = generate_refused(refused, folder)
    assert line.startswith(f"{folder}: weight model.layers.1.mlp.up_proj.weight holds NaN or infinity; ")


def test_a_prompt_longer_than_the_context(refused, model):
    line = generate_refused(refused, model, "--max-new-tokens", 4, prompt="union " * 200)
    assert line.startswith("the prompt has ") and "and 4 are to come, but the context holds 64; shorten" in line


def test_an_empty_prompt(refused, model):
    assert generate_refused(refused, model, prompt="") == "the prompt is empty; give some text to continue"


@pytest.mark.parametrize(
    ("option", "value", "accepted"),
    [
        ("--exit-threshold", "1.5", "it must lie in (0, 1]"),
        ("--exit-threshold", "0", "it must lie in (0, 1]"),
        ("--exit-threshold", "nan", "it must lie in (0, 1]"),
        ("--loops", "0", "it must be at least 1"),
        ("--max-new-tokens", "0", "it must be at least 1"),
        ("--temperature", "-1", "it must be 0 (greedy) or lie in [0.01, 100]"),
        ("--temperature", "nan", "it must be 0 (greedy) or lie in [0.01, 100]"),
        ("--temperature", "1e-30", "it must be 0 (greedy) or lie in [0.01, 100]"),
        ("--top-p", "0", "it must lie in (0, 1]"),
        ("--top-p", "1.1", "it must lie in (0, 1]"),
        ("--seed", "-1", "it must lie in 0..4294967295"),
    ],
)
def test_options_of_generate_out_of_range(refused, option, value, accepted):
    line = generate_refused(refused, "never-looked-at", option, value)
    assert line.startswith(f"{option} is ") and line.endswith(accepted)


def test_two_kinds_of_depth_at_once(refused):
    line = generate_refused(refused, "never-looked-at", "--loops", 2, "--exit-threshold", 0.5)
    assert line == "--exit-threshold and --loops exclude each other: choose one way to set the depth"


@pytest.mark.parametrize("minutes", ["1", "nan", "inf", "-3"])
def test_a_demo_of_no_length(refused, tmp_path, minutes):
    line = refused("demo", "--minutes", minutes, "--output", tmp_path / "demo")
    assert line.startswith(f"minutes is {minutes}; the demo needs at least 2") and not (tmp_path / "demo").exists()


# ---- what goes wrong by itself


def test_a_loss_that_is_not_finite_ends_with_code_1_and_names_the_step(looplm_command, tmp_path):
    recipe = write_recipe(tmp_path, defaults={"learning_rate": 1e30, "warmup_steps": 0})
    code, out, err = looplm_command("train", recipe)
    assert (code, out) == (1, "") and "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("looplm: stage 1 only, step 1: ") and last.endswith(
        "lower learning_rate or raise warmup_steps"
    )
    assert not (tmp_path / "out" / "model").exists() and not (tmp_path / "out" / "report.html").exists()
    assert [record["step"] for record in read_lines(tmp_path / "out" / "metrics.jsonl")] == [0]


def test_an_interrupt_is_said_in_one_line(looplm_command, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("looplm.training.recipe.load_recipe", interrupted)
    assert looplm_command("train", "x.yaml") == (130, "", "looplm: interrupted\n")


def test_a_message_of_several_lines_becomes_one(looplm_command, monkeypatch):
    def fail(path):
        raise ValueError("first\n  second\n")

    monkeypatch.setattr("looplm.training.recipe.load_recipe", fail)
    assert looplm_command("train", "x.yaml") == (2, "", "looplm: first second\n")


def test_a_fault_of_ours_is_not_hidden(looplm_command, monkeypatch):
    def fail(path):
        raise KeyError("a bug")

    monkeypatch.setattr("looplm.training.recipe.load_recipe", fail)
    with pytest.raises(KeyError):
        looplm_command("train", "x.yaml")
