"""Stage II as a stage of a recipe: after other stages, nothing but the gate changes, and everything is reported."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from small_run import encoded, small_recipe
from transformers import AutoModelForCausalLM

from looplm.data.pipeline import Windows
from looplm.training import samples
from looplm.training.gate_stage import _windows
from looplm.training.run import train
from looplm.training.summary import finish
from looplm.training.tracking import read_metrics

GATE = {"tokens": 150, "epochs": 3, "batch_size": 64}
STAGES = [
    {"name": "1a", "steps": 40, "exit_beta": 0.3, "batch_tokens_start": 64, "batch_ramp_steps": 4},
    {"name": "1b", "steps": 30, "loops": 2, "upcycle": {"num_hidden_layers": 4}},
    {"name": "anneal", "steps": 8, "final_learning_rate": 1e-4, "decay": "cosine"},
    {"name": "long", "steps": 4, "sequence_length": 64, "rope_theta": 1e6},
    {"name": "mid", "steps": 12, "mixture": {"words": 1, "sums": 1}, "separate_documents": True},
    {"name": "gate", "gate": GATE, "evaluation_windows": 8},
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run through every kind of stage, with its report."""
    folder = tmp_path_factory.mktemp("all")
    recipe = small_recipe(folder)
    sums = {"location": "arithmetic", "messages_field": "messages", "limit": 60}
    sources = {**recipe.data.model_dump()["sources"], "sums": sums}
    stages = [{"mixture": {"words": 1}, **stage} for stage in STAGES]
    model = {"total_ut_steps": 4, "max_position_embeddings": 96}
    recipe = small_recipe(folder, data={"sources": sources}, stages=stages, model=model)
    run = train(recipe)
    console = Console(record=True, width=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "MAX_NEW_TOKENS", 4)
        report = finish("all stages", "looplm train all.yaml", run, None, console)
    return run, report, console.export_text()


def test_only_the_gate_changes(finished):
    run, _, _ = finished
    out = Path(run.recipe.output)
    before, after = (AutoModelForCausalLM.from_pretrained(out / name) for name in ("stage-5-mid", "model"))
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]) is ("early_exit_gate" not in name), name


def test_the_kept_gate_is_that_of_the_stages_own_target(finished):
    run, _, _ = finished
    fits = run.results[-1].gate["fits"]
    assert list(fits) == ["published", "lookahead"]  # its own last
    for target, fit in fits.items():
        assert fit["target"] == target and fit["tokens"] == 150 and fit["loss_after"] < fit["loss_before"]
        assert fit["hazards_before"] == fits["published"]["hazards_before"]  # both from Stage I's gate
    p = run.results[-1].final.exit_probabilities
    assert p[0] == pytest.approx(fits["lookahead"]["hazards_after"][0], abs=0.1) and sum(p) == pytest.approx(1)


def test_every_step_of_both_fits_is_logged(finished):
    run, _, _ = finished
    records = read_metrics(Path(run.recipe.output) / "metrics.jsonl")["gate"]
    steps = 3 * 3  # epochs times batches of 64 of 150 tokens
    assert [(r["target"], r["step"]) for r in records] == [
        (target, step) for target in ("published", "lookahead") for step in range(steps)
    ]
    assert all(len(record["hazards"]) == 2 and record["stage"] == "gate" for record in records)


def test_the_report_has_stages_frontier_and_samples(finished):
    run, report, screen = finished
    names = [stage["name"] for stage in STAGES]
    assert [stage["name"] for stage in report["stages"]] == names
    frontier = report["gates"]["gate"]["frontier"]
    curves = ["static depth", "Stage I gate", "Stage II published", "Stage II lookahead", "max probability"]
    assert list(frontier["curves"]) == curves
    assert frontier["windows"] >= 2 and {c["curve"] for c in frontier["comparisons"]} == set(curves[1:])
    page = (Path(run.recipe.output) / "report.html").read_text()
    for text in ("Stage by stage", "Where to stop (gate)", "Stage II lookahead", "4 × 2", "What it writes"):
        assert text in page
    assert all(name in screen for name in names) and "loss difference at equal mean loops" in screen
    assert report == json.loads((Path(run.recipe.output) / "report.json").read_text())
    prompts = {prompt["prompt"] for entry in report["generations"] for prompt in entry["prompts"]}
    assert any(prompt.endswith("<|im_start|>assistant\n") for prompt in prompts)


def test_chat_was_read_where_the_mixture_asks_for_it(finished):
    run, _, _ = finished
    records = read_metrics(Path(run.recipe.output) / "metrics.jsonl")
    sums = [record["source_tokens"].get("sums", 0) for record in records["step"]]
    mid = [record["stage"] for record in records["step"]].index("mid")
    assert set(sums[:mid]) == {0} and sums[-1] == 12 * 128 / 2
    assert set(records["evaluation"][-1]["source_losses"]) == {"words", "sums"}


def test_the_frontier_is_scored_on_windows_from_all_over_every_source():
    validation = {name: Windows(encoded([81]), 8, keep_remainder=True) for name in "ab"}  # 10 windows each
    batches = _windows(validation, 3, 7)
    assert [len(batch["labels"]) for batch in batches] == [3, 1, 3, 1]
    for number, index in enumerate((0, 2, 5, 7)):
        expected = torch.tensor(validation["b"][index]["input_ids"])
        assert torch.equal(batches[2 + number // 3]["input_ids"][number % 3], expected)
    assert sum(len(batch["labels"]) for batch in _windows(validation, 4, 1000)) == 20


def test_a_run_that_is_finished_does_nothing_more(finished):
    run, _, _ = finished
    metrics = Path(run.recipe.output) / "metrics.jsonl"
    before = metrics.read_text()
    again = train(run.recipe)
    assert metrics.read_text() == before
    assert [result.name for result in again.results] == [stage["name"] for stage in STAGES]
