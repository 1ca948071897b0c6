"""A looped Transformer with hard attention: the machine that every construction of the lab runs on.

State x (B, S, D), a block of L layers, applied T times:

    x <- norm(x + sum_h attention_h(x)),   x <- norm(x + relu(x W_1 + b_1) W_2)

Attention is *uniform hard* attention, the limit of softmax at temperature zero: among the visible keys those with the
largest score q.k share the weight equally, m tied keys 1/m each; ties are exact equality of fp64 scores. There is no
division by sqrt(K), which would change nothing. The norm is either absent (Saunshi et al., section 5) or Ouro's
LN(x) = 1{x > 0} (appendix B.5). Everything is fp64; each construction says why its arithmetic is exact, or how close.

It differs from looplm.model on purpose: no softmax, no RMSNorm, no gate. It exists to be read and checked.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

CHUNK = 2**22
"""Numbers a temporary may hold; batches are cut so that neither scores nor neurons exceed it."""


@dataclass(frozen=True)
class Head:
    """One attention head: query and key (D, K), value (D, M), output (M, D)."""

    query: Array
    key: Array
    value: Array
    output: Array


@dataclass(frozen=True)
class Layer:
    """Attention heads, then a ReLU feed-forward network: inner (D, F), bias (F,), outer (F, D)."""

    heads: tuple[Head, ...]
    inner: Array
    bias: Array
    outer: Array


@dataclass(frozen=True)
class Size:
    """What a construction costs: its width D and the largest of each kind over the layers of its block."""

    width: int
    layers: int
    heads: int
    head_width: int
    hidden: int
    vocabulary: int


@dataclass(frozen=True)
class LoopedTransformer:
    """Embedding (V, D), position embedding (S, D), a block of layers, readout (D, number of answers)."""

    embedding: Array
    positions: Array
    block: tuple[Layer, ...]
    readout: Array
    causal: bool = True
    threshold_norm: bool = False

    @property
    def size(self) -> Size:
        """The sizes, read off the weights."""
        heads = [head for layer in self.block for head in layer.heads]
        return Size(
            width=self.embedding.shape[1],
            layers=len(self.block),
            heads=max((len(layer.heads) for layer in self.block), default=0),
            head_width=max((head.query.shape[1] for head in heads), default=0),
            hidden=max((len(layer.bias) for layer in self.block), default=0),
            vocabulary=len(self.embedding),
        )

    def states(self, inputs: Array, loops: int) -> Iterator[Array]:
        """The state after 0, 1, ..., `loops` loops, each (B, S, D), for inputs (B, S, V): one-hot, or bits."""
        if inputs.ndim != 3 or inputs.shape[1] > len(self.positions) or inputs.shape[2] != len(self.embedding):
            raise ValueError(
                f"inputs have shape {inputs.shape}; this model takes (batch, up to {len(self.positions)} positions, "
                f"{len(self.embedding)})"
            )
        state = inputs @ self.embedding + self.positions[: inputs.shape[1]]
        yield state
        for _ in range(loops):
            for layer in self.block:
                state = self._apply(layer, state)
            yield state

    def run(self, inputs: Array, loops: int) -> Array:
        """The readout (B, S, answers) after `loops` loops."""
        *_, state = self.states(inputs, loops)
        return state @ self.readout

    def _apply(self, layer: Layer, state: Array) -> Array:
        rows = max(1, CHUNK // (state.shape[1] * max(state.shape[1], len(layer.bias), 1)))
        parts = [self._layer(layer, state[start : start + rows]) for start in range(0, len(state), rows)]
        return np.concatenate(parts) if parts else state

    def _layer(self, layer: Layer, state: Array) -> Array:
        attended = sum((attend(head, state, self.causal) for head in layer.heads), start=np.zeros_like(state))
        state = self._norm(state + attended)
        return self._norm(state + np.maximum(state @ layer.inner + layer.bias, 0.0) @ layer.outer)

    def _norm(self, state: Array) -> Array:
        return (state > 0).astype(state.dtype) if self.threshold_norm else state


def attend(head: Head, state: Array, causal: bool) -> Array:
    """Uniform hard attention of one head: (B, S, D) to (B, S, D); tied keys share the weight equally."""
    scores = (state @ head.query) @ (state @ head.key).swapaxes(1, 2)
    if causal:
        scores = np.where(np.tri(state.shape[1], dtype=bool), scores, -math.inf)
    chosen = (scores == scores.max(-1, keepdims=True)).astype(state.dtype)
    return ((chosen @ (state @ head.value)) / chosen.sum(-1, keepdims=True)) @ head.output


def one_hot(tokens: npt.ArrayLike, vocabulary: int) -> Array:
    """Token ids (...) as one-hot rows (..., V) in fp64; ValueError for ids outside 0..V-1."""
    ids = np.asarray(tokens)
    if ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocabulary):
        raise ValueError(f"tokens must be integers in 0..{vocabulary - 1}; got {ids.dtype} in {ids.min()}..{ids.max()}")
    return np.eye(vocabulary)[ids.astype(np.int64)]


@dataclass(frozen=True)
class Statement:
    """What a construction claims and under which conditions; `print` it."""

    name: str
    source: str
    task: str
    idea: str
    loops: str
    mask: str
    attention: str
    norm: str
    precision: str

    def __str__(self) -> str:
        return "\n".join(f"{field.name:<10} {getattr(self, field.name)}" for field in fields(self))


@dataclass(frozen=True)
class Report:
    """Outcome of a verification: `loops` is the most that any instance used."""

    construction: str
    instances: int
    failures: int
    loops: int
    one_loop_fewer_fails: bool

    @property
    def holds(self) -> bool:
        """Whether no instance failed, and every worst case did fail with one loop fewer."""
        return self.instances > 0 and self.failures == 0 and self.one_loop_fewer_fails

    def __add__(self, other: "Report") -> "Report":
        return Report(
            self.construction,
            self.instances + other.instances,
            self.failures + other.failures,
            max(self.loops, other.loops),
            self.one_loop_fewer_fails and other.one_loop_fewer_fails,
        )
