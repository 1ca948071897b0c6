"""Everything measured of one model on one page: the tables, figures and recipes of its results, without new runs.

`report_pages` reads every JSON file of a folder (and below) that holds a recipe, gathers them by the model's
fingerprint, and makes one self-contained HTML page a model. Figures are the SVG files beside the JSON, except the exit
frontier, which is drawn anew with the calibrated point ringed, where a calibration of the same model is among the
results.
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from looplm.display import printable
from looplm.evaluation.calibration import calibrated_point
from looplm.evaluation.frontier_tables import text_chart
from looplm.evaluation.paper import published
from looplm.evaluation.results import KIND
from looplm.evaluation.results import Result as TaskResult
from looplm.evaluation.saving import standalone
from looplm.evaluation.showing import paper_table
from looplm.files import write_text
from looplm.training.report import page
from looplm.training.report_stages import section, table

ORDER = ("depth-sweep", "perplexity", "exit-frontier", "calibrate", "kv-sharing", "faithfulness", "safety")
"""How studies follow each other; others come behind, by name."""

TITLES = {
    "depth-sweep": "Score by loop",
    "perplexity": "Loss by loop",
    "exit-frontier": "Where to stop",
    "calibrate": "Calibrated thresholds",
    "kv-sharing": "Sharing keys and values",
    "faithfulness": "When the answer is decided",
    "safety": "Harmful completions by loop",
}

STYLE = "td{white-space:nowrap}details table{margin-bottom:1rem}"
"""What the page adds to that of a training run."""

FOLDED = 16
"""Tables of more rows are folded."""

Result = Mapping[str, Any]


def report_pages(folder: str | Path) -> list[Path]:
    """Write a page a model into `folder`: report.html, or report-MODEL.html each where there are several.

    Raises:
        ValueError: no such folder, or no result in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is no folder; give the one that `looplm eval` or `looplm study` wrote its results to"
        )
    models: dict[str, list[tuple[Path, Result]]] = {}
    for path in sorted(folder.rglob("*.json")):
        result = _result(path)
        if result is not None:
            models.setdefault(result["recipe"]["fingerprint"], []).append((path, result))
    if not models:
        raise ValueError(f"{folder} holds no results: no JSON file with a recipe; run `looplm eval` or `looplm study`")
    pages = []
    for fingerprint, results in models.items():
        name = str(results[0][1]["recipe"]["model"])
        stem = "report" if len(models) == 1 else f"report-{re.sub(r'[^A-Za-z0-9.-]+', '-', name)}-{fingerprint[:8]}"
        pages.append(folder / f"{stem}.html")
        write_text(pages[-1], render_page(results))
    return pages


def _result(path: Path) -> Result | None:
    """A result with a recipe; None for other JSON."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    recipe = value.get("recipe") if isinstance(value, dict) else None
    return value if isinstance(recipe, dict) and {"model", "fingerprint"} <= set(recipe) else None


def render_page(results: Sequence[tuple[Path, Result]]) -> str:
    """The page of one model as HTML.

    Args:
        results: of that model, with where each was read.
    """
    recipe = results[0][1]["recipe"]
    ordered = sorted(results, key=lambda pair: (_place(pair[1]), str(pair[0])))
    calibrated = _calibrated([result for _, result in results])
    tasks = [(path, result) for path, result in ordered if result.get("kind") == KIND]
    studies = [(path, result) for path, result in ordered if result.get("kind") != KIND]
    body = _tasks(tasks) + "".join(_section(path, result, calibrated) for path, result in studies)
    loops = f"{recipe.get('loops')} loops · " if recipe.get("loops") else ""
    subtitle = f"{loops}{recipe.get('dtype', '')} · fingerprint {str(recipe['fingerprint'])[:12]}"
    return page(
        title=_text(f"What {recipe['model']} can do, at every depth"),
        subtitle=_text(subtitle),
        loops=body,
        palette=STYLE,
    )


def _study(result: Result) -> str:
    return str(result.get("study") or result["recipe"].get("task") or "result")


def _place(result: Result) -> tuple[int, str]:
    study = _study(result)
    return (ORDER.index(study) if study in ORDER else len(ORDER), study)


def _calibrated(results: Sequence[Result]) -> dict[str, Any] | None:
    """The calibrated point of the first calibration that has one."""
    found = (calibrated_point(r.get("rules", {}).values(), r["target"]) for r in results if _study(r) == "calibrate")
    return next((point for point in found if point is not None), None)


def _tasks(results: Sequence[tuple[Path, Result]]) -> str:
    """What `looplm eval` measured: a row a task, depth and metric, and the paper's numbers of the same tasks."""
    rows = []
    for _, result in results:
        recipe, cost = result["recipe"], result.get("cost") or {}
        rule, mode = recipe.get("exit_rule"), recipe.get("exit_mode")
        depth = f"{rule}, {mode}" if rule else f"{recipe['loops']} loops"
        loops = "–" if cost.get("loops_read") is None else f"{cost['loops_read']:.2f}"
        for name, metric in result["metrics"].items():
            error = "" if metric.get("stderr") is None else f" ± {metric['stderr']:.4f}"
            rows.append([str(recipe.get("task")), depth, name, f"{metric['value']:.4f}{error}", loops])
    if not rows:
        return ""
    caption = "Scores with their standard errors; the loops are means over the positions that were read."
    shown = table(caption, ["Task", "Depth", "Metric", "Score", "Loops read"], rows)
    known = [TaskResult.load(path) for path, result in results if published(result["group"])]
    shown += _table(paper_table(known).as_dict()) if known else ""
    return section("Tasks", "", shown + "".join(_recipe(result["recipe"], result["name"]) for _, result in results))


def _section(path: Path, result: Result, calibrated: Mapping[str, Any] | None) -> str:
    """One result: its figures, its tables, its recipe folded."""
    study = _study(result)
    figures = "".join(_figure(svg) for svg in _figures(path, result, calibrated))
    shown = f'<div class="charts">{figures}</div>' if figures else ""
    tables = "".join(map(_table, result.get("tables") or []))
    return section(_text(TITLES.get(study, study)), "", shown + tables + _recipe(result["recipe"]))


def _figures(path: Path, result: Result, calibrated: Mapping[str, Any] | None) -> list[str]:
    """The SVG texts of a result."""
    stem = path.stem
    files = (
        svg
        for svg in sorted(path.parent.glob(f"{stem}*.svg"), key=lambda svg: svg.stem)
        if svg.stem[len(stem) :][:1] in ("", "-")
    )
    texts = [svg.read_text(encoding="utf-8") for svg in files]
    if _study(result) == "exit-frontier" and "text" in result and calibrated is not None:
        texts[:1] = [standalone(text_chart(result["text"], calibrated))]
    return [text for text in texts if text]


def _figure(svg: str) -> str:
    """An image of its own: its style sheet stays inside, and it still follows light and dark."""
    found = re.search(r'aria-label="([^"]*)"', svg)
    title = re.search(r"<title>(.*?)</title>", svg)
    data = base64.b64encode(svg.encode("utf-8")).decode("ascii")
    image = f'<img alt="{found[1] if found else ""}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}<figcaption>{title[1] if title else ''}</figcaption></figure>"


def _table(shown: Mapping[str, Any]) -> str:
    notes, rows = " ".join(shown.get("notes") or ()), [list(row) for row in shown["rows"]]
    whole = table(str(shown["title"]), list(shown["header"]), rows)
    whole += f'<p class="soft"><small>{_text(notes)}</small></p>' if notes else ""
    if len(rows) <= FOLDED:
        return whole
    return f"<details><summary>{_text(shown['title'])} ({len(rows)} rows)</summary>{whole}</details>"


def _recipe(recipe: Mapping[str, Any], name: str = "") -> str:
    """The recipe's fields that say something, folded."""
    rows = "".join(
        f"<dt>{_text(name.replace('_', ' '))}</dt><dd>{_text(_plain(value))}</dd>"
        for name, value in recipe.items()
        if value not in (None, "", {})
    )
    whose = _text(f" of {name}") if name else ""
    return f'<details><summary>Recipe{whose}</summary><div class="facts"><dl>{rows}</dl></div></details>'


def _plain(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)


def _text(value: object) -> str:
    return escape(printable(str(value)))
