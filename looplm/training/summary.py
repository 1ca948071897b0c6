"""What a finished run shows: tables and samples on the screen, and its report as plain JSON and one page.

The report is made from what the run left in metrics.jsonl, so it is the same for a run that was interrupted.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from looplm.training.report import save_report
from looplm.training.run import Run
from looplm.training.samples import held_out_prompts, say, write_samples
from looplm.training.tracking import read_metrics

MOST_STEPS = 2000
"""Records of steps that a report keeps; metrics.jsonl has all."""


def finish(title: str, command: str, run: Run, prompts: Sequence[str] | None, console: Console) -> dict[str, Any]:
    """Print what a run came to, write samples, and save report.json and report.html in its output folder.

    Args:
        title, command: of the report.
        prompts: to continue; by default how held-out documents begin.

    Returns:
        The report that was saved.
    """
    report, output = build_report(title, command, run), Path(run.recipe.output)
    if len(report["stages"]) > 1:
        console.print(stage_table(report))
    console.print(loop_table(report))
    for name, gate in report["gates"].items():
        console.print(comparison_table(name, gate))
    length = run.stages[-1].settings.sequence_length
    prompts = held_out_prompts(run.data) if prompts is None else prompts
    report["generations"] = write_samples(run.state.model, run.data, length, prompts, console)
    page = save_report(output, report)
    say(console, f"\nmodel   {output / 'model'}\nreport  {page}")
    return report


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
        "gates": {stage["name"]: stage["gate"] for stage in stages if stage["gate"] is not None},
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


def comparison_table(name: str, gate: Mapping[str, Any]) -> Table:
    """How the gates of a Stage II stage and the other rules compare at equal mean loops."""
    table = Table(title=f"{name}: loss difference at equal mean loops, nats a token (below 0: better)")
    for heading in ("rule", "against", "mean loops", "difference", "95 % interval"):
        table.add_column(heading, justify="left" if heading in ("rule", "against") else "right")
    for row in gate["frontier"]["comparisons"]:
        interval = " to ".join(f"{end:+.4f}" for end in row["interval"])
        table.add_row(row["curve"], row["baseline"], f"{row['loops']:g}", f"{row['difference']:+.4f}", interval)
    return table
