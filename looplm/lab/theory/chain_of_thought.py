"""m steps of greedy chain of thought in m loops (Saunshi et al., theorem 5.4).

Given a causal Transformer of L layers that decodes token after token, the looped model reads the prompt followed by m
dummy tokens and needs m loops of L + 2 layers. One loop: all positions run the L layers from fresh embeddings; layer
L + 1 compares the logits pairwise and wipes the state; layer L + 2 fetches the outcome of the position before, so each
dummy learns the best token there and becomes it, and everyone's embedding is written for the next loop.

Simpler than the paper's proof, which counts loops and updates one position a loop (log2(n + m) more dimensions and
comparisons of positions): all dummies are updated in every loop. By causality dummy t is right after t loops, because
what it reads was right after t - 1, and it stays right. (This is Jacobi iteration on greedy decoding; it may be done
earlier.)

Argmax without uniqueness: logits that differ do so by at least `margin`. Token v is charged, for every rival u, with
relu(1 - (logit_v - logit_u) / margin), without the 1 if u has the higher id: 0 for a win, at least 1 for a loss, and a
draw goes to the lower id. The best token alone is charged 0, so relu(1 - charge) is its one-hot code without rounding.
Both this and the wipe in a layer of its own matter: errors of 1e-10 in a token, or of 1e-16 in an embedding, break ties
that the original averages.
"""

import math
from itertools import permutations, product

import numpy as np

from looplm.lab.theory.distinct_layers import random_transformer
from looplm.lab.theory.transformer import (
    Array,
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
        name="chain of thought",
        source="Saunshi et al., theorem 5.4",
        task="the m tokens that a given causal Transformer of L layers decodes greedily after a prompt of n",
        idea="m dummy tokens after the prompt; each loop every dummy becomes the best token of the position before it",
        loops="m",
        mask="causal",
        attention="uniform hard as in the original, and one head that looks one position back; no ties there",
        norm="none",
        precision="the original's, with logits that are equal or differ by at least the margin",
    )


def size(original: LoopedTransformer) -> Size:
    """Width 2 d + 3 V + 5, L + 2 layers; the comparisons take V (V - 1) + 2 d neurons."""
    part, answers = original.size, len(original.embedding)
    return Size(
        width=2 * part.width + 3 * answers + 5,
        layers=part.layers + 2,
        heads=max(part.heads, 1),
        head_width=max(part.head_width, 2),
        hidden=max(part.hidden, answers * (answers - 1) + 2 * part.width, 2 * part.width + 5 * answers),
        vocabulary=answers + 1,
    )


def build(original: LoopedTransformer, margin: float) -> LoopedTransformer:
    """The looped model for prompts and dummies that together fill at most the original's positions.

    Args:
        original: causal, without norm, one answer a token; its whole block is one pass.
        margin: the least distance of two logits that are not equal; a power of two keeps the arithmetic exact.

    Returns:
        A model for inputs `inputs_of(prompts, steps, V)`; its readout (B, n + m, V) is the one-hot token that every
        position holds.

    Raises:
        ValueError: an original with another mask or norm or without a logit a token, or a margin that is not positive.
    """
    vocabulary = len(original.embedding)
    if not original.causal or original.threshold_norm or original.readout.shape[1] != vocabulary:
        raise ValueError("the original must be causal, without norm, and read out one logit a token")
    if not 0 < margin < math.inf:
        raise ValueError(f"margin is {margin}; it must be positive and finite")
    wires = Wiring(
        state=original.size.width, place=original.size.width, token=vocabulary, charge=vocabulary, before=vocabulary,
        dummy=1, one=1, position=1, square=1, previous=1,
    )  # fmt: skip
    index = np.arange(len(original.positions))[:, None].astype(np.float64)
    dummy = np.eye(vocabulary + 1)[:, -1:]
    return LoopedTransformer(
        embedding=wires.rows(
            vocabulary + 1,
            state=np.pad(original.embedding, ((0, 1), (0, 0))),
            token=np.eye(vocabulary + 1, vocabulary),
            dummy=dummy,
        ),
        positions=wires.rows(
            len(index),
            state=original.positions,
            place=original.positions,
            one=1.0,
            position=index,
            square=index**2,
            previous=np.maximum(index - 1, 0),
        ),
        block=(
            *(wires.transplant("state", layer) for layer in original.block),
            _compare(wires, original.readout, margin),
            _rewrite(wires, original.embedding),
        ),
        readout=wires.columns(vocabulary, token=1.0),
    )


def _compare(wires: Wiring, readout: Array, margin: float) -> Layer:
    """Charge every token for each rival that it does not beat, nothing if its logit is the best; wipe the state."""
    vocabulary = readout.shape[1]
    token, rival = np.array(list(permutations(range(vocabulary), 2)), dtype=np.int64).reshape(-1, 2).T
    lead = (readout[:, token] - readout[:, rival]) / margin
    wins_draw = (token < rival).astype(np.float64)
    compare = wires.neurons(len(token), {"state": -lead}, 1 - wins_draw, {"charge": np.eye(vocabulary)[token]})
    return combine(compare, wires.clear_signed("state"))


def _rewrite(wires: Wiring, embedding: Array) -> Layer:
    """Fetch the charges one position back; the token charged nothing goes to the dummies; embed every token anew."""
    vocabulary = len(embedding)
    return combine(
        wires.head(scores=[("previous", "position", 2.0), ("one", "square", -1.0)], moves=[("charge", "before", 1.0)]),
        wires.copy_signed("place", {"state": 1.0}),
        wires.clear("charge", "before"),
        wires.neurons(vocabulary, {"token": 1.0, "dummy": -1.0}, writes={"state": embedding}),
        wires.neurons(vocabulary, {"token": 1.0, "dummy": 1.0}, -1.0, {"token": -1.0}),
        wires.neurons(vocabulary, {"before": -1.0, "dummy": 1.0}, 0.0, {"token": 1.0, "state": embedding}),
    )


def inputs_of(prompts: Integers, steps: int, vocabulary: int) -> Array:
    """Prompts (B, n) of token ids 0..V-1, then `steps` dummies (id V), as one-hot inputs (B, n + m, V + 1)."""
    return one_hot(np.pad(prompts, ((0, 0), (0, steps)), constant_values=vocabulary), vocabulary + 1)


def solve(original: LoopedTransformer, prompts: Integers, steps: int) -> Integers:
    """The reference: decode greedily, one token at a time, each from scratch; (B, n) to (B, m)."""
    text = prompts
    for _ in range(steps):
        logits = original.run(one_hot(text, len(original.embedding)), 1)[:, -1]
        text = np.concatenate([text, logits.argmax(-1)[:, None]], axis=1)
    return text[:, prompts.shape[1] :]


def worst_case(vocabulary: int, length: int) -> tuple[LoopedTransformer, float, Integers]:
    """An original that counts, v to v + 1 modulo V, its margin, and the prompt 0: no token is right before its loop."""
    successor = np.roll(np.eye(vocabulary), 1, axis=1)
    still = Layer((), np.zeros((vocabulary, 0)), np.zeros(0), np.zeros((0, vocabulary)))
    counter = LoopedTransformer(np.eye(vocabulary), np.zeros((length, vocabulary)), (still,), successor)
    return counter, 1.0, np.zeros((1, 1), dtype=np.int64)


def wrong(model: LoopedTransformer, original: LoopedTransformer, prompts: Integers, steps: int, loops: int) -> int:
    """How many prompts (B, n) get another continuation of `steps` tokens from the looped model."""
    held = model.run(inputs_of(prompts, steps, len(original.embedding)), loops)[:, prompts.shape[1] :]
    return int((held != one_hot(solve(original, prompts, steps), len(original.embedding))).any((1, 2)).sum())


def check(original: LoopedTransformer, margin: float, prompts: Integers, steps: int) -> Report:
    """The prompts (B, n) after m loops, and the counter's m tokens with one loop fewer."""
    counter, unit, start = worst_case(steps + 2, steps + 1)
    fails = wrong(build(counter, unit), counter, start, steps, steps - 1) == 1
    failures = wrong(build(original, margin), original, prompts, steps, steps)
    return Report("chain of thought", len(prompts), failures, steps, fails)


def verify(random: int = 2000, seed: int = 0) -> Report:
    """Random originals: every prompt to length 4 over 3 tokens, m = 1..4, then `random` longer ones.

    The longer ones: 1 to 3 layers, 2 to 5 tokens, prompts of up to 8 tokens, m up to 12.
    """
    generator = np.random.default_rng(seed)
    report = Report("chain of thought", 0, 0, 0, True)
    for length, steps in product(range(1, 5), repeat=2):
        original = random_transformer(generator, layers=2, length=length + steps)
        report += check(original, margin_of(original), np.array(list(product(range(3), repeat=length))), steps)
    for _ in range(20):
        length, steps = int(generator.integers(1, 9)), int(generator.integers(1, 13))
        vocabulary, layers = int(generator.integers(2, 6)), int(generator.integers(1, 4))
        original = random_transformer(generator, layers, length + steps, vocabulary)
        prompts = generator.integers(vocabulary, size=(max(1, random // 20), length))
        report += check(original, margin_of(original), prompts, steps)
    return report


def margin_of(original: LoopedTransformer) -> float:
    """A margin for a `random_transformer`: 2^-(8 L + 4) since its weights are quarters, and 2^-12 for averages of ties.

    Without ties the first factor is exact; with them it is not (8 of 102,400 instances failed), and the second leaves
    room for one average of up to 64 keys per head. A closer call would be counted as a failure.
    """
    return 2.0 ** -(8 * len(original.block) + 16)
