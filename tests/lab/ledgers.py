"""Results made up for the tests of the ledger: rows of runs that were never trained."""

from typing import Any

from looplm.lab.claims import Claim
from looplm.lab.settings import RunSettings

SEEDS = [101, 102, 103, 104, 105, 106, 107, 108]


def claim(**changes: Any) -> Claim:
    """A claim that two loops beat one by more than 0.1, at a single learning rate."""
    values: dict[str, Any] = {
        "number": "1",
        "name": "made-up",
        "paper": "Nobody 1.1",
        "statement": "Two loops are better than one.",
        "settings": {"task": "p-hop", "steps": 10},
        "arms": {"two": {"loops": 2}, "one": {}},
        "learning_rates": [0.003],
        "seeds": SEEDS,
        "contrasts": [{"left": {"arm": "two"}, "right": {"arm": "one"}, "margin": 0.1}],
    }
    return Claim.validated({**values, **changes}, "claims")


def rows(settings: RunSettings, score: float, **changes: Any) -> list[dict[str, Any]]:
    """What a run of these settings leaves, in one row."""
    row = {
        "run": settings.key,
        "loops": settings.loops,
        "seed": settings.seed,
        "commit": "0123456789ab",
        "began": 2_000,
        "cpu_seconds": 60.0,
        "diverged": False,
        "step": settings.steps,
        "flops": 1e9,
        "loop": settings.loops,
        "difficulty": 1,
        "items": 100,
        "score": score,
        "loss": 1.0 - score,
        "exit_probability": 0.5,
        "bits_per_parameter": None,
        "rule": None,
        "over": None,
        "mean_loops": None,
    }
    return [{**row, **changes}]


def results(made: Claim, scores: dict[str, list[float]], **changes: Any) -> dict[str, list[dict[str, Any]]]:
    """Runs of a claim by their key: scores by arm, in the order of the seeds."""
    rates = dict.fromkeys(made.arms, made.learning_rates[0])
    found = {}
    for (arm, _), seeds in made.reported(rates).items():
        for settings, score in zip(seeds, scores.get(arm, []), strict=False):
            found[settings.key] = rows(settings, score, **changes)
    return found
