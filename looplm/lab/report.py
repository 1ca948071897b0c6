"""The ledger for people: claims.md with a figure a claim, claims.json with every number, and a table on screen."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from looplm.files import write_json, write_text
from looplm.lab.claims import Claim
from looplm.lab.figures import dot_chart
from looplm.lab.ledger import Entry, Finding, Runs, strangers, values
from looplm.lab.readings import Measure

UNITS: dict[Measure, str] = {
    "score": "share of exact matches",
    "loss": "nats a graded target",
    "exit_probability": "mean exit probability",
    "bits_per_parameter": "bits a parameter",
    "mean_loops": "mean loops",
}


def ledger_table(entries: Sequence[Entry]) -> Table:
    """One row a claim."""
    table = Table(title="claims")
    for heading in ("", "claim", "paper", "seeds", "verdict", "because"):
        table.add_column(heading, overflow="fold")
    for entry in entries:
        claim, verdict = entry.claim, entry.verdict + (" (exploratory)" if entry.exploratory else "")
        reason = "; ".join(part for part in (entry.because, entry.exploratory) if part)
        table.add_row(claim.number, claim.name, claim.paper, _seeds(entry), verdict, reason)
    return table


def write_ledger(entries: Sequence[Entry], runs: Runs, folder: Path, command: str) -> None:
    """claims.md, claims.json and claim-NAME.svg; figures of claims without runs are removed."""
    figures = {entry.claim.name: _figure(entry, runs) for entry in entries}
    for name, drawing in figures.items():
        path = folder / f"claim-{name}.svg"
        if drawing:
            write_text(path, drawing)
        else:
            path.unlink(missing_ok=True)
    shown = {name for name, drawing in figures.items() if drawing}
    unknown = strangers(entries, runs)
    write_text(folder / "claims.md", _page(entries, runs, shown, unknown, command))
    plain = [_plain(entry) for entry in entries]
    head = {"command": command, "runs": len(runs), "flops": _flops(runs), "runs_of_no_claim": unknown}
    write_json(folder / "claims.json", {**head, "claims": plain})


def _figure(entry: Entry, runs: Runs) -> str:
    """Every seed a dot: sides of contrasts with the claim's measure, read as there, then arms that none names."""
    claim, groups = entry.claim, {}
    if entry.rates:
        sides = claim.sides() + claim.uncontrasted()
        same = [side for side in sides if side.measure in (None, claim.reading.measure)]
        groups = {side.label: [*filter(math.isfinite, values(claim, side, entry.rates, runs))] for side in same}
    return dot_chart(groups, f"{claim.number} {claim.name}", UNITS[claim.reading.measure])


def _plain(entry: Entry) -> dict[str, Any]:
    claim = entry.claim
    return {
        "number": claim.number,
        "claim": claim.name,
        "statement": claim.statement,
        "paper": claim.paper,
        "command": f"looplm lab claims --only {claim.name}",
        "scale": claim.settings.get("scale", "laptop"),
        "verdict": entry.verdict,
        "because": entry.because,
        "exploratory": entry.exploratory,
        "p_holm": entry.p,
        "seeds": claim.seeds if claim.waiting is None else [],
        "learning_rates": entry.rates,
        "runs": entry.runs,
        "runs_missing": entry.missing,
        "flops": entry.flops,
        "contrasts": [_plain_finding(finding) for finding in entry.findings],
    }


def _plain_finding(finding: Finding) -> dict[str, Any]:
    contrast = finding.contrast
    return {
        "contrast": contrast.label,
        "kind": contrast.kind,
        "margin": contrast.margin,
        "value": finding.mean,
        "interval": None if finding.low is None else [finding.low, finding.high],
        "p": finding.p if finding.mean is not None else None,
        "points_the_right_way": finding.points if finding.mean is not None else None,
        "left": finding.left,
        "right": finding.right,
    }


def _page(entries: Sequence[Entry], runs: Runs, shown: set[str], unknown: int, command: str) -> str:
    lines = [
        "# Claims",
        "",
        f"Made by `{command}`; do not edit. The claims, with arms, seeds and margins, stand in "
        "`looplm/lab/claims.yaml`; how they are judged is told in [docs/lab.md](../lab.md). Intervals are 95 % by "
        "bootstrap over seeds. A claim's p-value is the largest of its contrasts', corrected by Holm over all "
        f"{len(entries)} claims of the ledger. A difference is left minus right, paired by seed.",
        "",
        "| | claim | paper | seeds | verdict |",
        "|---|---|---|---|---|",
    ]
    for entry in entries:
        verdict = entry.verdict + (" (exploratory)" if entry.exploratory else "")
        claim = entry.claim
        lines.append(
            f"| {claim.number} | [{claim.name}](#{_anchor(claim)}) | {claim.paper} | {_seeds(entry)} | {verdict} |"
        )
    lines += ["", f"All runs together: {_flops(runs):.2e} FLOPs in {len(runs)} runs; claims may share some."]
    if unknown:
        lines += [
            "",
            f"**{unknown} runs in the results belong to no claim as it now stands: it was edited after they ran.**",
        ]
    for entry in entries:
        lines += ["", *_section(entry, entry.claim.name in shown)]
    return "\n".join(lines) + "\n"


def _section(entry: Entry, figure: bool) -> list[str]:
    claim = entry.claim
    lines = [f"## {claim.number} {claim.name}", "", f"{claim.statement} ({claim.paper})", ""]
    reason = f", because {entry.because}" if entry.because else f" (p {entry.p:.2g} over the ledger)"
    lines.append(f"**{entry.verdict}**{reason}.")
    if entry.exploratory:
        lines += ["", f"Exploratory: {entry.exploratory}."]
    if claim.waiting is not None:
        return lines
    if figure:
        lines += ["", f"![every seed of {claim.name}](claim-{claim.name}.svg)"]
    lines += [
        "",
        "| contrast | margin | difference | 95 % interval | p |",
        "|---|---|---|---|---|",
    ]
    lines += [_row(finding) for finding in entry.findings]
    rates = ", ".join(f"{arm} {rate:g}" for arm, rate in entry.rates.items()) or "to be swept"
    lines += ["", f"Learning rates: {rates}. {entry.runs} runs, {entry.flops:.2e} FLOPs, the sweep included."]
    return lines


def _row(finding: Finding) -> str:
    contrast = finding.contrast
    margin = f"above {contrast.margin:g}" if contrast.kind == "greater" else f"within {contrast.margin:g}"
    if finding.mean is None:
        why = "diverged" if finding.left and finding.right else "not run yet"
        return f"| {contrast.label} | {margin} | | | {why} |"
    where = f"{finding.low:+.3f} to {finding.high:+.3f}"
    return f"| {contrast.label} | {margin} | {finding.mean:+.3f} | {where} | {finding.p:.2g} |"


def _flops(runs: Runs) -> float:
    return sum(max(row["flops"] for row in rows) for rows in runs.values())


def _seeds(entry: Entry) -> str:
    return str(len(entry.claim.seeds)) if entry.claim.waiting is None else ""


def _anchor(claim: Claim) -> str:
    return f"{claim.number}-{claim.name}"
