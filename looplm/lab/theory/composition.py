"""A product of n group elements in ceil(log2 n) loops (Saunshi et al., theorem 5.1 and its algorithm 2).

Input (#, g_1, ..., g_n), where # counts as the identity; causal mask. In a loop position i multiplies what two earlier
positions hold, g_i <- g_[2i-n-1]+ o g_[2i-n]+ with [x]+ = max(x, 0). Counted from the end, position n - j fetches
n - 2j - 1 and n - 2j, so after l loops it holds the product of elements n - (j+1) 2^l + 1 to n - j 2^l, and position n
holds all of them as soon as 2^l >= n. Nothing but the identity and associativity is used: any finite monoid will do.

Elements and positions are written in binary with digits +-1. Two numbers of k such digits have inner product k if they
are equal and at most k - 2 otherwise, so both heads find exactly one key, and a neuron with bias 1 - 2m fires for one
pair of elements only.

One slip in print: the theorem gives the heads width ceil(log2 n), but positions 0..n need ceil(log2(n + 1)) digits, one
more when n is a power of two. The total width it states does count them.
"""

from itertools import permutations, product

import numpy as np
import numpy.typing as npt

from looplm.lab.theory.transformer import Array, Integers, LoopedTransformer, Report, Size, Statement, one_hot
from looplm.lab.theory.wiring import Wiring, combine


def describe() -> Statement:
    """The claim and its conditions."""
    return Statement(
        name="composition",
        source="Saunshi et al., theorem 5.1",
        task="the product g_1 o ... o g_n in a finite group G, read at position n",
        idea="every position multiplies two neighbouring products and the length of a product doubles every loop",
        loops="ceil(log2 n)",
        mask="causal",
        attention="two heads, uniform hard; no ties, one key always wins by at least 2",
        norm="none",
        precision="constant: states are -1, 0 or 1 and scores are integers up to ceil(log2(n + 1))",
    )


def size(elements: int, length: int) -> Size:
    """Width 3 (m + k), 2 heads of width k, |G|^2 + 6 m neurons; m = ceil(log2 |G|), k = ceil(log2(n + 1))."""
    m, k = (elements - 1).bit_length(), length.bit_length()
    return Size(3 * (m + k), 1, 2, k, elements**2 + 6 * m, elements + 1)


def build(table: npt.ArrayLike, length: int) -> LoopedTransformer:
    """The Transformer for products of `length` elements.

    Args:
        table: (G, G) integers, entry (a, b) is a o b; element 0 is the identity.
        length: n, at least 1; inputs are `inputs_of(words)`, (B, n + 1, G + 1).

    Raises:
        ValueError: the table is no table of a monoid with identity 0, or has one element; a length below 1.
    """
    law = monoid(table)
    if length < 1:
        raise ValueError(f"length is {length}; a product has at least 1 element")
    count = len(law)
    m, k = (count - 1).bit_length(), length.bit_length()
    wires = Wiring(element=m, position=k, left=k, right=k, first=m, second=m)
    codes, index = digits(np.arange(count), m), np.arange(length + 1)
    left, right = np.maximum(2 * index - length - 1, 0), np.maximum(2 * index - length, 0)
    pairs = np.array(list(product(range(count), repeat=2)))
    multiply = wires.neurons(
        count**2,
        {"first": codes[pairs[:, 0]].T, "second": codes[pairs[:, 1]].T},
        bias=1.0 - 2 * m,
        writes={"element": codes[law[pairs[:, 0], pairs[:, 1]]]},
    )
    return LoopedTransformer(
        embedding=wires.rows(count + 1, element=np.concatenate([codes, codes[:1]])),
        positions=wires.rows(length + 1, position=digits(index, k), left=digits(left, k), right=digits(right, k)),
        block=(
            combine(
                wires.head(scores=[("left", "position", 1.0)], moves=[("element", "first", 1.0)]),
                wires.head(scores=[("right", "position", 1.0)], moves=[("element", "second", 1.0)]),
                multiply,
                *(wires.clear_signed(name) for name in ("element", "first", "second")),
            ),
        ),
        readout=wires.columns(count, element=codes.T),
    )


def inputs_of(words: Integers, elements: int) -> Array:
    """Words (B, n) of element ids as one-hot inputs (B, n + 1, G + 1), the mark # (id G) in front."""
    return one_hot(np.pad(words, ((0, 0), (1, 0)), constant_values=elements), elements + 1)


def loops_needed(length: int) -> int:
    """Ceil(log2 n): 0 for a single element, which is its own product."""
    return (length - 1).bit_length()


def solve(table: npt.ArrayLike, words: Integers) -> Integers:
    """The reference: multiply from left to right; words (B, n) to products (B,)."""
    law, result = np.asarray(table), words[:, 0]
    for step in range(1, words.shape[1]):
        result = law[result, words[:, step]]
    return result


def worst_case(length: int) -> Integers:
    """The word (n,) whose first element alone is not the identity; only the last loop brings it to position n."""
    if length < 2:
        raise ValueError(f"length is {length}; a product of one element needs no loop, so none can be missing")
    return np.eye(1, length, dtype=np.int64)[0]


def wrong(model: LoopedTransformer, table: npt.ArrayLike, words: Integers, loops: int) -> int:
    """How many words (B, n) the model gets wrong after `loops` loops."""
    answers = model.run(inputs_of(words, len(np.asarray(table))), loops)[:, -1].argmax(-1)
    return int((answers != solve(table, words)).sum())


def check(table: npt.ArrayLike, words: Integers) -> Report:
    """The words (B, n) in ceil(log2 n) loops, and the worst case with one fewer (true for n = 1, which needs none)."""
    length = words.shape[1]
    loops, model = loops_needed(length), build(table, length)
    fails = loops == 0 or wrong(model, table, worst_case(length)[None], loops - 1) == 1
    return Report("composition", len(words), wrong(model, table, words, loops), loops, fails)


def verify(random: int = 2000, seed: int = 0) -> Report:
    """Every short word over Z_2, Z_3, Z_5 and S_3, and about `random` long ones over Z_7, S_3 and S_5 (n up to 40)."""
    report = Report("composition", 0, 0, 0, True)
    for table, longest in ((cyclic(2), 9), (cyclic(3), 6), (cyclic(5), 4), (symmetric(3), 5)):
        for length in range(1, longest + 1):
            report += check(table, np.array(list(product(range(len(table)), repeat=length))))
    generator = np.random.default_rng(seed)
    for table, share in ((cyclic(7), 0.4), (symmetric(3), 0.5), (symmetric(5), 0.1)):
        for _ in range(10):
            words = generator.integers(len(table), size=(max(1, round(random * share / 10)), generator.integers(6, 41)))
            report += check(table, words)
    return report


def cyclic(order: int) -> Integers:
    """The table (order, order) of Z_order: addition."""
    return np.add.outer(np.arange(order), np.arange(order)) % order


def symmetric(points: int) -> Integers:
    """The table of S_points, permutations in lexicographic order (the identity first); (a o b)(x) = a(b(x))."""
    elements = list(permutations(range(points)))
    index = {element: i for i, element in enumerate(elements)}
    return np.array([[index[tuple(a[x] for x in b)] for b in elements] for a in elements])


def digits(numbers: Integers, count: int) -> Array:
    """Numbers (N,) in binary with `count` digits +-1, lowest first: (N, count)."""
    return (2 * (numbers[:, None] >> np.arange(count) & 1) - 1).astype(np.float64)


def monoid(table: npt.ArrayLike) -> Integers:
    """The table, checked: square, at least two elements, identity 0, associative; ValueError otherwise."""
    law = np.asarray(table)
    if law.ndim != 2 or law.shape[0] != law.shape[1] or len(law) < 2 or law.dtype.kind not in "iu":
        raise ValueError(f"table has shape {law.shape} and dtype {law.dtype}; it must be (G, G) integers with G >= 2")
    elements = np.arange(len(law))
    if law.min() < 0 or law.max() >= len(law):
        raise ValueError(f"table has entries in {law.min()}..{law.max()}; they must be elements 0..{len(law) - 1}")
    if (law[0] != elements).any() or (law[:, 0] != elements).any():
        raise ValueError("element 0 of the table is not the identity; number the elements so that it is")
    if (law[law[:, :, None], elements] != law[elements[:, None, None], law]).any():
        raise ValueError("the table is not associative, so a product of several elements has no one meaning")
    return law.astype(np.int64)
