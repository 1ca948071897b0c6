"""Variable assignment, `a=1, b=2, c=a, d=b, d=?` (Saunshi et al. section 3, the mathematical form of the primitive).

The printed example has two chains of depth 1; the paper asks depth 0 and 1. Here w chains run to depth d in layers:
constants first, then copies of the layer above, each layer in random order. Difficulty is the depth of the variable
asked about, in the last layer; guessing among the constants is right once in w.

Held-out items are sets of constants with the one that is the answer: names and orders make no difference, and as every
layer is the one above in another order, nothing else does.
"""

from typing import Annotated, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator

from looplm.lab.tasks.base import PAD, DrawnTask, LevelSettings, Rows
from looplm.lab.tasks.draws import Draws, Integers, digest

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class AssignmentSettings(LevelSettings):
    """Settings of variable assignment; a level is a depth, 0 asks for a constant."""

    lowest: ClassVar[int] = 0

    chains: Annotated[int, Field(ge=2)]
    """w, variables a layer."""
    values: Annotated[int, Field(ge=2, le=1000)] = 10
    """Constants are 0..values - 1, each in one chain at most."""

    @classmethod
    def paper(cls) -> Self:
        """Two chains, depth 0 and 1."""
        return cls(levels=(0, 1), test_levels=(0, 1), chains=2)

    @classmethod
    def laptop(cls) -> Self:
        """Three chains, to depth 5."""
        return cls(levels=tuple(range(6)), test_levels=tuple(range(6)), chains=3)

    @model_validator(mode="after")
    def _names_suffice(self) -> Self:
        needed = (self.hardest + 1) * self.chains
        if needed > len(LETTERS):
            raise ValueError(f"chains is {self.chains}; to depth {self.hardest} that is {needed} names, of 26 letters")
        if self.chains > self.values:
            raise ValueError(f"chains is {self.chains}; there are only {self.values} values")
        return self


class Assignment(DrawnTask[AssignmentSettings]):
    """The value of a variable behind a chain of copies."""

    name = "assignment"
    shows = (
        "The value of a variable behind d copies; the claim: looping helps such primitives of reasoning most (Saunshi "
        "section 3)."
    )
    unit = "copies"
    separator = ""
    Settings = AssignmentSettings

    def _words(self) -> tuple[str, ...]:
        return (*map(str, range(self.settings.values)), *LETTERS, "=", ",", "?", PAD)

    def _length(self) -> int:
        return 4 * (self.settings.hardest + 1) * self.settings.chains + 3

    def text(self, tokens: Integers) -> str:
        """Tokens as text, with a space after each comma as printed."""
        return super().text(tokens).replace(",", ", ")

    def _draw(self, draws: Draws, levels: Integers) -> Rows:
        count, width, layers = len(levels), self.settings.chains, self.settings.hardest + 1
        constants = draws.order(count, self.settings.values)[:, :width]
        names = self.ids["a"] + draws.order(count, len(LETTERS))[:, : layers * width].reshape(count, layers, width)
        sources = draws.order(count, layers, width)
        said, values = np.empty_like(names), np.empty_like(names)  # the right-hand sides, and what they come to
        said[:, 0] = values[:, 0] = constants
        for layer in range(1, layers):
            said[:, layer] = np.take_along_axis(names[:, layer - 1], sources[:, layer], axis=1)
            values[:, layer] = np.take_along_axis(values[:, layer - 1], sources[:, layer], axis=1)
        rows, asked, place = np.arange(count), draws.integers(width, count), 4 * (levels + 1) * width
        tokens, targets, answer = self._blank(count)
        statements = np.stack([names, np.full_like(names, self.ids["="]), said, np.full_like(names, self.ids[","])], 3)
        shown = np.arange(layers * width * 4) < place[:, None]
        tokens[:, :-3][shown] = statements.reshape(count, -1)[shown]
        tokens[rows, place], tokens[rows, place + 1] = names[rows, levels, asked], self.ids["="]
        tokens[rows, place + 2] = self.ids["?"]
        targets[rows, place + 2] = values[rows, levels, asked]
        answer[rows, place + 2] = True
        known = np.concatenate([np.sort(constants, axis=1), values[rows, levels, asked][:, None]], axis=1)
        return Rows(tokens, targets, answer, digest(known)[:, None])
