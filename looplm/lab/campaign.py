"""`looplm lab claims`: run what the claims still need, claim by claim, and write the ledger after each."""

from collections.abc import Sequence
from pathlib import Path

from looplm.lab.claims import FILE, Claim, load_claims, missing_runs
from looplm.lab.ledger import Entry, committed, judge
from looplm.lab.report import write_ledger
from looplm.lab.results import FILE as RESULTS
from looplm.lab.results import by_run, load
from looplm.lab.runner import run_all
from looplm.settings import nearest


def run_claims(
    folder: Path, only: Sequence[str], quick: bool, workers: int, command: str, path: Path = FILE
) -> list[Entry]:
    """Run and judge; the ledger always holds all claims, for the correction is over all of them.

    Args:
        folder: of results and ledger.
        only: names of the claims to run; all where empty.
        quick: those marked for the reduced ledger only, with fewer seeds.
        workers: processes; 0 runs nothing.
        command: as typed, for the page.
        path: of the claims.

    Raises:
        ValueError: an unknown claim, or as `run_all`.
    """
    claims = [claim.shortened() for claim in load_claims(path) if claim.quick] if quick else load_claims(path)
    names = [claim.name for claim in claims]
    unknown = next((name for name in only if name not in names), None)
    if unknown is not None:
        raise ValueError(f"no such claim: {unknown}; {nearest(unknown, names)}")
    ages = committed(path)
    entries = write(claims, folder, ages, quick, command)
    for claim in claims if workers else []:
        if not only or claim.name in only:
            _finish(claim, folder, workers)
            entries = write(claims, folder, ages, quick, command)
    return entries


def write(claims: Sequence[Claim], folder: Path, ages: dict[str, int | str], quick: bool, command: str) -> list[Entry]:
    """Judge the runs there are, and write the ledger."""
    runs = by_run(load(folder / RESULTS))
    entries = judge(claims, runs, ages, quick)
    write_ledger(entries, runs, folder, command)
    return entries


def _finish(claim: Claim, folder: Path, workers: int) -> None:
    """The sweep of the learning rates, then the runs that count."""
    for _ in range(2):
        missing = list(missing_runs(claim, by_run(load(folder / RESULTS))))
        if missing:
            run_all(missing, folder, workers)
