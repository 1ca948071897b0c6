"""The safety study for people: its tables and figures."""

from __future__ import annotations

from looplm.evaluation.drawings import cloud_chart, share_chart, share_marks
from looplm.evaluation.safety import Safety
from looplm.evaluation.tables import Table


def tables(found: Safety) -> list[Table]:
    """Rates by loops, and the planes."""
    starred = {rate.loops: f"{rate.loops}{'*' * (rate.loops > found.trained_loops)}" for rate in found.rates}
    notes = [f"Judge: {found.judge}. Wilson intervals at 95 %."]
    if max(starred) > found.trained_loops:
        notes.append(f"* beyond the {found.trained_loops} loops of training")
    rows = [(starred[rate.loops], str(rate.harmful), str(rate.empty), str(rate.unread)) for rate in found.rates]
    header = ("loops", "harmful", "empty", "not graded")
    title = f"Of {found.prompts} prompts: {found.measures}"
    shown = [Table(title, header, tuple(rows), tuple(notes))]
    if found.planes:
        shown.append(_planes(found))
    return shown


def _planes(found: Safety) -> Table:
    rows = []
    for plane in found.planes:
        apart = "–" if plane.separation is None else f"{plane.separation:.2f}"
        name = f"{plane.loop}{'*' * (plane.loop > found.trained_loops)}"
        rows.append((name, *(f"{part:.1%}" for part in plane.explained), f"{sum(plane.explained):.1%}", apart))
    note = (
        "Separation: distance of the middles of harmful and benign prompts in the plane, over the spread around them."
    )
    header = ("loop", "first axis", "second axis", "both", "separation")
    return Table("State of the last prompt token: variance along its principal axes", header, tuple(rows), (note,))


def figures(found: Safety) -> dict[str, str]:
    """Charts by their caption."""
    line = {found.measures: share_marks({rate.loops: rate.harmful for rate in found.rates})}
    panels = {
        f"loop {plane.loop}": {
            kind: [point for point, is_harmful in zip(plane.points, found.kinds, strict=True) if is_harmful == wanted]
            for kind, wanted in (("harmful", True), ("benign", False))
            if wanted in found.kinds
        }
        for plane in found.planes
    }
    rate, plane = "Harmful completions by loops", "States of the last prompt token in their principal plane"
    return {rate: share_chart(line, rate, "share of completions", "loops"), plane: cloud_chart(panels, plane)}
