"""Addition of n operands (Saunshi et al. section 2.1, table 1).

`315+120+045+824=`, then `1304`: operands padded with zeros, the sum without, every digit a token (how the paper cuts
text into tokens it does not say), `<end>` behind the sum. The digits of the sum are learnt and graded one after another
with those before them given; all right means that greedy decoding is right.

Held-out items are sets of operands: their order and operands of zero make no difference.
"""

from typing import Annotated, Self

import numpy as np
from pydantic import Field

from looplm.lab.tasks.base import PAD, DrawnTask, LevelSettings, Rows
from looplm.lab.tasks.draws import Draws, Integers, Mask, digest_set


class AdditionSettings(LevelSettings):
    """Settings of addition; a level is a number of operands."""

    digits: Annotated[int, Field(ge=1, le=9)]
    """D, digits of an operand."""
    least_significant_first: bool = False
    """Write operands and sum from their last digit on, the sum with as many digits as any sum has and without end."""

    @classmethod
    def paper(cls) -> Self:
        """Three digits; 24 operands are seen in tests only."""
        return cls(levels=(2, 4, 8, 16, 32), test_levels=(8, 16, 24, 32), digits=3)

    @classmethod
    def laptop(cls) -> Self:
        """Two digits, last digit first, up to four operands."""
        return cls(levels=(2, 3, 4), test_levels=(2, 3, 4), digits=2, least_significant_first=True)


class Addition(DrawnTask[AdditionSettings]):
    """Sums of several operands."""

    name = "addition"
    shows = (
        "The sum of n numbers in one go; the claim: a layer looped is nearly as good as that many layers, also for "
        "more operands than were trained (Saunshi section 2.1)."
    )
    unit = "operands"
    separator = ""
    Settings = AdditionSettings

    def _words(self) -> tuple[str, ...]:
        return (*map(str, range(10)), "+", "=", PAD, "<end>")

    @property
    def _sum_digits(self) -> int:
        return len(str(self.settings.hardest * (10**self.settings.digits - 1)))

    def _length(self) -> int:
        ended = 0 if self.settings.least_significant_first else 1
        return self.settings.hardest * (self.settings.digits + 1) - 1 + self._sum_digits + ended

    def _draw(self, draws: Draws, levels: Integers) -> Rows:
        most, digits = int(levels.max()), self.settings.digits
        used = np.arange(most) < levels[:, None]
        operands = np.where(used, draws.integers(10**digits, len(levels), most), 0)
        tokens, targets, answer = self._blank(len(levels))
        question = np.full((len(levels), most, digits + 1), self.ids["+"])
        question[..., :digits] = self._ordered(decimals(operands, digits))
        tokens[:, : most * (digits + 1)] = np.where(
            np.repeat(used, digits + 1, axis=1), question.reshape(len(levels), -1), self.ids[PAD]
        )
        self._write_sums(tokens, targets, answer, operands.sum(axis=1), levels * (digits + 1) - 1)
        return Rows(tokens, targets, answer, digest_set(operands, operands > 0)[:, None])

    def _write_sums(self, tokens: Integers, targets: Integers, answer: Mask, sums: Integers, equals: Integers) -> None:
        """The `=` of each row and the sum behind it, in place."""
        places, rows = np.arange(self._sum_digits), np.arange(len(sums))
        tokens[rows, equals] = self.ids["="]
        written = self._ordered(decimals(sums, len(places)))
        if self.settings.least_significant_first:
            shown = np.ones(written.shape, np.bool_)
        else:
            unpadded = np.maximum((sums[:, None] >= 10**places).sum(axis=1), 1)
            start = len(places) - unpadded[:, None]
            written = np.take_along_axis(written, np.minimum(start + places, len(places) - 1), axis=1)
            ended = np.full((len(sums), 1), self.ids["<end>"])
            written = np.concatenate([np.where(places < unpadded[:, None], written, ended), ended], axis=1)
            shown = np.arange(len(places) + 1) <= unpadded[:, None]
        row, place = np.nonzero(shown)
        targets[row, equals[row] + place] = written[row, place]
        answer[row, equals[row] + place] = True
        row, place = np.nonzero(shown[:, 1:])
        tokens[row, equals[row] + place + 1] = written[row, place]

    def _ordered(self, digits: Integers) -> Integers:
        """Digits in the order they are written, from the least significant first."""
        return digits if self.settings.least_significant_first else digits[..., ::-1]


def decimals(numbers: Integers, count: int) -> Integers:
    """The last `count` decimal digits of whole numbers, least significant first, along a new last axis."""
    return numbers[..., None] // 10 ** np.arange(count) % 10
