"""Any L-layer Transformer with R distinct layers as one layer looped L times (Saunshi et al., theorem 5.2).

The one layer holds the heads and neurons of all R layers side by side. The state carries a counter and a one-hot
register `active` that says whose turn it is; everyone else is switched off:

- a head whose layer is not active looks at an extra first token #, which holds nothing (score M there, and -M for the
  active one, which must not look at #);
- a neuron whose layer is not active, or that works on #, gets -M added and stays below zero.

Extra neurons raise the counter and turn `active` to the next layer: one constant and L kinks interpolate any schedule,
which holds its last layer afterwards. The paper's size holds: width d + R + 2, R H heads, R F + O(L) neurons.

M exceeds every score and pre-activation that can occur, by a bound on the weights (`gate_size`). What is active meets
exact zeros only, so the copy computes the original's numbers; fp64 rounds sums of more terms in another order at most.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from looplm.lab.theory.transformer import (
    Array,
    Head,
    Integers,
    Layer,
    LoopedTransformer,
    Report,
    Size,
    Statement,
    one_hot,
)
from looplm.lab.theory.wiring import Wiring, combine


def describe() -> Statement:
    """The claim and its conditions."""
    return Statement(
        name="distinct layers",
        source="Saunshi et al., theorem 5.2",
        task="compute what a given causal Transformer of L layers computes, R of its layers distinct, in any order",
        idea="all layers side by side in one; a counter switches on one of them a loop, the others look at # and rest",
        loops="L",
        mask="causal",
        attention="R H heads, uniform hard as in the original; ties are averaged as there",
        norm="none",
        precision="the original's: what is switched on meets exact zeros; M only ever switches off",
    )


def size(original: LoopedTransformer, schedule: Sequence[int]) -> Size:
    """Width d + R + 2, R H heads one wider, R F + L + 1 neurons, one more word."""
    part, distinct = original.size, len(original.block)
    heads = sum(len(layer.heads) for layer in original.block)
    neurons = sum(len(layer.bias) for layer in original.block)
    hidden, head_width = neurons + len(schedule) + 1, part.head_width + 1 if heads else 0
    return Size(part.width + distinct + 2, 1, heads, head_width, hidden, part.vocabulary + 1)


def build(original: LoopedTransformer, schedule: Sequence[int]) -> LoopedTransformer:
    """One layer that, looped len(schedule) times, is the original's layers in the order of the schedule.

    Args:
        original: causal, without norm; its block holds the R distinct layers.
        schedule: the layer (0..R-1) of each of the L steps.

    Returns:
        A model for inputs `inputs_of(words, V)`, (B, S + 1, V + 1); its readout at position s + 1 is the original's
        at position s.

    Raises:
        ValueError: an original with another mask or norm, an empty schedule, or a layer that is not there.
    """
    distinct, width = len(original.block), original.size.width
    if not original.causal or original.threshold_norm:
        raise ValueError("the original must be causal and without norm, as in theorem 5.2")
    if not len(schedule) or min(schedule) < 0 or max(schedule) >= distinct:
        raise ValueError(f"schedule is {list(schedule)}; it must name at least one layer, each in 0..{distinct - 1}")
    gate = gate_size(original, schedule)
    wires = Wiring(content=width, active=distinct, counter=1, hash=1)
    start = np.eye(distinct)[schedule[0]]
    return LoopedTransformer(
        embedding=wires.rows(
            len(original.embedding) + 1,
            content=np.pad(original.embedding, ((0, 1), (0, 0))),
            hash=np.eye(len(original.embedding) + 1)[:, -1:],
        ),
        positions=wires.rows(
            len(original.positions) + 1, content=np.pad(original.positions, ((1, 0), (0, 0))), active=start
        ),
        block=(
            combine(
                *(_gated(wires, layer, turn, gate) for turn, layer in enumerate(original.block)),
                _clock(wires, np.asarray(schedule)),
            ),
        ),
        readout=np.pad(original.readout, ((0, distinct + 2), (0, 0))),
    )


def _gated(wires: Wiring, layer: Layer, turn: int, gate: float) -> Layer:
    """The layer on the content register, switched off unless `active` is `turn`."""
    others = wires.columns(1, active=gate * (np.arange(wires.sizes["active"]) != turn)[:, None].astype(np.float64))
    own = wires.columns(1, active=gate * np.eye(wires.sizes["active"])[:, [turn]])
    is_hash = wires.columns(1, hash=1.0)
    moved = wires.transplant("content", layer)
    heads = (
        replace(head, query=np.hstack([head.query, others - own]), key=np.hstack([head.key, is_hash]))
        for head in moved.heads
    )
    return replace(moved, heads=tuple(heads), inner=moved.inner - others - gate * is_hash)


def _clock(wires: Wiring, schedule: Integers) -> Layer:
    """Counter + 1, and `active` from this step's layer to the next one's; it stays with the last."""
    turns = np.eye(wires.sizes["active"])[schedule]
    change = np.diff(turns, axis=0, append=turns[-1:])  # by counter 0..L-1
    slopes = np.diff(change, axis=0, append=change[-1:])
    kinks = np.diff(slopes, axis=0, prepend=np.zeros((1, turns.shape[1])))
    constant = wires.neurons(1, {}, bias=1.0, writes={"counter": 1.0, "active": change[:1]})
    interpolate = wires.neurons(len(schedule), {"counter": 1.0}, -np.arange(float(len(schedule))), {"active": kinks})
    return combine(constant, interpolate)


def gate_size(original: LoopedTransformer, schedule: Sequence[int]) -> float:
    """M: a power of two above every |score| and |pre-activation| of any layer on any state of this schedule."""
    bound = float(np.abs(original.embedding).max(0).max() + np.abs(original.positions).max())
    for turn in schedule:
        layer = original.block[turn]
        bound += sum(bound * _largest(head.value @ head.output) for head in layer.heads)
        bound += float((_before_relu(layer, bound) @ np.abs(layer.outer)).max(initial=0.0))
    reach = [float(_before_relu(layer, bound).max(initial=0.0)) for layer in original.block]
    reach += [bound**2 * np.abs(head.query @ head.key.T).sum() for layer in original.block for head in layer.heads]
    return float(2.0 ** np.ceil(np.log2(max([1.0, *reach])) + 1))


def _largest(matrix: Array) -> float:
    """The most that x @ matrix can hold for |x| <= 1: the largest column sum of absolute values."""
    return float(np.abs(matrix).sum(0).max(initial=0.0))


def _before_relu(layer: Layer, bound: float) -> Array:
    return bound * np.abs(layer.inner).sum(0) + np.abs(layer.bias)


def inputs_of(words: Integers, vocabulary: int) -> Array:
    """Words (B, S) of token ids 0..V-1 as one-hot inputs (B, S + 1, V + 1), # (id V) in front."""
    return one_hot(np.pad(words, ((0, 0), (1, 0)), constant_values=vocabulary), vocabulary + 1)


def solve(original: LoopedTransformer, schedule: Sequence[int], words: Integers) -> Array:
    """The reference: the original's layers one after the other, once; the readout (B, S, answers)."""
    deep = replace(original, block=tuple(original.block[turn] for turn in schedule))
    return deep.run(one_hot(words, len(original.embedding)), 1)


def worst_case(steps: int, distinct: int = 2) -> tuple[LoopedTransformer, list[int], Integers]:
    """An original whose layer r adds r + 1 to a number, a schedule that takes turns, and a word (1, 1): it adds up."""
    layers = (Layer((), np.zeros((1, 1)), np.ones(1), np.full((1, 1), turn + 1.0)) for turn in range(distinct))
    adder = LoopedTransformer(np.zeros((1, 1)), np.zeros((1, 1)), tuple(layers), np.eye(1))
    return adder, [step % distinct for step in range(steps)], np.zeros((1, 1), dtype=np.int64)


def wrong(
    model: LoopedTransformer, original: LoopedTransformer, schedule: Sequence[int], words: Integers, loops: int
) -> int:
    """How many words (B, S) have a readout that differs from the original's by more than 1e-9 of its largest number."""
    readouts, true = (
        model.run(inputs_of(words, len(original.embedding)), loops)[:, 1:],
        solve(original, schedule, words),
    )
    return int((np.abs(readouts - true) > 1e-9 * max(1.0, np.abs(true).max())).any((1, 2)).sum())


def check(original: LoopedTransformer, schedule: Sequence[int], words: Integers) -> Report:
    """The words (B, S) after L loops, and the worst case of the same L with one loop fewer."""
    loops = len(schedule)
    adder, turns, word = worst_case(loops)
    fails = wrong(build(adder, turns), adder, turns, word, loops - 1) == 1
    return Report(
        "distinct layers", len(words), wrong(build(original, schedule), original, schedule, words, loops), loops, fails
    )


def verify(random: int = 2000, seed: int = 0) -> Report:
    """Random originals: all words to length 4 under every schedule of 3 steps over 2 layers, then `random` longer ones.

    The longer ones: 1 to 4 distinct layers in a random schedule of 1 to 6 steps, words of up to 12 tokens.
    """
    generator = np.random.default_rng(seed)
    report = Report("distinct layers", 0, 0, 0, True)
    for schedule in product(range(2), repeat=3):
        original = random_transformer(generator, layers=2, length=4)
        for length in range(1, 5):
            report += check(original, schedule, np.array(list(product(range(3), repeat=length))))
    for _ in range(20):
        original = random_transformer(generator, layers=int(generator.integers(1, 5)), length=12)
        schedule = generator.integers(len(original.block), size=generator.integers(1, 7)).tolist()
        report += check(
            original, schedule, generator.integers(3, size=(max(1, random // 20), generator.integers(1, 13)))
        )
    return report


def random_transformer(
    generator: np.random.Generator, layers: int, length: int, vocabulary: int = 3, width: int = 4
) -> LoopedTransformer:
    """A causal Transformer to be simulated: 2 heads of width 2 and 6 neurons a layer, every weight a multiple of 1/4.

    So its numbers after l layers are multiples of 2^-(8 l + 2): exact in fp64, unless more than two keys tie.
    """

    def weights(*shape: int) -> Array:
        return np.round(2 * generator.standard_normal(shape)) / 4

    def head() -> Head:
        return Head(weights(width, 2), weights(width, 2), weights(width, 2), weights(2, width))

    block = tuple(Layer((head(), head()), weights(width, 6), weights(6), weights(6, width)) for _ in range(layers))
    return LoopedTransformer(
        2 * weights(vocabulary, width), 2 * weights(length, width), block, weights(width, vocabulary)
    )
