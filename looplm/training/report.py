"""A run's results as one page: headline numbers, loss by loop, exits over training, text coloured by depth.

`render_report` turns a report (plain JSON, made by the trainer and by the demo) into one HTML file without
scripts or outside resources; the charts are inline SVG (looplm.training.charts). A section whose data is
missing is left out.
"""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import yaml

from looplm.display import depth_colour, depth_line_colour, printable
from looplm.files import plain, write_json, write_text
from looplm.training.charts import depth_chart, exit_chart, loss_chart
from looplm.training.report_stages import gates_section, stages_section, warnings_section
from looplm.training.tracking import short

Report = Mapping[str, Any]
_MISSING = "–"


def save_report(folder: str | os.PathLike[str], report: Report) -> Path:
    """Write report.json and report.html into `folder`, each whole or not at all; returns the page's path."""
    page = Path(folder) / "report.html"
    write_json(page.with_suffix(".json"), report)
    write_text(page, render_report(report))
    return page


def render_report(report: Report) -> str:
    """The page of a report as HTML text.

    Args:
        report: title, created, command, recipe, model, data, training, history, evaluations, loops,
            expected_depth, generations, stages, gates and warnings; losses in nats per token, probabilities in 0..1.
            Any part may be missing or empty, any number None or NaN.
    """
    report = plain(report)
    depth = _deepest(report)
    return page(
        title=_text(report.get("title") or "looplm run"),
        subtitle=_subtitle(report),
        palette=_palette(depth),
        headline=_headline(report),
        loops=_loops(report, depth),
        stages=stages_section(_rows(report, "stages")),
        charts=_charts(report),
        gates=gates_section(_part(report, "gates")),
        warnings=warnings_section(_rows(report, "warnings")),
        depths=_depths(report, depth),
        generations=_generations(report, depth),
        facts=_facts(report),
        repeat=_repeat(report),
    )


def page(**parts: str) -> str:
    """The page with these parts of its template, as HTML; those left out are empty."""
    template = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return template.substitute(defaultdict(str, parts))


def _text(value: object) -> str:
    return escape(printable(str(value)))


def _number(value: float | None, form: str = ",.3f") -> str:
    return _MISSING if value is None or not math.isfinite(value) else format(value, form)


def _short(value: float | None) -> str:
    return _MISSING if value is None else short(value)


def _part(report: Report, name: str) -> Mapping[str, Any]:
    return report.get(name) or {}


def _rows(report: Report, name: str) -> Sequence[Mapping[str, Any]]:
    return report.get(name) or []


def _tokens(generation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [token for prompt in _rows(generation, "prompts") for token in _rows(prompt, "tokens")]


def _deepest(report: Report) -> int:
    """The deepest loop anything but the final table shows: the end of the colour ramp."""
    depths = [_part(report, "model").get("loops") or 1]
    depths += [token["depth"] for generation in _rows(report, "generations") for token in _tokens(generation)]
    for row in (*_rows(report, "history"), *_rows(report, "evaluations")):
        depths += [len(row.get("loop_losses") or []), len(row.get("exit_probabilities") or [])]
    return max(depths)


def _palette(depth: int) -> str:
    """One class a depth: `--fill` behind dark text, `--line` for lines, which on a dark page is the fill."""
    fills = {loop: depth_colour(loop, depth) for loop in range(1, depth + 1)}
    light = [f".d{n}{{--fill:{fill};--line:{depth_line_colour(n, depth)}}}" for n, fill in fills.items()]
    dark = [f".d{n}{{--line:{fill}}}" for n, fill in fills.items()]
    marks = "".join(f'#marks:checked~.setting .d{n}::after{{content:"{n}"}}' for n in fills)
    forced = "".join(f'.token.d{n}::after{{content:"{n}"}}' for n in fills)
    dark_mode = f"@media(prefers-color-scheme:dark){{{''.join(dark)}.band,.bar{{fill-opacity:.8}}}}"
    return "\n".join([*light, dark_mode, marks, f"@media(forced-colors:active){{{forced}}}"])


def _subtitle(report: Report) -> str:
    model, created = _part(report, "model"), str(report.get("created") or "")
    parts = [created[:16].replace("T", " ")] if created else []
    if model:
        parts.append(
            f"{model.get('layers', _MISSING)} layers applied {model.get('loops', _MISSING)} times, "
            f"width {model.get('width', _MISSING)}"
        )
    return _text(" · ".join(parts))


def _best(report: Report) -> Mapping[str, Any]:
    """The row of the loop with the fewest bits per character, or an empty one."""
    scored = [row for row in _rows(report, "loops") if row.get("bits_per_character") is not None]
    return min(scored, key=lambda row: row["bits_per_character"], default={})


def _headline(report: Report) -> str:
    model, training, best = _part(report, "model"), _part(report, "training"), _best(report)
    minutes, tokens = training.get("minutes"), training.get("tokens")
    pace = f"{_short(tokens / minutes / 60)} tokens a second" if tokens and minutes else ""
    tiles = []
    if best:
        where = f"reading after loop {best['loop']}"
        tiles.append((_number(best["bits_per_character"]), "bits per character", where))
    if model:
        shape = f"vocabulary of {_number(model.get('vocabulary'), ',')}"
        tiles.append((_short(model.get("parameters")), "parameters", shape))
    if training:
        steps = f"in {_number(training.get('steps'), ',')} steps"
        tiles.append((_short(tokens), "training tokens", steps))
        tiles.append((_number(minutes, ",.1f"), "minutes", pace))
    rows = (
        f"<div><dt>{name}<small>{_text(note)}</small></dt><dd>{_text(value)}</dd></div>" for value, name, note in tiles
    )
    return f'<dl class="tiles">{"".join(rows)}</dl>' if tiles else ""


def _loops(report: Report, depth: int) -> str:
    """The table of validation losses, one row a loop."""
    if not _rows(report, "loops"):
        return ""
    trained, best = _part(report, "model").get("loops") or math.inf, _best(report).get("loop")
    body = []
    for row in _rows(report, "loops"):
        loop = int(row["loop"])
        colour = f'<span class="swatch{f" d{loop}" if loop <= depth else ""}" aria-hidden="true"></span>'
        tags = '<span class="tag">beyond training</span>' if loop > trained else ""
        tags += '<span class="tag">best</span>' if loop == best else ""
        numbers = (_number(row.get(name)) for name in ("loss", "bits_per_character", "exit_probability"))
        cells = "".join(f"<td>{number}</td>" for number in numbers)
        kind = ' class="best"' if loop == best else ""
        body.append(f'<tr{kind}><th scope="row">{colour}{loop}{tags}</th>{cells}</tr>')
    heads = ("Loop", "Loss, nats per token", "Bits per character", "Mean exit probability")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    expected = report.get("expected_depth")
    note = "" if expected is None else f" Expected exit depth: {_number(expected)} loops."
    return (
        "<section><h2>What every loop adds</h2>"
        "<p>The model can be read after any loop. Fewer bits per character is better, and compares across "
        f'tokenizers.</p><div class="scroll" tabindex="0" role="region" aria-label="Loss of every loop">'
        f"<table><caption>Measured on the validation text.{note}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div></section>"
    )


def _charts(report: Report) -> str:
    """The two charts over training tokens: loss per loop, and the exit distribution."""
    history = _rows(report, "history")
    losses, exits = loss_chart(history, _rows(report, "evaluations")), exit_chart(history)
    loss_note = "Lines: training batches, averaged over neighbouring steps. Circles: validation text."
    exit_note = "Mean exit probability of each loop in the training batches; the bands add up to 100 %."
    charts = (
        ("Loss of every loop, nats per token", losses, loss_note),
        ("Where tokens exit", exits, exit_note),
    )
    figures = "".join(
        f"<figure><h3>{title}</h3>{chart}<figcaption>{caption}</figcaption></figure>"
        for title, chart, caption in charts
        if chart
    )
    return f'<section><h2>How it learned</h2><div class="charts">{figures}</div></section>' if figures else ""


def _setting(generation: Mapping[str, Any]) -> tuple[str, str]:
    """What was asked of a generation and what came out, as HTML: ("threshold 0.7", "mean depth 2.31, ...")."""
    depth = f"mean depth {_number(generation.get('mean_depth'), '.2f')}"
    target = generation.get("target_depth")
    aim = "" if target is None else f", aiming at {_number(target, '.2f')}"
    return f"Threshold {_number(generation.get('threshold'), '.3g')}", depth + aim


def _depths(report: Report, depth: int) -> str:
    """A small histogram of depths for every threshold."""
    figures = []
    for generation in _rows(report, "generations"):
        counts = Counter(int(token["depth"]) for token in _tokens(generation))
        if counts:
            title, caption = _setting(generation)
            chart = depth_chart(counts, depth)
            figures.append(f"<figure><h3>{title}</h3>{chart}<figcaption>{caption}</figcaption></figure>")
    if not figures:
        return ""
    return (
        "<section><h2>Depth on a budget</h2><p>The exit threshold decides how sure the gate must be before a "
        "token stops looping. Bars: percent of the generated tokens that were read after each loop.</p>"
        f'<div class="bars">{"".join(figures)}</div></section>'
    )


def _generations(report: Report, depth: int) -> str:
    """Generated text by threshold, every token on its depth's colour; a box without scripts adds numbers."""
    settings = []
    for generation in _rows(report, "generations"):
        samples = "".join(_sample(prompt) for prompt in _rows(generation, "prompts"))
        title, caption = _setting(generation)
        header = f'<header><h3>{title}</h3><span class="soft">{caption}</span></header>'
        settings.append(f'<div class="setting">{header}{samples}</div>')
    if not settings:
        return ""
    legend = "".join(f'<li class="d{loop}">{loop}</li>' for loop in range(1, depth + 1))
    return (
        "<section><h2>What it writes, and how deeply</h2>"
        "<p>The colour behind each token is the number of loops it took. Prompts are grey.</p>"
        f'<div class="key"><span id="legend">depth</span><ol aria-labelledby="legend">{legend}</ol></div>'
        '<input type="checkbox" id="marks"><label for="marks">Show depths as numbers</label>'
        f"{''.join(settings)}</section>"
    )


def _sample(prompt: Mapping[str, Any]) -> str:
    tokens = "".join(_token(token["text"], int(token["depth"])) for token in _rows(prompt, "tokens"))
    return (
        f'<p class="sample"><span class="prompt">{_text(prompt.get("prompt", ""))}</span>{tokens}</p>'
        f'<p class="soft"><small>mean depth {_number(prompt.get("mean_depth"), ".2f")}</small></p>'
    )


def _token(text: str, depth: int) -> str:
    """A span; newlines that end a token stand behind it, and one that is nothing else shows as a sign."""
    words = text.rstrip("\n")
    newlines = text[len(words) :]
    shown = _text(words) if words else "↵" * len(newlines)
    return f'<span class="token d{depth}">{shown}</span>{newlines}'


def _facts(report: Report) -> str:
    """Model, data and training as three lists of names and values."""
    parts = []
    for part in ("model", "data", "training"):
        rows = "".join(
            f"<dt>{_text(name.replace('_', ' '))}</dt>"
            f'<dd class="{"wide" if isinstance(value, list) else "short"}">{_text(_fact(value))}</dd>'
            for name, value in _part(report, part).items()
        )
        if rows:
            parts.append(f"<div><h3>{part.capitalize()}</h3><dl>{rows}</dl></div>")
    return f'<section><h2>The run</h2><div class="facts">{"".join(parts)}</div></section>' if parts else ""


def _fact(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or _MISSING
    if isinstance(value, int):
        return f"{value:,}"
    return _number(value, ",.2f") if isinstance(value, float) else str(value or _MISSING)


def _repeat(report: Report) -> str:
    """The command and the recipe, folded."""
    recipe = yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True) if report.get("recipe") else ""
    folds = "".join(
        f'<details><summary>{name}</summary><pre tabindex="0">{_text(body)}</pre></details>'
        for name, body in (("Command", report.get("command")), ("Recipe", recipe))
        if body
    )
    return f"<section><h2>Repeat it</h2>{folds}</section>" if folds else ""
