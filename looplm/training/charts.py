"""Charts as SVG text: loss by loop and exit distribution over training tokens, depths as bars, frontiers of exit rules.

Colours come from the page: the classes d1, d2, ... give `--fill` and `--line` (looplm.display's ramp), so one
drawing serves light and dark pages; rules are no depths and bring colours of their own. Each chart has a title and a
description for those who cannot see it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from looplm.training.tracking import short

COLOURS = (
    ("#0066b4", "#6bb5f2"),
    ("#b04a00", "#f0954f"),
    ("#00795b", "#45c8a3"),
    ("#9c2f86", "#ea8bd3"),
    ("#8a6a00", "#d8b740"),
    ("#5b6069", "#a2a6ae"),
)
"""Of series that are no depths, on light and on dark pages; those beyond them begin again."""

_RULES = (COLOURS[-1], *COLOURS[:-1], ("#b3261e", "#f2857d"))
"""Colours of rules on light and on dark pages, the first for the static one; later rules begin again at the second."""

_POINTS = 300
"""The most points a line is drawn with."""

_X, _Y = (46.0, 372.0), (246.0, 12.0)
"""Where a chart of 440 x 290 draws its data; loop labels stand to the right of it."""


@dataclass(frozen=True)
class _Scale:
    """A linear map from data (`low`..`high`) to pixels (`start`..`end`)."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def loss_chart(history: Iterable[Mapping[str, Any]], evaluations: Iterable[Mapping[str, Any]]) -> str:
    """Training loss of every loop as a line over tokens, validation losses as circles; "" without data.

    Args:
        history, evaluations: rows with `tokens` and `loop_losses` (T numbers, nats per token).
    """
    stages, checks = series(history, "loop_losses"), series(evaluations, "loop_losses")
    curves, points = [row for rows in stages for row in rows], [row for rows in checks for row in rows]
    if not curves and not points:
        return ""
    # The first steps fall from ln(vocabulary) and would flatten everything that follows.
    settled = (*curves[len(curves) // 10 :], *points[1 if len(points) > 2 and curves else 0 :])
    losses = [loss for row in settled for loss in row[1:]]
    pad = max((max(losses) - min(losses)) * 0.05, 1e-3)
    x = _Scale(0, max(row[0] for row in (*curves, *points)) or 1, *_X)
    y = _Scale(min(losses) - pad, max(losses) + pad, *_Y)
    last = (curves or points)[-1]
    marks = [mark for rows in stages for mark in _curves(rows, x, y)] + _points(points, x, y)
    text = f"Loss by loop from 0 to {short(x.high)} tokens; it ends at " + ", ".join(
        f"{loss:.3f} for loop {loop}" for loop, loss in enumerate(last[1:], start=1)
    )
    frame = f'<clipPath id="frame"><path d="M{_X[0]:g} {_Y[1] - 4:g}H440V{_Y[0]:g}H{_X[0]:g}z"/></clipPath>'
    clipped = [frame, '<g clip-path="url(#frame)">', *marks, "</g>"]
    labels = _labels([(loop, y(loss)) for loop, loss in enumerate(last[1:], start=1)])
    marks = [*_axes(x, y), *_boundaries(stages, x), *clipped, *labels]
    return _svg("Loss of every loop over training", text, (440, 290), marks)


def exit_chart(history: Iterable[Mapping[str, Any]]) -> str:
    """The exit distribution over tokens as stacked bands, loop 1 at the bottom; "" without data.

    Args:
        history: rows with `tokens` and `exit_probabilities` (T numbers that add up to 1).
    """
    stages = series(history, "exit_probabilities")
    if not stages:
        return ""
    first, last = stages[0][0], stages[-1][-1]
    x, y = _Scale(first[0], max(last[0], first[0] + 1), *_X), _Scale(0, 1, *_Y)
    bands = [band for rows in stages for band in _bands(rows, x, y)]
    ends = [(loop, y(sum(last[1:loop]) + last[loop] / 2)) for loop in range(1, len(last))]
    text = "Share of tokens that exit after each loop; at the end " + ", ".join(
        f"{share:.0%} after loop {loop}" for loop, share in enumerate(last[1:], start=1)
    )
    marks = [*_axes(x, y, percent=True), *bands, *_boundaries(stages, x), *_labels(ends)]
    return _svg("Exit distribution over training", text, (440, 290), marks)


def _bands(rows: Sequence[Sequence[float]], x: _Scale, y: _Scale) -> list[str]:
    """The exit distribution of one stage, stacked."""
    bands = []
    for loop in range(1, len(rows[0])):
        below = [(x(row[0]), y(min(sum(row[1:loop]), 1))) for row in rows]
        above = [(x(row[0]), y(min(sum(row[1 : loop + 1]), 1))) for row in rows]
        outline = "L".join(f"{a:.1f} {b:.1f}" for a, b in [*above, *reversed(below)])
        bands.append(f'<path class="band d{loop}" d="M{outline}z"><title>exit after loop {loop}</title></path>')
    return bands


def _boundaries(stages: Sequence[Sequence[Sequence[float]]], x: _Scale) -> list[str]:
    """An upright line where each stage but the first begins."""
    return [f'<path class="axis" d="M{x(rows[0][0]):.1f} {_Y[0]:g}V{_Y[1]:g}"/>' for rows in stages[1:]]


def depth_chart(counts: Mapping[int, int], deepest: int) -> str:
    """How many tokens were read at each depth 1..`deepest`, as bars labelled in percent of all of them."""
    total = sum(counts.values())
    width, shares = max(200, 26 * deepest), [counts.get(loop, 0) / total for loop in range(1, deepest + 1)]
    x, y = _Scale(0, deepest, 0, width), _Scale(0, max(shares), 118, 20)
    marks = []
    for loop, share in enumerate(shares, start=1):
        left, middle, right, top = x(loop - 0.9), x(loop - 0.5), x(loop - 0.1), y(share)
        bar = f"M{left:.1f} 118V{top:.1f}H{right:.1f}V118z"
        marks.append(f'<path class="bar d{loop}" d="{bar}"/>')
        marks.append(f'<text class="value" x="{middle:.1f}" y="{top - 6:.1f}">{share * 100:.0f}</text>')
        marks.append(f'<text class="tick" x="{middle:.1f}" y="136">{loop}</text>')
    marks.append(f'<path class="axis" d="M0 118H{width}"/>')
    text = ", ".join(f"{share:.1%} at depth {loop}" for loop, share in enumerate(shares, start=1))
    return _svg("Depth of the generated tokens", text, (width, 144), marks)


def frontier_chart(
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    measure: str = "above_full",
    unit: str = "nats a token above full depth",
    axis: str = "mean loops",
    marked: Mapping[str, Any] | None = None,
) -> str:
    """A measure against mean loops: a line a rule, its settings as points with intervals; "" without data.

    Args:
        curves: by name, the static one first: points as `dataclasses.asdict` of a `looplm.training.frontier.Frontier`
            has them: `setting`, `loops`, the measure and its interval under `<measure>_interval`.
        measure, unit: which number of a point is drawn, and what it counts; axis: what `loops` are.
        marked: one point to ring, with a `label`: the calibrated one, say.
    """
    points = [point for line in curves.values() for point in line]
    if not points:
        return ""
    ends = [end for point in points for end in point[f"{measure}_interval"]]
    ends += [] if marked is None else [marked[measure]]
    pad = max((max(ends) - min(ends)) * 0.05, 1e-3)
    x = _Scale(1, max(2, *(point["loops"] for point in points)), *_X)
    y = _Scale(min(ends) - pad, max(ends) + pad, *_Y)
    marks = [_rule_colours(len(curves)), *_axes(x, y, title=axis)]
    marks.append(f'<text x="{_X[0]:g}" y="2">{unit}</text>')
    for number, (name, line) in enumerate(curves.items()):
        marks.append(f'<g class="rule{_colour(number)}">')
        marks += _frontier_line(name, sorted(line, key=lambda point: point["loops"]), x, y, measure)
        height = _Y[0] + 64 + 18 * number
        marks.append(f'<path class="curve" d="M{_X[0]:g} {height - 4.5:g}h22"/>')
        marks.append(f'<text class="label" x="{_X[0] + 30:g}" y="{height:g}">{escape(name)}</text></g>')
    rows = len(curves)
    if marked is not None:
        marks.append(_ring(x(marked["loops"]), y(marked[measure]), marked["label"], _Y[0] + 64 + 18 * rows))
        rows += 1
    text = "; ".join(
        f"{name}: " + ", ".join(f"{point[measure]:+.3f} at {point['loops']:.2f} loops" for point in line)
        for name, line in curves.items()
    )
    size = (440, int(_Y[0]) + 56 + 18 * rows)
    return _svg(f"{_TITLES.get(measure, unit)}, against {axis}", text, size, marks)


_TITLES = {"above_full": "Loss in nats a token above full depth"}


def _ring(across: float, up: float, label: str, height: float) -> str:
    """A ring around a point, and its line in the key."""
    rings = "".join(
        f'<circle class="ring" cx="{a:.1f}" cy="{b:.1f}" r="7"/>' for a, b in ((across, up), (57, height - 4.5))
    )
    return f'{rings}<text x="{_X[0] + 30:g}" y="{height:g}">{escape(label)}</text>'


def _frontier_line(name: str, line: Sequence[Mapping[str, Any]], x: _Scale, y: _Scale, measure: str) -> list[str]:
    """The line, an upright bar for each interval, and a circle for each point."""
    places = [(x(point["loops"]), y(point[measure])) for point in line]
    marks = [f'<path class="curve" d="{_line(places)}"/>']
    for point, (across, up) in zip(line, places, strict=True):
        low, high = point[f"{measure}_interval"]
        value = f"{point['loss']:.4f} nats a token" if "loss" in point else f"{point[measure]:.4f}"
        marks.append(f'<path class="leader" d="M{across:.1f} {y(low):.1f}V{y(high):.1f}"/>')
        marks.append(
            f'<circle class="point" cx="{across:.1f}" cy="{up:.1f}" r="3"><title>{escape(name)} at '
            f"{point['setting']:.3g}: {value}, {point['loops']:.2f} loops</title></circle>"
        )
    return marks


def _colour(number: int) -> int:
    return number if number < len(_RULES) else 1 + (number - 1) % (len(_RULES) - 1)


def _rule_colours(count: int) -> str:
    """The classes rule0, rule1, ... as a style sheet inside the drawing."""
    used = list(enumerate(_RULES[:count]))
    light = "".join(f".rule{n}{{--line:{colours[0]}}}" for n, colours in used)
    dark = "".join(f".rule{n}{{--line:{colours[1]}}}" for n, colours in used)
    return f"<style>{light}@media(prefers-color-scheme:dark){{{dark}}}</style>"


def _curves(rows: Sequence[Sequence[float]], x: _Scale, y: _Scale) -> list[str]:
    return [
        f'<path class="curve d{loop}" d="{_line((x(row[0]), y(row[loop])) for row in rows)}"/>'
        for loop in range(1, len(rows[0]) if rows else 0)
    ]


def _points(rows: Sequence[Sequence[float]], x: _Scale, y: _Scale) -> list[str]:
    return [
        f'<circle class="point d{loop}" cx="{x(row[0]):.1f}" cy="{y(loss):.1f}" r="3">'
        f"<title>loop {loop} after {short(row[0])} tokens: {loss:.3f}</title></circle>"
        for row in rows
        for loop, loss in enumerate(row[1:], start=1)
    ]


def _svg(title: str, description: str, size: tuple[int, int], body: Iterable[str]) -> str:
    return (
        f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(f"{title}. {description}")}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
        f"{''.join(body)}</svg>"
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`, about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.7)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def thin(rows: Sequence[Sequence[float | None]], most: int = _POINTS) -> list[list[float]]:
    """At most `most` rows: column means of equal runs of neighbours. Rows with a missing number are skipped."""
    whole = [[float(v) for v in row if v is not None] for row in rows if None not in row]
    size = max(math.ceil(len(whole) / most), 1)
    runs = (whole[i : i + size] for i in range(0, len(whole), size))
    return [[sum(column) / len(column) for column in zip(*run, strict=True)] for run in runs]


def series(rows: Iterable[Mapping[str, Any]], name: str) -> list[list[list[float]]]:
    """Of every stage (tokens, value of loop 1, ..., of loop T), thinned; rows of fewer loops than its T are skipped."""
    stages: dict[Any, list[list[Any]]] = {}
    for row in rows:
        if row.get(name):
            stages.setdefault(row.get("stage"), []).append([row.get("tokens"), *row[name]])
    thinned = [
        thin([row for row in stage if len(row) == max(map(len, stage))], max(_POINTS // len(stages), 2))
        for stage in stages.values()
    ]
    return [stage for stage in thinned if stage]


def _axes(x: _Scale, y: _Scale, percent: bool = False, title: str = "training tokens") -> list[str]:
    marks = []
    levels = ticks(y.low, y.high)
    digits = max(len(f"{value:g}".partition(".")[2]) for value in levels)
    for value in levels:
        label = f"{value:.0%}" if percent else f"{value:.{digits}f}"
        marks.append(f'<path class="grid" d="M{x.start:g} {y(value):.1f}H{x.end:g}"/>')
        marks.append(f'<text x="{x.start - 8:g}" y="{y(value) + 4.5:.1f}" text-anchor="end">{label}</text>')
    for value in ticks(x.low, x.high, 4):
        label = short(value) if value else "0"
        marks.append(f'<text x="{x(value):.1f}" y="{y.start + 20:g}" text-anchor="middle">{label}</text>')
    marks.append(f'<path class="axis" d="M{x.start:g} {y.start:g}H{x.end:g}"/>')
    middle = (x.start + x.end) / 2
    return [*marks, f'<text x="{middle:g}" y="{y.start + 40:g}" text-anchor="middle">{title}</text>']


def _labels(ends: Sequence[tuple[int, float]], gap: float = 16.0) -> list[str]:
    """ "loop n" to the right of the chart, level with where each series ends but `gap` apart."""
    ordered = sorted(ends, key=lambda end: end[1])
    places = spread([place for _, place in ordered], gap, _Y[1], _Y[0])
    return [
        f'<g class="d{loop}"><path class="leader" d="M{_X[1] + 2:g} {end:.1f}L{_X[1] + 13:g} {place:.1f}"/>'
        f'<text class="label" x="{_X[1] + 17:g}" y="{place + 4.5:.1f}">loop {loop}</text></g>'
        for (loop, end), place in zip(ordered, places, strict=True)
    ]


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending `places` moved down, then up from `high`, until each is `gap` from the next."""
    apart: list[float] = []
    for place in places:
        apart.append(max(place, apart[-1] + gap if apart else low))
    for i in reversed(range(len(apart))):
        apart[i] = min(apart[i], apart[i + 1] - gap if i + 1 < len(apart) else high)
    return apart


def _line(points: Iterable[tuple[float, float]]) -> str:
    """Path data through the points; a lone one gets a zero-length stroke, drawn as a dot."""
    data = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f"M{data}" if "L" in data else f"M{data}h0"
