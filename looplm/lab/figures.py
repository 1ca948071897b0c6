"""Charts of the lab as SVG files: scores by loop, difficulty or step with every seed in sight, and dots by arm.

They stand alone (in a page, in Markdown, in a viewer), bring their own colours for light and dark, and carry a title
and a description for those who cannot see them. A band spans all seeds, a line is their mean.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from looplm.training.charts import COLOURS, spread, ticks
from looplm.training.tracking import short

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 560, 52, 392, 56, 302
"""The drawing, and where its data stand."""
_ROW = 34

Curves = Mapping[str, Mapping[float, Sequence[float]]]
"""By series: values, one a seed, by place."""


def curves(rows: Iterable[Mapping[str, Any]], by: str, series: str) -> dict[str, dict[float, list[float]]]:
    """Scores by series and place, a value each run: rows of several levels are weighed by their items.

    Args:
        rows: of a results file, from the same step where `by` is not `step`.
        by: the column along the axis: loop, difficulty or step.
        series: the column that tells the lines apart.
    """
    sums: dict[tuple[str, float, str], list[float]] = {}
    for row in rows:
        total = sums.setdefault((str(row[series]), row[by], row["run"]), [0.0, 0.0])
        total[0] += row["score"] * row["items"]
        total[1] += row["items"]
    found: dict[str, dict[float, list[float]]] = {}
    for (name, place, _), (right, items) in sums.items():
        found.setdefault(name, {}).setdefault(place, []).append(right / items)
    return found


def line_chart(data: Curves, title: str, axis: str, unit: str = "score") -> str:
    """Lines with bands; a place that only one series has becomes a dot. "" without data."""
    if not data:
        return ""
    places = [place for line in data.values() for place in line]
    values = [value for line in data.values() for seeds in line.values() for value in seeds]
    x, y = _scale(min(places), max(places), LEFT + 8, RIGHT - 8), _value_scale(values)
    marks = _frame(x, y, axis, unit)
    ends = []
    for number, (name, line) in enumerate(data.items()):
        points = sorted((place, seeds) for place, seeds in line.items())
        upper = [f"{x(place):.1f} {y(max(seeds)):.1f}" for place, seeds in points]
        lower = [f"{x(place):.1f} {y(min(seeds)):.1f}" for place, seeds in reversed(points)]
        means = [(x(place), y(statistics.fmean(seeds))) for place, seeds in points]
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in means)
        group = f'<path class="band" d="M{"L".join([*upper, *lower])}z"/><path class="line" d="M{path}"/>'
        group += "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in means)
        marks.append(f'<g class="c{number % len(COLOURS)}">{group}</g>')
        ends.append((number, name, means[-1][1]))
    marks += _labels(ends)
    text = "; ".join(f"{name} ends at {_mean_of_last(line):.3f}" for name, line in data.items())
    return _svg(title, text, BOTTOM + 48, marks)


def dot_chart(groups: Mapping[str, Sequence[float]], title: str, unit: str) -> str:
    """A row for each group: every seed a dot, their mean a stroke. "" without data."""
    shown = {name: list(seeds) for name, seeds in groups.items() if seeds}
    if not shown:
        return ""
    left, right = min(max(236, 7 * max(map(len, shown)) + 16), 372), WIDTH - 64  # 7 pixels a letter
    values = [value for seeds in shown.values() for value in seeds]
    x = _scale(*_padded(values), left, right)
    bottom = TOP + _ROW * len(shown)
    marks = []
    for value in ticks(x.low, x.high, 4):
        marks.append(f'<path class="grid" d="M{x(value):.1f} {TOP}V{bottom}"/>')
        marks.append(f'<text x="{x(value):.1f}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>')
    for number, (name, seeds) in enumerate(shown.items()):
        middle, mean = TOP + _ROW * (number + 0.5), statistics.fmean(seeds)
        dots = "".join(f'<circle class="seed" cx="{x(value):.1f}" cy="{middle:.1f}" r="4"/>' for value in seeds)
        stroke = f'<path class="line" d="M{x(mean):.1f} {middle - 11:.1f}v22"/>'
        marks.append(
            f'<text class="ink" x="{left - 12}" y="{middle + 4.5:.1f}" text-anchor="end">{escape(name)}</text>'
        )
        marks.append(f'<g class="c{number % len(COLOURS)}">{dots}{stroke}</g>')
        marks.append(f'<text class="ink" x="{right + 12}" y="{middle + 4.5:.1f}">{mean:.3f}</text>')
    marks.append(f'<text x="{(left + right) / 2:g}" y="{bottom + 38}" text-anchor="middle">{escape(unit)}</text>')
    text = "; ".join(
        f"{name}: mean {statistics.fmean(seeds):.3f} of {len(seeds)} seeds" for name, seeds in shown.items()
    )
    return _svg(title, text, bottom + 48, marks)


class _scale:
    """A linear map from data to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = (low, high) if high > low else (low - 0.5, high + 0.5)
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """Shares stand between 0 and 1; anything else gets a twentieth of its range on both sides."""
    if min(values) >= 0 and max(values) <= 1:
        return 0.0, 1.0
    pad = (max(values) - min(values) or 1.0) / 20
    return min(values) - pad, max(values) + pad


def _value_scale(values: Sequence[float]) -> _scale:
    return _scale(*_padded(values), BOTTOM, TOP)


def _mean_of_last(line: Mapping[float, Sequence[float]]) -> float:
    return statistics.fmean(line[max(line)])


def _frame(x: _scale, y: _scale, axis: str, unit: str) -> list[str]:
    marks = [f'<text x="{LEFT}" y="{TOP - 12}">{escape(unit)}</text>']
    for value in ticks(y.low, y.high):
        marks.append(f'<path class="grid" d="M{LEFT} {y(value):.1f}H{RIGHT}"/>')
        marks.append(f'<text x="{LEFT - 8}" y="{y(value) + 4.5:.1f}" text-anchor="end">{value:g}</text>')
    whole = [value for value in ticks(x.low, x.high, 6) if value == int(value)]
    for value in whole:
        label = short(value) if value else "0"
        marks.append(f'<text x="{x(value):.1f}" y="{BOTTOM + 18}" text-anchor="middle">{label}</text>')
    marks.append(f'<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>')
    middle = (LEFT + RIGHT) / 2
    return [*marks, f'<text x="{middle:g}" y="{BOTTOM + 38}" text-anchor="middle">{escape(axis)}</text>']


def _labels(ends: Sequence[tuple[int, str, float]]) -> list[str]:
    """The names of the series beside their ends, apart from each other."""
    ordered = sorted(ends, key=lambda end: end[2])
    heights = spread([end[2] for end in ordered], 17, TOP, BOTTOM)
    return [
        f'<g class="c{number % len(COLOURS)}"><path class="lead" d="M{RIGHT} {end:.1f}L{RIGHT + 12} {height:.1f}"/>'
        f'<text class="name" x="{RIGHT + 16}" y="{height + 4.5:.1f}">{escape(name)}</text></g>'
        for (number, name, end), height in zip(ordered, heights, strict=True)
    ]


def _style() -> str:
    light = "".join(f".c{n}{{--c:{colours[0]}}}" for n, colours in enumerate(COLOURS))
    dark = "".join(f".c{n}{{--c:{colours[1]}}}" for n, colours in enumerate(COLOURS))
    return (
        "<style>svg{--page:#fbfaf8;--ink:#16181d;--soft:#5b6069;--grid:#e4e0d9}"
        f"{light}text{{font:13px system-ui,sans-serif;fill:var(--soft)}}"
        ".page{fill:var(--page)}.title,.ink{fill:var(--ink)}.title{font-size:15px;font-weight:600}"
        ".name{fill:var(--c)}.grid{stroke:var(--grid)}.axis{stroke:var(--soft)}.lead{stroke:var(--c);fill:none}"
        ".band{fill:var(--c);opacity:.16}.line{stroke:var(--c);fill:none;stroke-width:2.2}circle{fill:var(--c)}"
        ".seed{opacity:.55}@media(prefers-color-scheme:dark){"
        f"svg{{--page:#14161a;--ink:#eceae6;--soft:#a2a6ae;--grid:#2b3037}}{dark}}}</style>"
    )


def _svg(title: str, description: str, height: int, body: Iterable[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(f"{title}. {description}")}"><title>{escape(title)}</title>'
        f'<desc>{escape(description)}</desc>{_style()}<rect class="page" width="{WIDTH}" height="{height}"/>'
        f'<text class="title" x="12" y="22">{escape(title)}</text>{"".join(body)}</svg>\n'
    )
