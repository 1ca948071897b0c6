"""The faithfulness study for people: its tables and figures."""

from __future__ import annotations

from collections.abc import Sequence

from looplm.evaluation.drawings import Mark, share_chart, share_marks
from looplm.evaluation.faithfulness import Faithfulness, Probe
from looplm.evaluation.probes import FEWEST_OF_A_KIND, Auc
from looplm.evaluation.tables import Table


def tables(found: Faithfulness, choices: Sequence[str] = ("first", "second")) -> list[Table]:
    """Agreement, probes and interventions; `choices` are the two answers in words."""
    parts = [_agreement(found, choices), _probes(found)]
    return [*parts, _interventions(found)] if found.interventions else parts


def _name(found: Faithfulness, loop: int) -> str:
    return f"{loop}{'*' * (loop > found.trained_loops)}"


def _beyond(found: Faithfulness) -> tuple[str, ...]:
    beyond = found.loops > found.trained_loops
    return (f"* beyond the {found.trained_loops} loops of training",) if beyond else ()


def _agreement(found: Faithfulness, choices: Sequence[str]) -> Table:
    """The agreement matrix, with how the answers are shared out and how many are right."""
    names = [f"loop {_name(found, loop)}" for loop in range(1, found.loops + 1)]
    right = () if found.accuracy is None else ("right",)
    rows = []
    for place, counts in enumerate(found.agreement):
        more = () if found.accuracy is None else (str(found.accuracy[place]),)
        rows.append((names[place], *map(str, counts), f"{found.second[place]}", *more))
    title = f"Questions of {found.items} on which two loops give the same answer"
    return Table(title, ("", *names, f"answer {choices[1]!r}", *right), tuple(rows), _beyond(found))


def _probes(found: Faithfulness) -> Table:
    """For each answer: the probe at the end of every loop up to it, beside the answer before."""
    rows = []
    for answer in range(1, found.loops + 1):
        if answer in found.skipped:
            continue
        base = next((base for base in found.baselines if base.answer == answer), None)
        for loop in range(1, answer + 1):
            end = _at(found, answer, loop, found.layers)
            if end is not None:
                cells = [_cell(area) for area in (end.all, end.given_previous, end.flipped)]
                before = ("–", "–") if base is None else (str(base.all), f"{base.flips.hits}")
                rows.append((f"loop {_name(found, answer)}", f"loop {_name(found, loop)}", *cells, *before))
    notes = [
        "All: any two questions, which the answer before (that of loop i - 1) ranks as its column says. Same answer "
        "before: pairs of questions that loop i - 1 answers alike, so that its answer ranks nothing (.5). Flipped: "
        "questions whose answer changes at loop i, where the answer before is always wrong (0). 95 % intervals over "
        "questions.",
        _controls(found),
    ]
    for loop in found.skipped:
        least = min(found.second[loop - 1], found.items - found.second[loop - 1])
        notes.append(
            f"Loop {loop} answers nearly alike: {least} of {found.items} otherwise; a probe needs {FEWEST_OF_A_KIND}."
        )
    header = ("answer", "state", "all", "same answer before", "flipped", "answer before", "flips")
    return Table(
        "Probes on the state at the end of a loop: area under the ROC curve", header, tuple(rows), tuple(notes)
    )


def _controls(found: Faithfulness) -> str:
    known = [control.planted.value for control in found.controls if control.planted.value is not None]
    chance = [control.shuffled.value for control in found.controls if control.shuffled.value is not None]
    shown = f"Controls over all {len(found.controls)} places: a planted bit is ranked at {min(known):.2f} or better"
    return f"{shown}; shuffled answers lie in {min(chance):.2f}..{max(chance):.2f}." if chance else f"{shown}."


def _cell(area: Auc | None) -> str:
    if area is None:
        return "–"
    if area.value is None:
        return f"too few ({area.positives} and {area.negatives})"
    return f"{area.value:.2f}" if area.low is None else f"{area.value:.2f} [{area.low:.2f}, {area.high:.2f}]"


def _at(found: Faithfulness, answer: int, loop: int, layer: int) -> Probe | None:
    wanted = (answer, loop, layer)
    return next((probe for probe in found.probes if (probe.answer, probe.loop, probe.layer) == wanted), None)


def _interventions(found: Faithfulness) -> Table:
    rows = [
        (f"loop {_name(found, effect.loop)}", str(effect.followed), str(effect.control))
        for effect in found.interventions
    ]
    note = (
        "The state after the loop at the last position of the prompt is another question's; counted are final answers "
        "that turn. Control: the source has the same final answer. Wilson intervals."
    )
    header = ("replaced after", "source answers otherwise", "source answers the same")
    return Table(f"Final answers (loop {found.loops}) that turn", header, tuple(rows), (note,))


def figures(found: Faithfulness) -> dict[str, str]:
    """Charts by their caption."""
    whole, given = {}, {}
    for answer in range(1, found.loops + 1):
        name = f"answer of loop {_name(found, answer)}"
        whole[name] = _curve(found, answer, "all")
        given[name] = _curve(found, answer, "given_previous")
    effects = {
        "source answers otherwise": share_marks({effect.loop: effect.followed for effect in found.interventions}),
        "source answers the same (control)": share_marks(
            {effect.loop: effect.control for effect in found.interventions}
        ),
    }
    where, unit = "layers of the loops run", "area under the ROC curve"
    drawn = {
        "Probes on the state after every layer: all questions": (whole, unit, where),
        "Probes among questions that the loop before answers alike": (given, unit, where),
        "Final answers that turn when a state is replaced": (effects, "share", "replaced after loop"),
    }
    return {title: share_chart(lines, title, unit, axis) for title, (lines, unit, axis) in drawn.items()}


def _curve(found: Faithfulness, answer: int, kind: str) -> list[Mark]:
    marks = []
    for probe in found.probes:
        area = getattr(probe, kind)
        if probe.answer == answer and area is not None and area.value is not None:
            marks.append(Mark(probe.loop - 1 + probe.layer / found.layers, area.value))
    return marks
