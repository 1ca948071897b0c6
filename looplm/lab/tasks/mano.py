"""Mano: prefix arithmetic modulo p in the head (Ouro section 6.2, B.2).

`<bos> <len_3> - * a b + c d <ans>`, then the value, without any intermediate step. The number of operators is uniform;
the paper does not say how trees are shaped, here the remaining operators are split uniformly between the two sides.
The paper reads its example as (a*b)+(c-d), but in prefix order it is (a*b)-(c+d), and so it is here.

Single operations are the knowledge itself and are in every split. From two operators on, an expression is held out
together with all that differ from it by swapped sides of + and *; with dense targets, training rows hold no such
expression as a part either.
"""

from typing import Annotated, NamedTuple, Self

import numpy as np
from pydantic import Field

from looplm.lab.tasks.base import PAD, DrawnTask, LevelSettings, Rows
from looplm.lab.tasks.draws import EVERYWHERE, Draws, Integers, Keys, digest

OPERATORS = ("+", "-", "*")


class ManoSettings(LevelSettings):
    """Settings of Mano; a level is a number of operators."""

    modulus: Annotated[int, Field(ge=2)]
    """p; numbers are 0..p - 1."""
    dense: bool = False
    """Also learn, at every number that ends a part of the expression, the value of the largest part it ends."""

    @classmethod
    def paper(cls) -> Self:
        """L = 10, the easiest of 10, 16 and 24; tested at full length only."""
        return cls(levels=tuple(range(1, 11)), test_levels=(10,), modulus=23)

    @classmethod
    def laptop(cls) -> Self:
        """Modulus 5 and up to three operators."""
        return cls(levels=(1, 2, 3), test_levels=(1, 2, 3), modulus=5, dense=True)


class Expressions(NamedTuple):
    """Expressions in prefix order, (B, 2L + 1) each; what is said of a position concerns the part that starts there."""

    operators: Integers
    """Operators in the part: 0 for a number, -1 behind the expression."""
    symbols: Integers
    """Which operator, or which number."""
    values: Integers
    ends: Integers
    """Last position of the part."""
    keys: Keys
    """The same for parts that differ by swapped sides of + and *."""


class Mano(DrawnTask[ManoSettings]):
    """Prefix arithmetic modulo p."""

    name = "mano"
    shows = (
        "Prefix arithmetic modulo p without intermediate steps; the claim: looping composes what the weights know "
        "better than more parameters do (Ouro section 6.2)."
    )
    unit = "operators"
    Settings = ManoSettings

    def _words(self) -> tuple[str, ...]:
        lengths = (f"<len_{n}>" for n in range(self.settings.hardest + 1))
        return (PAD, "<bos>", "<ans>", *OPERATORS, *map(str, range(self.settings.modulus)), *lengths)

    def _length(self) -> int:
        return 2 * self.settings.hardest + 4

    def _draw(self, draws: Draws, levels: Integers) -> Rows:
        parts = evaluate(*expressions(draws, levels, self.settings.modulus), self.settings.modulus)
        tokens, targets, answer = self._blank(len(levels))
        rows, number = np.arange(len(levels)), self.ids["0"]
        tokens[:, 0], tokens[:, 1] = self.ids["<bos>"], self.ids["<len_0>"] + levels
        inner = parts.operators > 0
        written = np.where(inner, self.ids["+"], number) + parts.symbols
        shown = parts.operators >= 0
        tokens[:, 2 : 2 + shown.shape[1]][shown] = written[shown]
        if self.settings.dense:
            for place in reversed(range(shown.shape[1])):  # the largest part that ends somewhere starts first
                here = np.flatnonzero(inner[:, place])
                targets[here, 2 + parts.ends[here, place]] = number + parts.values[here, place]
        asked = 2 * levels + 3
        tokens[rows, asked] = self.ids["<ans>"]
        targets[rows, asked] = number + parts.values[:, 0]
        answer[rows, asked] = True
        keys = np.where(parts.operators >= 2, parts.keys, EVERYWHERE)
        return Rows(tokens, targets, answer, keys if self.settings.dense else keys[:, :1])


def expressions(draws: Draws, levels: Integers, modulus: int) -> tuple[Integers, Integers]:
    """Random expressions with `levels` operators each: operators and symbols as in `Expressions`.

    A stack holds the sizes of the parts still to be written; an operator of size m leaves m - 1 to its two sides.
    """
    rows, width = np.arange(len(levels)), 2 * int(levels.max()) + 1
    operators = np.full((len(levels), width), -1, np.int64)
    stack, depth = np.zeros((len(levels), width + 1), np.int64), np.ones(len(levels), np.int64)
    stack[:, 0] = levels
    for place in range(width):
        size = np.where(depth > 0, stack[rows, depth - 1], -1)
        operators[:, place] = size
        left = draws.integers(np.maximum(size, 1))
        inner = np.flatnonzero(size > 0)
        stack[inner, depth[inner] - 1] = size[inner] - 1 - left[inner]
        stack[inner, depth[inner]] = left[inner]
        depth += np.where(size > 0, 1, np.where(size == 0, -1, 0))
    choices = np.where(operators > 0, len(OPERATORS), modulus)
    return operators, draws.integers(choices)


def evaluate(operators: Integers, symbols: Integers, modulus: int) -> Expressions:
    """Values, ends and keys of all parts, from right to left with a stack of the positions whose parts await a side."""
    count, width = operators.shape
    values, ends, keys = symbols.copy(), np.tile(np.arange(width), (count, 1)), digest(symbols[..., None])
    stack, depth = np.zeros((count, width + 1), np.int64), np.zeros(count, np.int64)
    for place in reversed(range(width)):
        inner = np.flatnonzero(operators[:, place] > 0)
        left, right = stack[inner, depth[inner] - 1], stack[inner, depth[inner] - 2]
        a, b, which = values[inner, left], values[inner, right], symbols[inner, place]
        values[inner, place] = np.choose(which, [a + b, a - b, a * b]) % modulus
        ends[inner, place] = ends[inner, right]
        keys[inner, place] = joined(which, keys[inner, left], keys[inner, right])
        depth += np.where(operators[:, place] > 0, -1, np.where(operators[:, place] == 0, 1, 0))
        written = np.flatnonzero(operators[:, place] >= 0)
        stack[written, depth[written] - 1] = place
    return Expressions(operators, symbols, values, ends, keys)


def joined(which: Integers, left: Keys, right: Keys) -> Keys:
    """The key of an operation on two parts; only those of - depend on the order."""
    sides = np.where(which == OPERATORS.index("-"), left + np.uint64(2) * right, left + right)
    return digest(np.stack([which.astype(np.uint64), sides], axis=1))
