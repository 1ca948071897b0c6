"""Tables, figures and verdicts of `examples/rl_study.py`: docs/results/rl.md and the rows it is made from.

Differences are paired by seed (the same supervised model, the same problems in the same order); intervals and p-values
are those of the lab (`looplm.lab.statistics`). A question holds where all of its contrasts do, at 0.05 each: that needs
no correction for their number, and across questions none is made.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import rl_study

from looplm.files import write_json, write_text
from looplm.lab.figures import dot_chart, line_chart
from looplm.lab.statistics import interval, p_greater

Rows = dict[tuple[str, int], dict[str, Any]]
QUESTIONS = {
    2: "Fixed depth against the supervised model",
    3: "Sampled depth with a cost against fixed depths, and against calibrated exits at the same mean loops",
    4: "Credit for every loop against the last loop alone",
    5: "How the loss rises beyond its best number of loops, after SFT against before",
    6: "A model rewarded at four loops, at other numbers of loops",
}


def report(rules: dict[str, Any], root: Path, results: Path) -> None:
    """Write what the runs there are say."""
    rows = _rows(rules, root)
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / "rows.json", [_slim(row) for row in rows.values()])
    verdicts = _verdicts(rules, rows)
    write_json(results / "verdicts.json", verdicts)
    _figures(rules, rows, results)
    write_text(results.with_suffix(".md"), "\n".join(_page(rules, rows, verdicts)) + "\n")


def _rows(rules: dict[str, Any], root: Path) -> Rows:
    found: Rows = {}
    for arm in ("sft", *rules["arms"]):
        for seed in rules["seeds"]:
            folder = root / f"{rl_study.slug(arm)}-{seed}"
            if (folder / "row.json").is_file():
                row = json.loads((folder / "row.json").read_text("utf-8"))
                calibrated = folder / "calibrated.json"
                row["calibrated"] = json.loads(calibrated.read_text("utf-8")) if calibrated.is_file() else None
                found[arm, seed] = row
    return found


def _slim(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the outcomes of single problems."""
    if isinstance(row, dict):
        return {key: _slim(value) for key, value in row.items() if key not in ("outcomes", "depths")}
    return row


def _value(row: dict[str, Any], side: dict[str, Any]) -> float | None:
    """What a side of a contrast reads: an outcome, or how the loss rises beyond the best number of loops."""
    if "rise" in side:
        losses = row["losses"][side["rise"]]
        return float(losses[-1] - min(losses))
    if side.get("calibrated"):
        return None if row["calibrated"] is None else row["calibrated"]["outcome"]
    return (row["by_loops"][str(side["loops"])] if "loops" in side else row["own"])["outcome"]


def _verdicts(rules: dict[str, Any], rows: Rows) -> list[dict[str, Any]]:
    found = []
    for contrast in rules["contrasts"]:
        left, right = contrast["left"], contrast["right"]
        pairs = []
        for seed in rules["seeds"]:
            if (left["arm"], seed) in rows and (right["arm"], seed) in rows:
                values = [_value(rows[side["arm"], seed], side) for side in (left, right)]
                if None not in values:
                    pairs.append(values[0] - values[1])  # type: ignore[operator]
        if len(pairs) >= 2:
            low, high = interval(pairs)
            entry = {**contrast, "differences": pairs, "mean": statistics.fmean(pairs), "low": low, "high": high}
            found.append({**entry, "p": p_greater(pairs, contrast["margin"])})
    for entry in found:
        beyond = entry["mean"] > entry["margin"]
        entry["verdict"] = "holds" if entry["p"] < 0.05 else "in direction" if beyond else "does not hold"
    return found


def _figures(rules: dict[str, Any], rows: Rows, results: Path) -> None:
    arms = ["sft", *rules["arms"]]
    outcome = {arm: [rows[arm, s]["own"]["outcome"] for s in rules["seeds"] if (arm, s) in rows] for arm in arms}
    loops = {arm: [rows[arm, s]["own"]["mean_depth"] for s in rules["seeds"] if (arm, s) in rows] for arm in arms}
    write_text(results / "outcome.svg", dot_chart(outcome, "Held-out problems answered rightly", "share"))
    write_text(results / "loops.svg", dot_chart(loops, "Mean loops of a generated token", "loops"))
    sweep: dict[str, dict[float, list[float]]] = {}
    losses: dict[str, dict[float, list[float]]] = {}
    for (arm, _), row in rows.items():
        if arm in ("sft", "fixed 4", "sampled"):
            for at, measured in row["by_loops"].items():
                sweep.setdefault(arm, {}).setdefault(float(at), []).append(measured["outcome"])
        for when, each in row.get("losses", {}).items():
            for loop, loss in enumerate(each, start=1):
                losses.setdefault(f"{when} SFT", {}).setdefault(float(loop), []).append(loss)
    write_text(results / "sweep.svg", line_chart(sweep, "Outcome by loops at inference", "loops", "share"))
    write_text(results / "losses.svg", line_chart(losses, "Loss on held-out answers by loops", "loops", "nats"))


def _page(rules: dict[str, Any], rows: Rows, verdicts: list[dict[str, Any]]) -> list[str]:
    asked = max((len(row["own"]["outcomes"]) for row in rows.values()), default=0)
    seeds = ", ".join(map(str, rules["seeds"]))
    lines = ["# Reinforcement learning with depths", "", "```bash"]
    lines += [line.strip() for line in _command().splitlines()] + ["```", ""]
    lines += [
        f"Outcomes are shares of {asked} held-out problems answered rightly, greedily, at the depths of the arm's own",
        f"mode, for seeds {seeds} in this order; `sft` is what all arms of a seed begin with, at full depth.",
        "Intervals are 95 % by bootstrap over seeds; a contrast holds where p < 0.05. The rules are those of",
        "`examples/rl_study.yaml`.",
        "",
    ]
    lines += [*(f"![{name}](rl/{name}.svg)" for name in ("outcome", "loops", "sweep", "losses")), ""]
    lines += ["| arm | rate | outcome, every seed | mean | mean loops | tokens |", "|---|---|---|---|---|---|"]
    arms = {arm: [rows[arm, s] for s in rules["seeds"] if (arm, s) in rows] for arm in ("sft", *rules["arms"])}
    lines += [_line(arm, mine) for arm, mine in arms.items() if mine]
    lines += [_line(f"{arm}, calibrated", found) for arm, mine in arms.items() if (found := _calibrated(mine))]
    lines += ["", "All positions at a fixed number of loops, mean over seeds:", ""]
    lines += ["| arm | " + " | ".join(map(str, rules["loops"])) + " |", "|---" * (1 + len(rules["loops"])) + "|"]
    lines += [_swept(arm, mine, rules["loops"]) for arm, mine in arms.items() if mine]
    lines += ["", "## 1. Log-probabilities of the same tokens and exits, learner against rollout", ""]
    lines += ["| arm | largest difference | where the learner ignores the depths: mean, largest, outside the clip |"]
    lines += ["|---|---|---|", *(_agreement(arm, mine) for arm, mine in arms.items() if mine and arm != "sft")]
    for question, what in QUESTIONS.items():
        lines += ["", f"## {question}. {what}", ""]
        lines += ["| contrast | difference, every seed | mean (95 %) | margin | p | |", "|---|---|---|---|---|---|"]
        lines += [_contrast(entry) for entry in verdicts if entry["question"] == question]
    return lines


def _command() -> str:
    return "\n".join(line for line in (rl_study.__doc__ or "").splitlines() if line.startswith("    "))


def _calibrated(mine: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with what the paper's rule makes of these models, where that was measured."""
    return [{**row, "own": row["calibrated"]} for row in mine if row["calibrated"] is not None]


def _line(arm: str, mine: list[dict[str, Any]]) -> str:
    outcomes = [row["own"]["outcome"] for row in mine]
    cells = [
        arm,
        f"{mine[0]['rate']:g}" if "rate" in mine[0] else "",
        " ".join(f"{value:.3f}" for value in outcomes),
        f"{statistics.fmean(outcomes):.3f}",
        f"{statistics.fmean(row['own']['mean_depth'] for row in mine):.2f}",
        f"{statistics.fmean(row['own']['length'] for row in mine):.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _swept(arm: str, mine: list[dict[str, Any]], loops: list[int]) -> str:
    means = (statistics.fmean(row["by_loops"][str(at)]["outcome"] for row in mine) for at in loops)
    return f"| {arm} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |"


def _agreement(arm: str, mine: list[dict[str, Any]]) -> str:
    away = [value for row in mine for value in row["agreement"].values() if value is not None]
    ignoring = [row["ignoring_depths"] for row in mine if row["ignoring_depths"]]
    told = ""
    if ignoring:
        mean, outside = (statistics.fmean(found[what] for found in ignoring) for what in ("mean", "outside_clip"))
        told = f"{mean:.3f}, {max(found['largest'] for found in ignoring):.2f} nats, {outside:.1%}"
    return f"| {arm} | {max(away):.1e} | {told} |"


def _contrast(entry: dict[str, Any]) -> str:
    each = " ".join(f"{value:+.3f}" for value in entry["differences"])
    mean = f"{entry['mean']:+.3f} ({entry['low']:+.3f} to {entry['high']:+.3f})"
    sides = f"{_side(entry['left'])} above {_side(entry['right'])}"
    return f"| {sides} | {each} | {mean} | {entry['margin']:+.2f} | {entry['p']:.3f} | {entry['verdict']} |"


def _side(side: dict[str, Any]) -> str:
    if "rise" in side:
        return f"rise of the loss {side['rise']} SFT"
    at = f" at {side['loops']} loops" if "loops" in side else ", calibrated exits" if side.get("calibrated") else ""
    return side["arm"] + at
