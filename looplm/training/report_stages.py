"""The sections of a report that are about stages: what each left, the warnings on the way, and the gates (Stage II)."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from looplm.display import printable
from looplm.training.charts import frontier_chart
from looplm.training.tracking import short

Stage = Mapping[str, Any]


def stages_section(stages: Sequence[Stage]) -> str:
    """A table of the validation loss after every loop at the end of every stage; "" for a run of one."""
    if len(stages) < 2:
        return ""
    deepest = max(len(stage["final"]["losses"]) for stage in stages)
    heads = ["Stage", "Layers × loops", "Sequence", "Tokens", *(f"Loop {loop}" for loop in range(1, deepest + 1))]
    return section(
        "Stage by stage",
        "Validation loss after every loop at the end of every stage, in nats per token. A star marks loops beyond the "
        "stage's own. Stages with longer sequences have more context for the same text.",
        table("Measured on the validation text of all sources.", heads, [_stage_row(s, deepest) for s in stages]),
    )


def _stage_row(stage: Stage, deepest: int) -> list[str]:
    losses = [
        _number(loss, ".3f") + ("*" if loop > stage["loops"] else "")
        for loop, loss in enumerate(stage["final"]["losses"], start=1)
    ]
    shape = f"{stage['layers']} × {stage['loops']}"
    facts = [stage["name"], shape, f"{stage['sequence_length']:,}", short(stage["tokens"])]
    return [*facts, *losses, *[""] * (deepest - len(losses))]


def warnings_section(warnings: Sequence[Mapping[str, Any]]) -> str:
    """What was warned of, with the stage and the step."""
    items = "".join(
        f"<li>{_text(warning['stage'])}, step {_text(warning['step'])}: {_text(warning['text'])}</li>"
        for warning in warnings
    )
    return f"<section><h2>Said on the way</h2><ul>{items}</ul></section>" if items else ""


def gates_section(gates: Mapping[str, Mapping[str, Any]]) -> str:
    """Of every stage that fitted the gate: the frontier as a figure, its comparisons, the fits."""
    return "".join(_gate(name, gate) for name, gate in gates.items())


def _gate(name: str, gate: Mapping[str, Any]) -> str:
    frontier = gate["frontier"]
    caption = (
        f"Loss above full depth, nats per token, over {frontier['windows']:,} validation windows "
        f"({frontier['tokens']:,} tokens); lower and further left is better. Bars: 95 % intervals."
    )
    chart = frontier_chart({name: _whole(points) for name, points in frontier["curves"].items()})
    figure = f'<div class="charts"><figure>{chart}<figcaption>{caption}</figcaption></figure></div>' if chart else ""
    rows = [_comparison_row(comparison) for comparison in frontier["comparisons"]]
    heads = ["Rule", "Against", "Mean loops", "Difference", "95 % interval", "Verdict"]
    compared = table("Loss differences at equal mean loops, nats per token; below 0 is better.", heads, rows)
    fits = table(
        "The fits; hazards are the gate's mean probability to stop after each loop.",
        ["Target", "Loss before", "Loss after", "Hazards before", "Hazards after"],
        [_fit_row(target, fit) for target, fit in gate["fits"].items()],
    )
    text = "What stopping early costs: each gate at several thresholds, fixed depths, and one confidence rule."
    return section(f"Where to stop ({_text(name)})", text, figure + compared + fits)


def _whole(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The points of a curve that lack no number."""
    return [
        point for point in points if None not in (point["loops"], point["above_full"], *point["above_full_interval"])
    ]


def _comparison_row(comparison: Mapping[str, Any]) -> list[str]:
    low, high = comparison["interval"]
    known = low is not None and high is not None
    verdict = ("better" if high < 0 else "worse" if low > 0 else "level") if known else ""
    interval = f"{_number(low, '+.4f')} to {_number(high, '+.4f')}"
    numbers = [_number(comparison["loops"], "g"), _number(comparison["difference"], "+.4f"), interval]
    return [comparison["curve"], comparison["baseline"], *numbers, verdict]


def _fit_row(target: str, fit: Mapping[str, Any]) -> list[str]:
    hazards = [" ".join(_number(hazard, ".2f") for hazard in fit[f"hazards_{when}"]) for when in ("before", "after")]
    return [target, _number(fit["loss_before"], ".4f"), _number(fit["loss_after"], ".4f"), *hazards]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def section(title: str, text: str, body: str) -> str:
    """A section of the page; `title`, `text` and `body` are HTML."""
    return f"<section><h2>{title}</h2><p>{text}</p>{body}</section>"


def table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column names the rows; all of it is text."""
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(caption)}"><table>'
        f"<caption>{_text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _text(value: object) -> str:
    return escape(printable(str(value)))
