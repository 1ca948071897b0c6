"""Multi-hop questions about facts learnt by heart (Ouro section 6.2, B.3).

`Who is the instructor of the teacher of Bob? \\n Answer:`, then a name. People stand in layers; each is tied by every
relation to a random person of the next layer, and questions begin in the first. All single facts are trained on, as
questions of one hop: how the published data mix facts and questions is not known, and its lists of words are not used
here. As a chain, `Bob teacher instructor`, a question is short and each of its prefixes is itself one.

Splits go by the prefix (person, r1, r2), exactly a tenth each for validation and test, the same for every seed and
fraction: no trained question of any length begins like a held-out one. `fraction` is the share of *all* questions of
2, 3, ... hops that is trained on, eight tenths at most. With dense targets the prefixes of a trained question are
learnt too, so that training sees more 2-hop answers than the fraction says if it has 3-hop questions.
"""

from functools import lru_cache
from typing import Annotated, Self

import numpy as np
from pydantic import Field, model_validator

from looplm.lab.tasks.base import PAD, Batch, LevelSettings, Request, Task
from looplm.lab.tasks.draws import SHARES, SPLITS, Draws, Integers, Split, mix
from looplm.lab.tasks.words import FIRST_NAMES, MIDDLE_NAMES

RELATIONS = (
    "teacher instructor doctor lawyer manager mentor neighbour landlord barber tailor "
    "gardener accountant dentist editor coach driver cousin partner captain guide"
).split()
PEOPLE = (*FIRST_NAMES, *MIDDLE_NAMES)
LARGEST = 10**7
"""Questions of a length that are listed at most."""


class MultiHopSettings(LevelSettings):
    """Settings of multi-hop questions; a level is a number of hops."""

    people: Annotated[int, Field(ge=2, le=len(PEOPLE))]
    """E, in all layers together."""
    relations: Annotated[int, Field(ge=1, le=len(RELATIONS))]
    """R"""
    layers: Annotated[int, Field(ge=1)] = 1
    """Layers of people; with 1 anyone may be tied to anyone, and questions begin with anyone."""
    fraction: Annotated[float, Field(gt=0, le=1 - 2 / SHARES)]
    """Share of all questions of two and more hops that is trained on; a tenth each is held out in any case."""
    sentences: bool = False
    """Ask in words, the last relation first, as published; else as a chain."""
    dense: bool = False
    """Also learn, at every relation of a chain, who it leads to."""

    @classmethod
    def paper(cls) -> Self:
        """500 people in 5 layers, 20 relations, 15% of the 800,000 3-hop questions."""
        return cls(levels=(1, 3), test_levels=(3,), people=500, relations=20, layers=5, fraction=0.15, sentences=True)

    @classmethod
    def laptop(cls) -> Self:
        """50 people, 6 relations, two hops."""
        return cls(levels=(1, 2), test_levels=(1, 2), people=50, relations=6, fraction=0.8, dense=True)

    @model_validator(mode="after")
    def _questions_exist(self) -> Self:
        if self.sentences and self.dense:
            raise ValueError("dense is true; only chains (sentences: false) have a place for intermediate answers")
        if self.people % self.layers or self.people < 2 * self.layers:
            raise ValueError(f"people is {self.people}; it must be a multiple of the {self.layers} layers, 2 in each")
        if 1 < self.layers <= self.hardest:
            raise ValueError(f"layers is {self.layers}; {self.hardest} hops need {self.hardest + 1} layers, or only 1")
        if self.heads * self.relations**2 < SHARES:
            raise ValueError(f"relations is {self.relations}; there are too few questions of two hops to hold some out")
        if self.heads * self.relations**self.hardest > LARGEST:
            raise ValueError(f"relations is {self.relations}; that is more than {LARGEST} questions of one length")
        return self

    @property
    def heads(self) -> int:
        """People that questions of several hops begin with, numbered from 0."""
        return self.people // self.layers


class MultiHop(Task[MultiHopSettings]):
    """Questions that compose facts."""

    name = "multi-hop"
    shows = (
        "Questions that compose facts learnt by heart; the claim: looped models need fewer examples to answer new ones "
        "(Ouro section 6.2)."
    )
    unit = "hops"
    Settings = MultiHopSettings

    def _words(self) -> tuple[str, ...]:
        words = ("Who", "is", "the", "of", "?", "\\n", "Answer:") if self.settings.sentences else ()
        return (PAD, *PEOPLE[: self.settings.people], *RELATIONS[: self.settings.relations], *words)

    def _length(self) -> int:
        hops = self.settings.hardest
        return 3 * hops + 6 if self.settings.sentences else hops + 1

    def levels(self, split: Split) -> tuple[int, ...]:
        """The numbers of hops asked in a split."""
        return self.settings.levels if split == "train" else self.settings.test_levels

    def _rows(self, request: Request) -> Batch:
        facts = facts_of(self.settings, request.seed)
        tokens, targets, answer = self._blank(len(request.levels))
        for hops in np.unique(request.levels):
            rows = np.flatnonzero(request.levels == hops)
            pool = questions(self.settings, request.seed, int(hops), request.split)
            if not len(pool):
                raise ValueError(
                    f"multi-hop: no {request.split} questions of {hops} hops; use more people or relations"
                )
            path = unpacked(pool[request.draws.integers(len(pool), len(rows))], int(hops), self.settings.relations)
            reached = path[:, :1].repeat(hops + 1, axis=1)
            for hop in range(1, int(hops) + 1):
                reached[:, hop] = facts[reached[:, hop - 1], path[:, hop]]
            said = self._question(path)
            end = said.shape[1]
            tokens[rows, :end] = said
            targets[rows, end - 1] = 1 + reached[:, -1]
            answer[rows, end - 1] = True
            if self.settings.dense:
                targets[rows, 1:end] = 1 + reached[:, 1:]
        return Batch(tokens=tokens, targets=targets, answer=answer, difficulty=request.levels)

    def _question(self, path: Integers) -> Integers:
        """Tokens of questions about (person, r1, ..., rh)."""
        people, relations = 1 + path[:, :1], 1 + self.settings.people + path[:, 1:]
        if not self.settings.sentences:
            return np.concatenate([people, relations], axis=1)
        said = [np.full(len(path), self.ids[word]) for word in ("Who", "is")]
        for relation in relations.T[::-1]:
            said += [np.full(len(path), self.ids["the"]), relation, np.full(len(path), self.ids["of"])]
        said += [people[:, 0], *(np.full(len(path), self.ids[word]) for word in ("?", "\\n", "Answer:"))]
        return np.stack(said, axis=1)


@lru_cache(maxsize=4)
def facts_of(settings: MultiHopSettings, seed: int) -> Integers:
    """(people, relations): whom each relation leads to; nobody is a teacher of the last of several layers' people."""
    shape = (settings.people, settings.relations)
    found = Draws(seed, len(SPLITS)).integers(settings.heads, *shape)
    if settings.layers > 1:
        found += (np.arange(settings.people)[:, None] // settings.heads + 1) * settings.heads
    return found


@lru_cache(maxsize=16)
def questions(settings: MultiHopSettings, seed: int, hops: int, split: Split) -> Integers:
    """The numbers of all questions of a length in a split, as digits (person, r1, ..., rh) to the base R."""
    relations = settings.relations
    if hops == 1:
        return np.arange((settings.people - settings.heads if settings.layers > 1 else settings.people) * relations)
    every = np.arange(settings.heads * relations**hops)
    share = _ranks(settings.heads * relations**2)[every // relations ** (hops - 2)]
    held = settings.heads * relations**2 // SHARES
    bounds = {"test": (0, held), "validation": (held, 2 * held), "train": (2 * held, len(every))}[split]
    pool = every[(bounds[0] <= share) & (share < bounds[1])]
    if split != "train":
        return pool
    order = np.argsort(Draws(seed, len(SPLITS) + hops).words(len(pool)), kind="stable")
    return pool[order[: round(settings.fraction * len(every))]]


def _ranks(count: int) -> Integers:
    """A fixed shuffling of 0..count - 1."""
    return np.argsort(np.argsort(mix(np.arange(count)), kind="stable"), kind="stable")


def unpacked(numbers: Integers, hops: int, relations: int) -> Integers:
    """(person, r1, ..., rh) of numbered questions, (B, 1 + h)."""
    digits = [numbers // relations**power for power in range(hops, -1, -1)]
    return np.stack([digits[0], *(digit % relations for digit in digits[1:])], axis=1)
