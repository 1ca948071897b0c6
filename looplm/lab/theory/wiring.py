"""Writing weights down: named registers in the state, and neurons and heads that read and write them.

A construction is a small machine. Its state vector is cut into registers; a head is a list of bilinear terms
(query register, key register, weight) whose sum is the score, and a list of moves (register read at the key, register
written at the query); a group of neurons reads registers, adds a bias and writes registers. `Wiring` turns these into
the dense matrices of `looplm.lab.theory.transformer`. The residual stream only adds, so a register is replaced by a
neuron that subtracts what it holds.

A weight is a matrix (rows: the register read or queried; columns: neurons, or the key) or a number, which stands for
that number times the identity (equal sizes), or times a row or a column of ones (one side of size 1).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from looplm.lab.theory.transformer import Array, Head, Layer

Weight = float | Array


class Wiring:
    """Registers of one state vector, in the order given; builds the heads and layers that use them."""

    def __init__(self, **sizes: int) -> None:
        ends = np.cumsum([0, *sizes.values()]).tolist()
        self.registers = {name: slice(ends[i], ends[i + 1]) for i, name in enumerate(sizes)}
        self.sizes = sizes
        self.width = ends[-1]

    def rows(self, count: int, **contents: Weight) -> Array:
        """`count` state vectors (count, D) holding the given contents ((count, size) or a number), zero elsewhere."""
        rows = np.zeros((count, self.width))
        for name, content in contents.items():
            rows[:, self.registers[name]] = content
        return rows

    def columns(self, count: int, **contents: Weight) -> Array:
        """A (D, count) matrix that reads the given registers: the readout, for one."""
        return self._reads(count, contents)

    def head(self, scores: Sequence[tuple[str, str, Weight]], moves: Sequence[tuple[str, str, Weight]]) -> Layer:
        """A layer of one head and no neurons: score = sum of q[query register] W k[key register], copying the moves."""
        widths = [self.sizes[query] for query, _, _ in scores]
        query, key = np.zeros((2, self.width, sum(widths)))
        for (asked, offered, weight), width, end in zip(scores, widths, np.cumsum(widths), strict=True):
            query[self.registers[asked], end - width : end] = np.eye(width)
            key[self.registers[offered], end - width : end] = _matrix(weight, width, self.sizes[offered]).T
        widths = [self.sizes[source] for source, _, _ in moves]
        value, output = np.zeros((self.width, sum(widths))), np.zeros((sum(widths), self.width))
        for (source, target, weight), width, end in zip(moves, widths, np.cumsum(widths), strict=True):
            value[self.registers[source], end - width : end] = np.eye(width)
            output[end - width : end, self.registers[target]] = _matrix(weight, width, self.sizes[target])
        return Layer(
            (Head(query, key, value, output),), np.zeros((self.width, 0)), np.zeros(0), np.zeros((0, self.width))
        )

    def neurons(
        self, count: int, reads: Mapping[str, Weight], bias: Weight = 0.0, writes: Mapping[str, Weight] | None = None
    ) -> Layer:
        """A layer without heads: `count` neurons relu(reads + bias), each written to the registers of `writes`."""
        outer = np.zeros((count, self.width))
        for name, weight in (writes or {}).items():
            outer[:, self.registers[name]] += _matrix(weight, count, self.sizes[name])
        return Layer((), self._reads(count, reads), np.broadcast_to(bias, (count,)).astype(np.float64), outer)

    def clear(self, *names: str) -> Layer:
        """Neurons that set non-negative registers to zero."""
        return combine(*(self.neurons(self.sizes[name], {name: 1.0}, writes={name: -1.0}) for name in names))

    def clear_signed(self, name: str) -> Layer:
        """Neurons that set a register of any sign to zero: two a coordinate."""
        return self.copy_signed(name, {name: -1.0})

    def copy_signed(self, name: str, writes: Mapping[str, Weight]) -> Layer:
        """Neurons that write a register of any sign elsewhere: relu(x) - relu(-x), two a coordinate."""
        size = self.sizes[name]
        flipped = {target: -np.asarray(_matrix(weight, size, self.sizes[target])) for target, weight in writes.items()}
        return combine(self.neurons(size, {name: 1.0}, writes=writes), self.neurons(size, {name: -1.0}, writes=flipped))

    def transplant(self, name: str, layer: Layer) -> Layer:
        """A layer of another model whose whole state is the register `name` of this one."""
        place = np.eye(self.width)[self.registers[name]]
        heads = (Head(place.T @ h.query, place.T @ h.key, place.T @ h.value, h.output @ place) for h in layer.heads)
        return Layer(tuple(heads), place.T @ layer.inner, layer.bias, layer.outer @ place)

    def _reads(self, count: int, reads: Mapping[str, Weight]) -> Array:
        inner = np.zeros((self.width, count))
        for name, weight in reads.items():
            inner[self.registers[name]] += _matrix(weight, self.sizes[name], count)
        return inner


def combine(*parts: Layer) -> Layer:
    """One layer with all heads and all neurons of the parts, side by side."""
    return Layer(
        tuple(head for part in parts for head in part.heads),
        np.concatenate([part.inner for part in parts], axis=1),
        np.concatenate([part.bias for part in parts]),
        np.concatenate([part.outer for part in parts]),
    )


def _matrix(weight: Weight, rows: int, columns: int) -> Array:
    """A weight as a (rows, columns) matrix; see the module's docstring."""
    if isinstance(weight, np.ndarray):
        if weight.shape != (rows, columns):
            raise ValueError(f"a weight of shape {weight.shape} stands between registers of size {rows} and {columns}")
        return weight
    if rows == columns:
        return weight * np.eye(rows)
    if 1 in (rows, columns):
        return np.full((rows, columns), float(weight))
    raise ValueError(f"a number cannot stand between registers of size {rows} and {columns}; give a matrix")
