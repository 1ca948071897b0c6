"""Symbolic i-GSM: arithmetic modulo p over a graph of dependent quantities (Saunshi et al. section 2.1, table 2).

`E#I := 4 . E#J := E#I . I#N := 2 * J#P + H#J + E#I . ... I#P ?`, statements in random order, no intermediate steps. A
leading coefficient multiplies the whole sum: only so does the printed example come to its printed answer. E#I is how
many I each E has; E and I stand one below the other in a hierarchy of entities, here a quantity is one token. How many
quantities and operations there are the paper does not say; its example has 12, not all of which the answer needs.

The difficulty is the depth of the quantity asked about: 1 for a constant, one more than the deepest summand otherwise.

Constants are in every split. At depth 2 an item is held out with its numbers; from depth 3 on its whole template is,
the expression without names, numbers and order, and the summands' in it. With dense targets no training row asks for
anything that is held out.
"""

from itertools import pairwise
from typing import Annotated, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from looplm.lab.tasks.base import IGNORED, PAD, DrawnTask, LevelSettings, Rows
from looplm.lab.tasks.draws import EVERYWHERE, Draws, Integers, Keys, Mask, digest, digest_set, squeeze

SUMMANDS = 3
WIDTH = 2 * SUMMANDS + 4
"""Tokens of the longest statement: a name, `:=`, a number, `*`, the summands with `+` between them, `.`."""


class SymbolicGSMSettings(LevelSettings):
    """Settings of i-GSM; a level is a depth of dependency."""

    modulus: Annotated[int, Field(ge=3)] = 7
    """p; numbers are 0..p - 1, coefficients 2..p - 1."""
    quantities: Annotated[int, Field(ge=1)] = 12
    """V, statements an item."""
    layers: Annotated[int, Field(ge=2)] = 4
    """Depth of the hierarchy of entities."""
    entities: Annotated[int, Field(ge=1)] = 4
    """In each layer; named by letters."""
    dense: bool = False
    """Ask for all quantities, from the shallow to the deep; the graded one comes last."""

    @classmethod
    def paper(cls) -> Self:
        """Modulo 7, 12 quantities; the depths are ours."""
        return cls(levels=(1, 2, 3, 4, 5, 6), test_levels=(1, 2, 3, 4, 5, 6))

    @classmethod
    def laptop(cls) -> Self:
        """Modulo 5, 6 quantities to depth 4."""
        return cls(levels=(1, 2, 3, 4), test_levels=(1, 2, 3, 4), modulus=5, quantities=6, dense=True)

    @model_validator(mode="after")
    def _quantities_fit(self) -> Self:
        if self.layers * self.entities > 26:
            raise ValueError(f"entities is {self.entities}; in {self.layers} layers that is more than 26 letters name")
        names = (self.layers - 1) * self.entities**2
        if not self.hardest <= self.quantities <= names:
            raise ValueError(
                f"quantities is {self.quantities}; it must lie in {self.hardest} (the highest level) to {names} "
                "(pairs of entities)"
            )
        return self


class Graph(NamedTuple):
    """Quantities of each row by increasing depth, (B, V) each; the last one is deep enough to be asked about."""

    depths: Integers
    summands: Integers
    """(B, V, 3) earlier quantities."""
    summed: Mask
    """(B, V, 3) which of them count; none for a constant."""
    numbers: Integers
    """The constant or the coefficient, 1 for none."""


class SymbolicGSM(DrawnTask[SymbolicGSMSettings]):
    """Word problems without words."""

    name = "gsm"
    shows = (
        "Word problems in symbols, in shuffled order, modulo p; the claim: accuracy follows depth, looped or not "
        "(Saunshi section 2.1)."
    )
    unit = "depth"
    Settings = SymbolicGSMSettings

    def _words(self) -> tuple[str, ...]:
        return (*map(str, range(self.settings.modulus)), ":=", "*", "+", ".", "?", PAD, *self._names())

    def _names(self) -> list[str]:
        """One name for every pair of entities in adjacent layers."""
        wide = self.settings.entities
        letters = [chr(ord("A") + place) for place in range(self.settings.layers * wide)]
        layers = [letters[start : start + wide] for start in range(0, len(letters), wide)]
        return [f"{a}#{b}" for upper, lower in pairwise(layers) for a in upper for b in lower]

    def _length(self) -> int:
        asked = self.settings.quantities if self.settings.dense else 1
        return WIDTH * self.settings.quantities + 2 * asked

    def _draw(self, draws: Draws, levels: Integers) -> Rows:
        count, quantities = len(levels), self.settings.quantities
        graph = graphs(draws, levels, quantities, self.settings.modulus)
        values = evaluate(graph, self.settings.modulus)
        chosen = draws.order(count, len(self._names()))[:, :quantities]
        names = self.ids[self._names()[0]] + chosen
        asked = slice(None) if self.settings.dense else slice(-1, None)
        questions = np.stack([names[:, asked], np.full_like(names[:, asked], self.ids["?"])], axis=2)
        told, kept = self._statements(draws, graph, names)
        tokens, targets, answer = self._blank(count)
        body = WIDTH * quantities
        tokens[:, :body], tokens[:, body:] = told, questions.reshape(count, -1)
        targets[:, body + 1 :: 2] = values[:, asked]
        answer[:, -1] = True
        kept = np.concatenate([kept, np.ones((count, tokens.shape[1] - body), np.bool_)], axis=1)
        tokens, targets = squeeze(tokens, kept, self.ids[PAD]), squeeze(targets, kept, IGNORED)
        answer = squeeze(answer, kept, False)
        keys = structure(graph)[:, ::-1]
        return Rows(tokens, targets, answer, keys if self.settings.dense else keys[:, :1])

    def _statements(self, draws: Draws, graph: Graph, names: Integers) -> tuple[Integers, Mask]:
        """Tokens of all statements in random order and which of them are there, (B, 10 V) each."""
        count, quantities = names.shape
        shuffled = np.argsort(np.where(graph.summed, draws.words(*graph.summed.shape) >> np.uint64(1), ~np.uint64(0)))
        summands = np.take_along_axis(graph.summands, shuffled, axis=2)
        there = np.take_along_axis(graph.summed, shuffled, axis=2)
        tokens = np.full((count, quantities, WIDTH), self.ids["+"])
        kept = np.ones(tokens.shape, np.bool_)
        constant, scaled = ~there[..., 0], graph.numbers > 1
        tokens[..., 0], tokens[..., 1], tokens[..., 2] = names, self.ids[":="], graph.numbers
        tokens[..., 3], tokens[..., -1] = self.ids["*"], self.ids["."]
        tokens[..., 4:-1:2] = np.take_along_axis(names, summands.reshape(count, -1), axis=1).reshape(summands.shape)
        kept[..., 2], kept[..., 3] = constant | scaled, ~constant & scaled
        kept[..., 4:-1:2], kept[..., 5:-1:2] = there, there[..., 1:]
        order = draws.order(count, quantities)[:, :, None]
        tokens, kept = np.take_along_axis(tokens, order, axis=1), np.take_along_axis(kept, order, axis=1)
        return tokens.reshape(count, -1), kept.reshape(count, -1)


def graphs(draws: Draws, levels: Integers, quantities: int, modulus: int) -> Graph:
    """Random dependencies: every depth up to the level occurs, one summand is of the depth just above, others are drawn
    among all shallower ones (fewer where one is drawn twice), half of the sums have a coefficient.
    """
    count = len(levels)
    places = np.arange(quantities)
    extra = 1 + draws.integers(np.broadcast_to(levels[:, None], (count, quantities)))
    depths = np.sort(np.where(places < levels[:, None], places + 1, extra), axis=1)
    shallower = (depths[:, None, :] < depths[:, :, None]).sum(axis=2)
    lower = (depths[:, None, :] < depths[:, :, None] - 1).sum(axis=2)
    first = lower + draws.integers(np.maximum(shallower - lower, 1))
    others = draws.integers(np.maximum(shallower, 1)[..., None], count, quantities, SUMMANDS - 1)
    summands = np.concatenate([first[..., None], others], axis=2)
    wanted = np.arange(SUMMANDS) <= draws.integers(SUMMANDS, count, quantities)[..., None]
    again = (summands[..., :, None] == summands[..., None, :]) & np.tri(SUMMANDS, k=-1, dtype=np.bool_)
    summed = wanted & ~again.any(axis=3) & (depths > 1)[..., None]
    scaled = draws.integers(2, count, quantities) == 1
    coefficients = np.where(scaled, 2 + draws.integers(modulus - 2, count, quantities), 1)
    constants = draws.integers(modulus, count, quantities)
    return Graph(depths, summands, summed, np.where(depths == 1, constants, coefficients))


def evaluate(graph: Graph, modulus: int) -> Integers:
    """The value of every quantity, (B, V)."""
    values = graph.numbers.copy()
    for place in range(values.shape[1]):
        parts = np.take_along_axis(values, graph.summands[:, place], axis=1) * graph.summed[:, place]
        sums = graph.numbers[:, place] * parts.sum(axis=1) % modulus
        values[:, place] = np.where(graph.depths[:, place] > 1, sums, values[:, place])
    return values


def structure(graph: Graph) -> Keys:
    """The key of what each quantity stands for, (B, V): its numbers count at depth 2, its form only from depth 3 on.

    Keys are those of the expression written out as a tree, so two graphs that unroll to the same tree share one.
    """
    constant = graph.depths == 1
    forms = digest(np.where(constant, 0, 1 + (graph.numbers > 1))[..., None])
    exact = digest(np.stack([constant.astype(np.int64), graph.numbers], axis=2))
    for place in range(constant.shape[1]):
        inner = np.flatnonzero(~constant[:, place])
        summands, summed = graph.summands[inner, place], graph.summed[inner, place]
        for keys in (forms, exact):
            parts = digest_set(np.take_along_axis(keys[inner], summands, axis=1), summed)
            keys[inner, place] = digest(np.stack([keys[inner, place], parts], axis=1))
    return np.where(constant, EVERYWHERE, np.where(graph.depths == 2, exact, forms))
