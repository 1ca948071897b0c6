"""A run's report as plain JSON, from what it left in metrics.jsonl: so it can be written again at any time."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from looplm.training.run import Run
from looplm.training.tracking import read_metrics

MOST_STEPS = 2000
"""Records of steps that a report keeps; metrics.jsonl has all."""


def build_report(title: str, command: str, run: Run) -> dict[str, Any]:
    """The report of a finished run (see `looplm.training.report`), without generations."""
    metrics = read_metrics(Path(run.recipe.output) / "metrics.jsonl")
    stages, config = metrics["stage_result"], run.state.model.config
    every = -(-len(metrics["step"]) // MOST_STEPS) or 1
    return {
        "title": title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "recipe": run.recipe.model_dump(mode="json"),
        "model": {
            "parameters": run.stages[-1].parameters,
            "layers": config.num_hidden_layers,
            "loops": config.total_ut_steps,
            "width": config.hidden_size,
            "vocabulary": config.vocab_size,
        },
        "data": run.data.summary(),
        "training": {
            "steps": sum(stage["steps"] for stage in stages),
            "tokens": run.state.tokens,
            "minutes": sum(stage["minutes"] for stage in stages),
            "compiled": stages[-1]["compiled"],
            "autocast": stages[-1]["autocast"],
        },
        "stages": stages,
        "history": metrics["step"][::every],
        "evaluations": metrics["evaluation"],
        "warnings": metrics["warning"],
        "loops": _loops(stages[-1]["final"], config.total_ut_steps),
        "expected_depth": stages[-1]["final"]["expected_depth"],
        "generations": [],
    }


def _loops(final: Mapping[str, Any], trained: int) -> list[dict[str, Any]]:
    """One row a loop of the last evaluation."""
    pairs = zip(final["losses"], final["bits_per_character"], strict=True)
    return [
        {
            "loop": loop,
            "loss": loss,
            "bits_per_character": bits,
            "exit_probability": final["exit_probabilities"][loop - 1] if loop <= trained else None,
        }
        for loop, (loss, bits) in enumerate(pairs, start=1)
    ]


def loop_table(report: Mapping[str, Any]) -> Table:
    """Validation loss and exit probability by loop."""
    trained = report["model"]["loops"]
    table = Table(title=f"validation, expected depth {report['expected_depth']:.2f} of {trained} loops")
    for heading in ("loop", "nats a token", "bits a character", "mean exit probability"):
        table.add_column(heading, justify="right")
    for row in report["loops"]:
        name = f"{row['loop']}" if row["loop"] <= trained else f"{row['loop']} (beyond training)"
        share = "" if row["exit_probability"] is None else f"{row['exit_probability']:.3f}"
        table.add_row(name, f"{row['loss']:.4f}", f"{row['bits_per_character']:.4f}", share)
    return table


def stage_table(report: Mapping[str, Any]) -> Table:
    """Validation loss after every loop, one row a stage."""
    deepest = max(len(stage["final"]["losses"]) for stage in report["stages"])
    table = Table(title="validation loss by loop, nats a token, at the end of every stage (* beyond its loops)")
    for heading in ("stage", "layers x loops", "tokens", *(f"loop {t}" for t in range(1, deepest + 1))):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage in report["stages"]:
        losses = [
            f"{loss:.3f}" + ("*" if loop > stage["loops"] else "")
            for loop, loss in enumerate(stage["final"]["losses"], start=1)
        ]
        table.add_row(stage["name"], f"{stage['layers']} x {stage['loops']}", f"{stage['tokens']:,}", *losses)
    return table
