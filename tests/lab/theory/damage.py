"""Perturbed weights: every way to change one number of a looped Transformer."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np

from looplm.lab.theory.transformer import LoopedTransformer


def paths(part: Any, prefix: tuple = ()) -> Iterator[tuple]:
    """Where the weights are: attribute names and tuple indices down to every non-zero number."""
    if isinstance(part, np.ndarray):
        yield from ((*prefix, tuple(map(int, index))) for index in np.argwhere(part))
    elif isinstance(part, tuple):
        for index, item in enumerate(part):
            yield from paths(item, (*prefix, index))
    elif is_dataclass(part):
        for field in fields(part):
            yield from paths(getattr(part, field.name), (*prefix, field.name))


def flipped(part: Any, path: tuple) -> Any:
    """The same weights with the sign of one of them changed."""
    step, rest = path[0], path[1:]
    if isinstance(part, np.ndarray):
        changed = part.copy()
        changed[step] *= -1
        return changed
    if isinstance(part, tuple):
        return tuple(flipped(item, rest) if index == step else item for index, item in enumerate(part))
    return replace(part, **{step: flipped(getattr(part, step), rest)})


def flips(model: LoopedTransformer) -> Iterator[tuple[tuple, LoopedTransformer]]:
    """The model with the sign of one weight changed, for every weight that is not zero."""
    for path in paths(model):
        yield path, flipped(model, path)
