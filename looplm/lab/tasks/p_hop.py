"""p-hop induction (Saunshi et al. section 2.1; the task is Sanford, Hsu and Telgarsky's).

    find_1(v, i) = the last j <= i with v[j-1] = v[i],  find_p(v, i) = find_1(v, find_p-1(v, i)),  0 where there is none

and the answer is v[find_p(v, n)]. As published, one question a row, at its end: p hops are forced by placing the p
pairs (s_h-1, s_h) of a random walk s_0, s_1, ... without doubled symbols among fillers that do not disturb them.

`dense` rows answer everywhere that p hops lead somewhere. There no symbol follows itself: find_1 of a doubled symbol is
its own position, so a hop would stay where it is, and with 4 random symbols a tenth only of 8-hop questions has 8 hops.

Held-out items are sequences up to a renaming of their symbols, whatever p is. All rows are equally long and the last
position alone is graded, so no shorter sequence, nor any prefix, ever asked for a graded answer.
"""

from typing import Annotated, Self

import numpy as np
from pydantic import Field, model_validator

from looplm.lab.tasks.base import IGNORED, DrawnTask, LevelSettings, Rows
from looplm.lab.tasks.draws import NOWHERE, Draws, Integers, digest

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class PHopSettings(LevelSettings):
    """Settings of p-hop induction; a level is p."""

    symbols: Annotated[int, Field(ge=2, le=len(LETTERS))]
    """Size of the alphabet."""
    symbols_a_row: Annotated[int, Field(ge=3)]
    """n."""
    dense: bool = False
    """Learn the answer at every position that has one, in rows without doubled symbols."""

    @classmethod
    def paper(cls) -> Self:
        """p = 16, the easier of 16 and 32."""
        return cls(levels=(16,), test_levels=(16,), symbols=4, symbols_a_row=256)

    @classmethod
    def laptop(cls) -> Self:
        """Up to four hops, the first token says how many."""
        return cls(levels=(1, 2, 3, 4), test_levels=(1, 2, 3, 4), symbols=4, symbols_a_row=32, dense=True)

    @model_validator(mode="after")
    def _hops_fit(self) -> Self:
        needed = self.hardest + 2 if self.dense else 2 * self.hardest + 1
        if self.symbols_a_row < needed:
            raise ValueError(f"symbols_a_row is {self.symbols_a_row}; {self.hardest} hops need at least {needed}")
        if self.dense and self.symbols < 3:
            raise ValueError("symbols is 2; dense rows repeat no symbol, so they need at least 3")
        return self


class PHop(DrawnTask[PHopSettings]):
    """p-hop induction; a row begins with the number of hops where there are several."""

    name = "p-hop"
    shows = (
        "What came after a symbol's last occurrence, p times over; the claim: a layer looped is as good as that many "
        "layers (Saunshi section 2.1)."
    )
    unit = "hops"
    Settings = PHopSettings

    def _words(self) -> tuple[str, ...]:
        counts = sorted({*self.settings.levels, *self.settings.test_levels})
        return (*LETTERS[: self.settings.symbols], *(f"<{p}>" for p in counts if len(counts) > 1))

    @property
    def _lead(self) -> int:
        return int(len(self.vocabulary) > self.settings.symbols)

    def _length(self) -> int:
        return self._lead + self.settings.symbols_a_row

    def _draw(self, draws: Draws, levels: Integers) -> Rows:
        settings, count = self.settings, len(levels)
        symbols = np.empty((count, settings.symbols_a_row), np.int64)
        if settings.dense:
            symbols[:] = walks(draws, count, settings.symbols_a_row, settings.symbols)
        else:
            for p in np.unique(levels):
                rows = np.flatnonzero(levels == p)
                symbols[rows] = forced(draws, len(rows), int(p), settings.symbols_a_row, settings.symbols)
        places = np.arange(0 if settings.dense else settings.symbols_a_row - 1, settings.symbols_a_row)
        reached = find(symbols, settings.symbols, levels, places)
        tokens, targets, answer = self._blank(count)
        tokens[:, self._lead :] = symbols
        if self._lead:
            tokens[:, 0] = np.array([self.ids.get(f"<{p}>", 0) for p in range(settings.hardest + 1)])[levels]
        told = np.take_along_axis(symbols, np.maximum(reached, 0), axis=1)
        targets[:, self._lead + places] = np.where(reached >= 0, told, IGNORED)
        answer[:, -1] = True
        keys = np.where(reached[:, -1] >= 0, digest(renamed(symbols, settings.symbols)), NOWHERE)
        return Rows(tokens, targets, answer, keys[:, None])


def walks(draws: Draws, rows: int, length: int, symbols: int) -> Integers:
    """Uniform sequences in which no symbol follows itself, (rows, length)."""
    steps = 1 + draws.integers(symbols - 1, rows, length)
    steps[:, 0] = draws.integers(symbols, rows)
    return steps.cumsum(axis=1) % symbols


def forced(draws: Draws, rows: int, p: int, length: int, symbols: int) -> Integers:
    """Sequences whose last symbol has exactly p hops before it, each to an earlier position, (rows, length).

    Between the pair that hop h lands in and the next one stands no symbol s_h-1, which that hop looks for.
    """
    walk = walks(draws, rows, p + 1, symbols)  # s_0, ..., s_p
    slots = np.sort(draws.order(rows, length - 1 - p)[:, :p], axis=1)
    starts = slots + np.arange(p)  # of the pairs, from left to right: hop p, ..., hop 1
    begun = np.zeros((rows, length), np.int64)
    np.put_along_axis(begun, starts, 1, axis=1)
    begun = begun.cumsum(axis=1)
    sought = np.take_along_axis(walk, np.minimum(p - begun, p), axis=1)
    others = (sought + 1 + draws.integers(symbols - 1, rows, length)) % symbols
    sequence = np.where(begun == 0, draws.integers(symbols, rows, length), others)
    np.put_along_axis(sequence, starts, walk[:, p - 1 :: -1], axis=1)
    np.put_along_axis(sequence, starts + 1, walk[:, :0:-1], axis=1)
    sequence[:, -1] = walk[:, 0]
    return sequence


def landings(symbols: Integers, alphabet: int) -> Integers:
    """find_1 of every position, counted from 0, or -1 where there is none; (B, n) in and out."""
    places = np.arange(symbols.shape[1])
    once = np.full(symbols.shape, -1, np.int64)
    for symbol in range(alphabet):
        here = symbols == symbol
        seen = np.maximum.accumulate(np.where(here, places, -2), axis=1)
        once[:, 1:] = np.where(here[:, 1:], seen[:, :-1] + 1, once[:, 1:])
    return once


def find(symbols: Integers, alphabet: int, hops: Integers, places: Integers) -> Integers:
    """find_p of some positions, counted from 0, or -1 where there is none, (B, K).

    Args:
        symbols: (B, n).
        alphabet: how many symbols there are.
        hops: (B,), p of each row.
        places: (K,), the positions.
    """
    once = landings(symbols, alphabet)
    reached = np.tile(places, (len(symbols), 1))
    for hop in range(1, int(hops.max()) + 1):
        ahead = np.take_along_axis(once, np.maximum(reached, 0), axis=1)
        reached = np.where((reached >= 0) & (hop <= hops)[:, None], ahead, reached)
    return reached


def renamed(symbols: Integers, alphabet: int) -> Integers:
    """The sequences with their symbols renamed 0, 1, ... in the order in which they first appear."""
    here = [symbols == symbol for symbol in range(alphabet)]
    first = np.stack([np.where(at.any(axis=1), at.argmax(axis=1), symbols.shape[1]) for at in here], axis=1)
    names = np.argsort(np.argsort(first, axis=1, kind="stable"), axis=1, kind="stable")
    return np.take_along_axis(names, symbols, axis=1)
