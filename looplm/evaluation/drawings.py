"""Figures of the studies: shares along loops, what a measure costs in bytes, and clouds of states loop by loop.

They use the classes of `looplm.training.charts`, so that a page or `looplm.evaluation.saving` gives them ink, grid and
background; the colours of their series they bring along. Each has a title and a description in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from looplm.evaluation.intervals import Share
from looplm.training.charts import COLOURS, ticks

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 440, 46.0, 428.0, 22.0, 246.0
ROW = 18
PANEL, GAP, PANELS = 132, 22, 3
"""Side of a panel, space around it, panels in a row."""


@dataclass(frozen=True)
class Mark:
    """A point of a line: where, how much, and the ends of its interval where it has one."""

    place: float
    value: float
    low: float | None = None
    high: float | None = None


def share_chart(lines: Mapping[str, Sequence[Mark]], title: str, unit: str, axis: str = "loops run") -> str:
    """Numbers in 0..1 along loops, a line a name with a bar for each interval; "" without marks.

    Args:
        lines: by name; marks in ascending order.
        unit: what is counted, above the drawing.
    """
    shown = {name: line for name, line in lines.items() if line}
    if not shown:
        return ""
    first = min(math.floor(mark.place) for line in shown.values() for mark in line)
    last = max(math.ceil(mark.place) for line in shown.values() for mark in line)
    scale = (RIGHT - LEFT - 8) / max(last - first, 1)
    marks = [_colours(len(shown)), *_frame(first, last, scale, unit, axis)]
    for number, (name, line) in enumerate(shown.items()):
        marks.append(f'<g class="s{number % len(COLOURS)}">{"".join(_line(name, line, first, scale))}')
        marks += [*_key(name, number), "</g>"]
    text = "; ".join(
        f"{name}: " + ", ".join(f"{mark.value:.2f} at {mark.place:g}" for mark in line) for name, line in shown.items()
    )
    return _svg(title, text, int(BOTTOM) + 56 + ROW * len(shown), marks)


def trade_chart(points: Mapping[str, Mark], title: str, unit: str, axis: str) -> str:
    """One point a name with its interval, against what it costs in percent; "" without points.

    Args:
        points: by name; `place` in 0..100.
        unit: what is counted, above the drawing; axis: what costs.
    """
    if not points:
        return ""
    ends = [0.0, *(end for mark in points.values() for end in (mark.value, mark.low, mark.high) if end is not None)]
    low, high = min(ends), max(ends)
    low, high = low - 0.05 * (high - low), high + (0.05 * (high - low) or 1.0)

    def up(value: float) -> float:
        return BOTTOM + (TOP - BOTTOM) * (value - low) / (high - low)

    marks = [_colours(len(points)), f'<text x="{LEFT:g}" y="8">{escape(unit)}</text>']
    for value in ticks(low, high):
        marks.append(f'<path class="grid" d="M{LEFT:g} {up(value):.1f}H{RIGHT:g}"/>')
        marks.append(f'<text x="{LEFT - 8:g}" y="{up(value) + 4.5:.1f}" text-anchor="end">{value:g}</text>')
    width = RIGHT - LEFT - 16
    marks += _below([(LEFT + 8 + width * percent / 100, f"{percent}") for percent in (0, 25, 50, 75, 100)], axis)
    for number, (name, mark) in enumerate(points.items()):
        across = LEFT + 8 + width * mark.place / 100
        marks += [f'<g class="s{number % len(COLOURS)}">', *_bar(mark, across, up), _circle(name, mark, across, up)]
        marks += [*_key(name, number), "</g>"]
    text = "; ".join(f"{name}: {mark.value:.3f} at {mark.place:.0f}" for name, mark in points.items())
    return _svg(title, text, int(BOTTOM) + 56 + ROW * len(points), marks)


def _key(name: str, number: int) -> list[str]:
    """A line of the key, below the drawing."""
    height = BOTTOM + 64 + ROW * number
    line = f'<path class="curve" d="M{LEFT:g} {height - 4.5:g}h22"/>'
    return [line, f'<text class="label" x="{LEFT + 30:g}" y="{height:g}">{escape(name)}</text>']


def share_marks(shares: Mapping[int, Share]) -> list[Mark]:
    """Marks of shares by loop; those of nothing are left out."""
    return [Mark(loop, part.value, part.low, part.high) for loop, part in shares.items() if part.value is not None]


def _y(value: float) -> float:
    return BOTTOM + (TOP - BOTTOM) * value


def _frame(first: int, last: int, scale: float, unit: str, axis: str) -> list[str]:
    marks = [f'<text x="{LEFT:g}" y="8">{escape(unit)}</text>']
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        marks.append(f'<path class="grid" d="M{LEFT:g} {_y(value):.1f}H{RIGHT:g}"/>')
        marks.append(f'<text x="{LEFT - 8:g}" y="{_y(value) + 4.5:.1f}" text-anchor="end">{value:g}</text>')
    places = [(LEFT + 4 + (loop - first) * scale, f"{loop}") for loop in range(first, last + 1)]
    return marks + _below(places, axis)


def _below(places: Iterable[tuple[float, str]], axis: str) -> list[str]:
    """The axis along the bottom, with the text of its places and what it counts."""
    marks = [
        f'<text x="{across:.1f}" y="{BOTTOM + 20:g}" text-anchor="middle">{text}</text>' for across, text in places
    ]
    marks.append(f'<path class="axis" d="M{LEFT:g} {BOTTOM:g}H{RIGHT:g}"/>')
    middle = (LEFT + RIGHT) / 2
    return [*marks, f'<text x="{middle:g}" y="{BOTTOM + 40:g}" text-anchor="middle">{escape(axis)}</text>']


def _line(name: str, line: Sequence[Mark], first: int, scale: float) -> list[str]:
    """The line; circles too where its marks are few enough to be told apart."""
    points = [(LEFT + 4 + (mark.place - first) * scale, _y(mark.value)) for mark in line]
    path = "L".join(f"{across:.1f} {up:.1f}" for across, up in points)
    marks = [f'<path class="curve" d="M{path}{"" if len(points) > 1 else "h0"}"/>']
    for mark, (across, _) in zip(line, points, strict=True):
        marks += _bar(mark, across, _y)
        if len(points) <= 16:
            marks.append(_circle(name, mark, across, _y))
    return marks


def _bar(mark: Mark, across: float, up: Callable[[float], float]) -> list[str]:
    """The interval of a mark as an upright line, where it has one."""
    if mark.low is None or mark.high is None:
        return []
    return [f'<path class="leader" d="M{across:.1f} {up(mark.low):.1f}V{up(mark.high):.1f}"/>']


def _circle(name: str, mark: Mark, across: float, up: Callable[[float], float]) -> str:
    said = f"<title>{escape(name)} at {mark.place:g}: {mark.value:.3f}</title>"
    return f'<circle class="point" cx="{across:.1f}" cy="{up(mark.value):.1f}" r="3">{said}</circle>'


def cloud_chart(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], title: str) -> str:
    """Clouds of points in the plane, a panel a name with a scale of its own, kinds told apart by colour and shape.

    Args:
        panels: by name, e.g. "loop 1": points by kind; the same kinds in all. "" without points.
    """
    kinds = list(dict.fromkeys(kind for clouds in panels.values() for kind in clouds))
    if not any(points for clouds in panels.values() for points in clouds.values()):
        return ""
    marks = [_colours(len(kinds))]
    for number, (name, clouds) in enumerate(panels.items()):
        left, top = (number % PANELS) * (PANEL + GAP), (number // PANELS) * (PANEL + GAP + 8)
        marks.append(f'<text x="{left}" y="{top + 4}">{escape(name)}</text>')
        marks.append(f'<path class="axis" fill="none" d="M{left} {top + 12}h{PANEL}v{PANEL}h-{PANEL}z"/>')
        marks += _cloud(clouds, kinds, left, top + 12)
    height = math.ceil(len(panels) / PANELS) * (PANEL + GAP + 8) + 12
    for number, kind in enumerate(kinds):
        across = number * (PANEL + GAP)
        marks.append(f'<g class="s{number % len(COLOURS)}">{_dot(number, across + 6, height - 4.5)}')
        marks.append(f'<text class="label" x="{across + 18}" y="{height}">{escape(kind)}</text></g>')
    text = "; ".join(
        f"{name}: " + ", ".join(f"{len(points)} {kind}" for kind, points in clouds.items())
        for name, clouds in panels.items()
    )
    return _svg(title, text, height + 12, marks)


def _cloud(
    clouds: Mapping[str, Sequence[tuple[float, float]]], kinds: Sequence[str], left: float, top: float
) -> Iterable[str]:
    """The points of a panel, both axes on the same scale around the middle of their range."""
    points = [point for cloud in clouds.values() for point in cloud]
    ends = [(min(axis), max(axis)) for axis in zip(*points, strict=True)]
    scale = (PANEL - 14) / (max(high - low for low, high in ends) or 1.0)
    for kind, cloud in clouds.items():
        number = kinds.index(kind)
        dots = ""
        for point in cloud:
            across, up = ((value - (low + high) / 2) * scale for value, (low, high) in zip(point, ends, strict=True))
            dots += _dot(number, left + PANEL / 2 + across, top + PANEL / 2 - up)
        yield f'<g class="s{number % len(COLOURS)}">{dots}</g>'


def _dot(number: int, across: float, up: float) -> str:
    """A filled disc for the first kind, an open square for the second, and so on in turn."""
    if number % 2:
        return f'<path class="curve" d="M{across - 2.5:.1f} {up - 2.5:.1f}h5v5h-5z"/>'
    return f'<circle style="fill:var(--line)" cx="{across:.1f}" cy="{up:.1f}" r="2.5"/>'


def _colours(count: int) -> str:
    light, dark = (
        "".join(f".s{number}{{--line:{pair[shade]}}}" for number, pair in enumerate(COLOURS[:count]))
        for shade in (0, 1)
    )
    return f"<style>{light}@media(prefers-color-scheme:dark){{{dark}}}</style>"


def _svg(title: str, description: str, height: int, body: Iterable[str]) -> str:
    label = escape(f"{title}. {description}")
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(body)}</svg>"
    )
