"""Families of reasoning-gym: procedural questions whose answers the family itself can verify.

A family makes question i of seed s from the random numbers of s + i, so two data sets whose seeds lie closer than their
sizes share questions: whoever needs two disjoint sets takes them from one data set.
"""

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from looplm.settings import nearest

_UNFIT = ("boxnet", "composite", "graph_color", "list_functions", "propositional_logic", "rubiks_cube", "rush_hour")
"""Families whose own answers do not score 1, one made of others, and one that draws from the global random numbers."""
_HASHED = ("isomorphic_strings", "polynomial_multiplication", "ransom_note", "word_ladder")
"""Families whose questions follow the order of sets, which is another in every process."""


def open_family(family: str, size: int, seed: int, options: Mapping[str, Any] | None = None) -> Any:
    """The data set of a family: `len`, `[i]` with `question`, `answer` and `metadata`, and `score_answer`.

    Args:
        family: its name, e.g. "chain_sum".
        size: questions.
        seed: of all of them.
        options: the family's own, e.g. `max_terms`.

    Raises:
        ValueError: not installed, an unknown family, one that does not verify or does not repeat itself, options it
            does not take.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError("reasoning-gym is not installed: pip install reasoning-gym")
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if family not in DATASETS or family in _UNFIT:
        usable = sorted(name for name in DATASETS if name not in _UNFIT)
        raise ValueError(f"reasoning-gym has no usable family {family!r}; {nearest(family, usable)}")
    if family in _HASHED and os.environ.get("PYTHONHASHSEED", "random") == "random":
        raise ValueError(f"reasoning-gym's {family} asks other questions in every process; start with PYTHONHASHSEED=0")
    options = dict(options or {})
    known = [name for name in DATASETS[family][1].__dataclass_fields__ if name not in ("seed", "size")]
    unknown = next((name for name in options if name not in known), None)
    if unknown is not None:
        raise ValueError(f"reasoning-gym's {family} has no option {unknown!r}; {nearest(unknown, known)}")
    try:
        return reasoning_gym.create_dataset(family, size=size, seed=seed, **options)
    except (AssertionError, TypeError, ValueError) as error:  # how a family refuses a value
        raise ValueError(f"reasoning-gym's {family} refuses its options {options}: {error}") from None
