"""Graph reachability: in which of two trees does a node stand (after Ouro section 6.3 and theorem 1).

The edges of two disjoint rooted trees in random order, parent and child, then `?` and the node asked about; the answer
is the name of the root that reaches it. The paper proves reachability and trains nothing. Asking for the root's name is
ours: yes or no ("is t reachable from s?") taught small models nothing at all. A child has a token of its own (`>a`),
so that each node is the child in one edge and easily found.

The difficulty is the depth d of the node asked about. Both trees reach exactly to depth d, one long branch each, and
the other nodes join either: neither size nor depth gives the answer away.

Held-out items are graphs, by their set of edges: in what order they are told and which node is asked make no
difference.
"""

from typing import Annotated, Self

import numpy as np
from pydantic import Field, model_validator

from looplm.lab.tasks.base import DrawnTask, LevelSettings, Rows
from looplm.lab.tasks.draws import Draws, Integers, digest_set


class ReachabilitySettings(LevelSettings):
    """Settings of reachability; a level is the depth of the node asked about."""

    nodes: Annotated[int, Field(le=999)]
    """Of the two trees together."""
    dense: bool = False
    """Ask about all nodes, in random order; the graded one comes last."""

    @classmethod
    def paper(cls) -> Self:
        """64 nodes, depths to 31; nothing of the kind was published."""
        return cls(levels=tuple(range(1, 32)), test_levels=tuple(range(1, 32)), nodes=64)

    @classmethod
    def laptop(cls) -> Self:
        """Depth to 8; train it as a curriculum."""
        return cls(levels=tuple(range(1, 9)), test_levels=tuple(range(1, 9)), nodes=18, dense=True)

    @model_validator(mode="after")
    def _trees_fit(self) -> Self:
        needed = 2 * (self.hardest + 1)
        if self.nodes < needed:
            raise ValueError(f"nodes is {self.nodes}; two trees of depth {self.hardest} need at least {needed}")
        return self


class Reachability(DrawnTask[ReachabilitySettings]):
    """The root of a node's tree."""

    name = "reachability"
    shows = "The root above a node in a forest; the claim: log2 of the depth in loops suffices (Ouro section 6.3)."
    unit = "edges to the root"
    Settings = ReachabilitySettings

    def _words(self) -> tuple[str, ...]:
        names = [str(node) for node in range(self.settings.nodes)]
        return (*names, *(f">{name}" for name in names), "?")

    def _length(self) -> int:
        asked = self.settings.nodes if self.settings.dense else 1
        return 2 * (self.settings.nodes - 2) + 1 + asked

    def _draw(self, draws: Draws, levels: Integers) -> Rows:
        count, nodes = len(levels), self.settings.nodes
        parents, roots = forests(draws, levels, nodes)
        names = draws.order(count, nodes)
        order = np.argsort(np.where(parents < 0, np.iinfo(np.uint64).max, draws.words(count, nodes)), 1, kind="stable")
        children = order[:, : nodes - 2]
        above = np.take_along_axis(names, np.take_along_axis(parents, children, axis=1), axis=1)
        below = np.take_along_axis(names, children, axis=1)
        tokens, targets, answer = self._blank(count)
        tokens[:, 0 : 2 * nodes - 4 : 2], tokens[:, 1 : 2 * nodes - 4 : 2] = above, below + nodes
        tokens[:, 2 * nodes - 4] = self.ids["?"]
        asked = levels[:, None]
        if self.settings.dense:
            last = np.arange(nodes) == asked
            asked = np.argsort(np.where(last, np.iinfo(np.uint64).max, draws.words(count, nodes)), 1, kind="stable")
        tokens[:, 2 * nodes - 3 :] = np.take_along_axis(names, asked, axis=1)
        targets[:, 2 * nodes - 3 :] = np.take_along_axis(names, np.take_along_axis(roots, asked, axis=1), axis=1)
        answer[:, -1] = True
        return Rows(tokens, targets, answer, digest_set(above * nodes + below)[:, None])


def forests(draws: Draws, levels: Integers, nodes: int) -> tuple[Integers, Integers]:
    """Pairs of trees: the parent of every node, -1 for a root, and its root, (B, nodes) each.

    Nodes 0..d are one tree's long branch, d + 1..2d + 1 the other's; each further node joins a uniformly chosen
    earlier one that is not at depth d.
    """
    rows, second = np.arange(len(levels)), levels + 1
    parents = np.full((len(levels), nodes), -1, np.int64)
    roots, depths = np.zeros_like(parents), np.zeros_like(parents)
    for node in range(nodes):
        inside = depths[:, :node] < levels[:, None]
        chance = np.where(inside, draws.words(len(levels), node) >> np.uint64(1), np.uint64(0))
        joined = chance.argmax(axis=1) if node else np.full(len(levels), -1)
        parent = np.where(node <= 2 * levels + 1, node - 1, joined)
        parent = np.where((node == 0) | (node == second), -1, parent)
        parents[:, node] = parent
        roots[:, node] = np.where(parent < 0, node, roots[rows, parent])
        depths[:, node] = np.where(parent < 0, 0, depths[rows, parent] + 1)
    return parents, roots
