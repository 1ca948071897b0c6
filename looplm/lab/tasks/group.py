"""Group composition: `# g_1 ... g_n`, then the product g_1 o ... o g_n (Saunshi et al. theorem 5.1, input as there).

The paper proves it and publishes no experiment, so the sizes are ours. Permutations compose as functions,
(a o b)(x) = a(b(x)), and are written by their images: 132 leaves the first thing in its place. Z_n adds modulo n.

Products of one and two elements are the group's table and are in every split. A longer item goes by its first three
elements that are not the identity, so no prefix of a training row answers a held-out item, nor does one that only the
identity sets apart. Long items with fewer than three such elements are trained only.
"""

import re
from functools import lru_cache
from itertools import permutations
from typing import Self

import numpy as np
from pydantic import field_validator

from looplm.lab.tasks.base import PAD, DrawnTask, LevelSettings, Rows
from looplm.lab.tasks.draws import EVERYWHERE, TRAINING, Draws, Integers, Keys, digest

TOLD_BY = 3
"""Elements that decide the split of an item."""


class GroupSettings(LevelSettings):
    """Settings of group composition; a level is a number n of elements."""

    group: str
    """S2 to S5 (permutations) or Z2 to Z999 (addition modulo n)."""
    dense: bool = False
    """Also learn the product so far at every element."""

    @classmethod
    def paper(cls) -> Self:
        """S5, the hardest the theorem is usually told with, up to 64 elements."""
        return cls(levels=(1, 2, 4, 8, 16, 32, 64), test_levels=(4, 8, 16, 32, 64), group="S5")

    @classmethod
    def laptop(cls) -> Self:
        """S3, up to 16 elements."""
        return cls(levels=(1, 2, 4, 8, 16), test_levels=(4, 8, 16), group="S3", dense=True)

    @field_validator("group")
    @classmethod
    def _known(cls, name: str) -> str:
        if not re.fullmatch(r"S[2-5]|Z([2-9]|[1-9]\d{1,2})", name):
            raise ValueError("the groups are S2 to S5 (permutations) and Z2 to Z999 (addition modulo n)")
        return name


class Group(DrawnTask[GroupSettings]):
    """Products in a finite group."""

    name = "group"
    shows = "The product of n group elements; the claim: log2 n loops of one layer suffice (Saunshi theorem 5.1)."
    unit = "elements"
    Settings = GroupSettings

    def _words(self) -> tuple[str, ...]:
        return (*elements(self.settings.group), "#", PAD)

    def _length(self) -> int:
        return 1 + self.settings.hardest

    def _draw(self, draws: Draws, levels: Integers) -> Rows:
        table = multiplication(self.settings.group)
        places, rows = np.arange(self.settings.hardest), np.arange(len(levels))
        used = places < levels[:, None]
        drawn = np.where(used, draws.integers(len(table), len(levels), len(places)), 0)  # element 0 is the identity
        products = drawn.copy()
        for place in places[1:]:
            products[:, place] = table[products[:, place - 1], drawn[:, place]]
        tokens, targets, answer = self._blank(len(levels))
        tokens[:, 0] = self.ids["#"]
        tokens[:, 1:][used] = drawn[used]
        answer[rows, levels] = True
        shown = used if self.settings.dense else answer[:, 1:]
        targets[:, 1:][shown] = products[shown]
        return Rows(tokens, targets, answer, self._keys(drawn, levels)[:, None])

    def _keys(self, drawn: Integers, levels: Integers) -> Keys:
        others = np.argsort(drawn == 0, axis=1, kind="stable")[:, :TOLD_BY]
        keys = digest(np.take_along_axis(drawn, others, axis=1))
        keys = np.where((drawn > 0).sum(axis=1) < TOLD_BY, TRAINING, keys)
        return np.where(levels < TOLD_BY, EVERYWHERE, keys)


def elements(group: str) -> tuple[str, ...]:
    """The names of a group's elements, the identity first."""
    size = int(group[1:])
    if group[0] == "Z":
        return tuple(map(str, range(size)))
    return tuple("".join(str(image + 1) for image in images) for images in permutations(range(size)))


@lru_cache(maxsize=8)
def multiplication(group: str) -> Integers:
    """(G, G): entry (a, b) is the number of a o b in `elements`."""
    size = int(group[1:])
    if group[0] == "Z":
        return np.add.outer(np.arange(size), np.arange(size)) % size
    images = np.array(list(permutations(range(size))))
    number = {tuple(row): place for place, row in enumerate(images.tolist())}
    composed = images[:, images]  # a, b, x -> a(b(x))
    return np.array([[number[tuple(row)] for row in rows] for rows in composed.tolist()])
