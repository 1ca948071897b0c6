"""The ledger of claims: what the runs say of each, judged by rules that were fixed before (`looplm.lab.claims`).

A claim needs all its contrasts, so its p-value is the largest of theirs (an intersection-union test), and Holm corrects
it over all claims of the ledger; claims not run yet count as 1. A difference points the right way where its whole
interval does, no difference where its mean lies within the margin.

    reproduced                          the corrected p-value is at most .05
    in direction                        it is not, but every contrast points the right way
    not reproduced                      one contrast does not
    not testable at this scale          the condition that the claim sets for being testable is not met, or a run that
                                        it reads diverged to a loss that is no number
    not run yet

A claim is exploratory, whatever its verdict, where its entry in claims.yaml was committed or changed after its first
run began or is not committed, where the code that ran was not, or where the seeds are too few (8 for runs of under two
minutes, else 5).
"""

import math
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from looplm.lab.claims import FILE, Claim, Contrast, best_rates, entries, missing_runs
from looplm.lab.readings import Side, value_of
from looplm.lab.runner import git
from looplm.lab.settings import RunSettings
from looplm.lab.statistics import holm, interval, p_equal, p_greater

ALPHA = 0.05
SHORT, FEWEST_SHORT = 120.0, 8
"""Runs of fewer CPU seconds need so many seeds."""
Runs = Mapping[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Finding:
    """What the runs say of a contrast.

    Attributes:
        contrast: as claimed.
        left, right: the two sides' numbers in the order of the claim's seeds; empty where runs are missing.
        mean, low, high: the difference and its 95 % interval; None where runs are missing or a number is not finite.
        p: one-sided, or of equivalence; 1 where there is no mean.
    """

    contrast: Contrast
    left: list[float]
    right: list[float]
    mean: float | None
    low: float | None
    high: float | None
    p: float

    @property
    def points(self) -> bool:
        """Whether the interval lies the way that is claimed; where no difference is, the mean within the margin."""
        if self.mean is None or self.low is None:
            return False
        return self.low > 0 if self.contrast.kind == "greater" else abs(self.mean) < self.contrast.margin


@dataclass(frozen=True)
class Entry:
    """A claim in the ledger.

    Attributes:
        claim: as it stands in claims.yaml.
        findings: one a contrast.
        p: of the claim, by Holm over the ledger.
        verdict: see the module.
        because: the reason in words, or "".
        exploratory: why the claim is only exploratory, or "".
        rates: the learning rate of each arm, once it is chosen.
        missing: runs that are still to be done before the next decision.
        runs: that were done, and flops: of all of them, the sweep included.
    """

    claim: Claim
    findings: list[Finding]
    p: float
    verdict: str
    because: str
    exploratory: str
    rates: dict[str, float]
    missing: int
    runs: int
    flops: float


def judge(claims: Sequence[Claim], runs: Runs, ages: Mapping[str, int | str], quick: bool = False) -> list[Entry]:
    """The ledger.

    Args:
        claims: all of it; the correction is over all of them.
        runs: rows by the key of their run.
        ages: since when each claim stands as it does (`committed`), by name.
        quick: the reduced ledger, which is exploratory throughout.
    """
    rates = {claim.name: best_rates(claim, dict(runs)) if claim.waiting is None else None for claim in claims}
    findings = [[_found(claim, c, rates[claim.name], runs) for c in claim.contrasts] for claim in claims]
    adjusted = holm([max((finding.p for finding in row), default=1.0) for row in findings])
    return [
        _entry(claim, row, p, rates[claim.name] or {}, runs, "the reduced ledger" if quick else ages[claim.name])
        for claim, row, p in zip(claims, findings, adjusted, strict=True)
    ]


def values(claim: Claim, side: Side, rates: Mapping[str, float], runs: Runs) -> list[float]:
    """The numbers of one side, a seed each; empty where a run is missing."""
    keys = [settings.key for settings in claim.reported(rates)[side.arm, side.condition]]
    if any(key not in runs for key in keys):
        return []
    return [value_of(runs[key], claim.reading, side) for key in keys]


def _found(claim: Claim, contrast: Contrast, rates: Mapping[str, float] | None, runs: Runs) -> Finding:
    left, right = ([] if rates is None else values(claim, s, rates, runs) for s in (contrast.left, contrast.right))
    if not (left and right and all(map(math.isfinite, left + right))):
        return Finding(contrast, left, right, None, None, None, 1.0)
    differences = [a - b for a, b in zip(left, right, strict=True)]
    test = p_greater if contrast.kind == "greater" else p_equal
    low, high = interval(differences)
    return Finding(contrast, left, right, statistics.fmean(differences), low, high, test(differences, contrast.margin))


def _entry(
    claim: Claim, findings: list[Finding], p: float, rates: dict[str, float], runs: Runs, age: int | str
) -> Entry:
    used = [settings for settings in wanted(claim, rates) if settings.key in runs]
    missing = sum(1 for _ in missing_runs(claim, runs))
    verdict, because = _verdict(claim, findings, p, rates, missing, runs)
    rows = [runs[settings.key] for settings in used]
    return Entry(
        claim=claim,
        findings=findings,
        p=p,
        verdict=verdict,
        because=because,
        exploratory=_exploratory(claim, rows, age) if used else "",
        rates=rates,
        missing=missing,
        runs=len(used),
        flops=sum(max(row["flops"] for row in run) for run in rows),
    )


def wanted(claim: Claim, rates: Mapping[str, float]) -> list[RunSettings]:
    """All runs of a claim that are known by now: the sweep, and those that count once rates are chosen."""
    if claim.waiting is not None:
        return []
    found = [settings for swept in claim.sweep().values() for settings in swept]
    return found + [settings for seeds in (claim.reported(rates) if rates else {}).values() for settings in seeds]


def _verdict(
    claim: Claim, findings: Sequence[Finding], p: float, rates: Mapping[str, float], missing: int, runs: Runs
) -> tuple[str, str]:
    if claim.waiting is not None:
        return "not run yet", claim.waiting
    if missing or not rates:
        return "not run yet", f"{missing} runs are missing" + ("" if rates else ", and those after the sweep")
    unread = next((finding.contrast.label for finding in findings if finding.mean is None), None)
    if unread is not None:
        return "not testable at this scale", f"a run of {unread} diverged"
    bound = claim.testable
    if bound is not None:
        reached = statistics.fmean(values(claim, Side(arm=bound.arm, condition=bound.condition), rates, runs))
        if reached < bound.at_least:
            where = f"{bound.arm} reaches {reached:.3f}; {bound.at_least:g} was set as the least"
            return "not testable at this scale", where
    if p <= ALPHA:
        return "reproduced", ""
    weak = [finding for finding in findings if finding.p > ALPHA]
    reasons = [f"{finding.contrast.label} ({finding.mean:+.3f}, p {finding.p:.2g})" for finding in weak]
    because = "; ".join(reasons) or f"corrected over the ledger p is {p:.2g}"
    return "in direction" if all(finding.points for finding in findings) else "not reproduced", because


def _exploratory(claim: Claim, runs: Sequence[Sequence[Mapping[str, Any]]], age: int | str) -> str:
    """Why not more, or ""."""
    began = min(rows[0]["began"] for rows in runs)
    commits = sorted({rows[0]["commit"] for rows in runs})
    uncommitted = [commit for commit in commits if commit == "unknown" or commit.endswith("-dirty")]
    short = statistics.median(rows[0]["cpu_seconds"] for rows in runs) < SHORT
    if isinstance(age, str):
        return age
    if age > began:
        return "its entry in claims.yaml was committed or changed after its first run began"
    if uncommitted:
        return f"it ran code that was not committed ({uncommitted[0]})"
    if short and len(claim.seeds) < FEWEST_SHORT:
        return f"{len(claim.seeds)} seeds of runs under two minutes, which need {FEWEST_SHORT}"
    return ""


def committed(path: Path = FILE) -> dict[str, int | str]:
    """Since when each claim stands as it does in the file: the time of that commit, or why there is none.

    Times are seconds since 1970, of committing. The history is walked back for as long as a claim's entry is the same.
    """
    now = _by_name(path.read_text(encoding="utf-8"))
    try:
        place = path.resolve().parent
        log = git(place, "log", "--format=%H %ct", "--", path.name).split("\n")
        versions = [line.split() for line in log if line]
        texts = [(int(time), git(place, "show", f"{commit}:./{path.name}")) for commit, time in versions]
    except (OSError, subprocess.CalledProcessError):
        return dict.fromkeys(now, "claims.yaml is not in git here, so nothing shows when it was written")
    ages: dict[str, int | str] = dict.fromkeys(now, "its entry in claims.yaml is not committed")
    same = set(now)
    for time, text in texts:
        then = _by_name(text)
        same = {name for name in same if then.get(name) == now[name]}
        ages |= dict.fromkeys(same, time)
    return ages


def _by_name(text: str) -> dict[str, Any]:
    return {entry["name"]: entry for entry in entries(text)["claims"]}


def strangers(entries_of: Sequence[Entry], runs: Runs) -> int:
    """Runs in the results that belong to no claim as it stands: it was edited after they ran."""
    known = {settings.key for entry in entries_of for settings in wanted(entry.claim, entry.rates)}
    return sum(1 for key in runs if key not in known)
