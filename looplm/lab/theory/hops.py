"""p-hop induction in floor(log2 p) + 2 loops, for every p (Saunshi et al., corollary 5.3).

next(i) is the latest j <= i with v_(j-1) = v_i, or 0 (find_1 in the paper); hop_p is the token at next^p(n), or bottom.

Why this is not plain pointer doubling. Loop 1 copies the previous token and loop 2 finds next(i); if pointers then only
double, 2^(T-2) hops are reached in T loops, so p that is no power of two needs ceil(log2 p) + 2. The corollary says
floor. It is right, because attention by content can take one more hop on the way: let each place be named by its token
and its *ordinal* c, the number of times the token has occurred up to there. Then next(q) is the one key whose previous
token is v_q with ordinal c(q) - 1. So a pointer to q is enough to attend to next(q) and take the pointer stored there:

    jump   <- jump(next(jump))       0, 1, 3, 7, ... hops after loop 1, 2, 3, 4, ...: next^(2^(l-1) - 1) after loop l
    answer <- jump(next(answer))     in loop l, if bit l - 2 of p is set: 2^(l-2) more hops

T loops read bits 0..T-2 of p, so floor(log2 p) + 2 loops serve every p < 2^(T-1): binary exponentiation.

Ordinals need no counter. A head that looks uniformly at the equal tokens and one start mark averages the mark's flag to
a = 1/(c + 1); with two marks, b = 1/(c + 2). The points (a, b) lie on the strictly concave curve b = a/(1 + a), so a
linear score peaks at one of them: b_k - (1 - a - b) a_k, with a and b of the pointer, is largest at c_k = c - 1, by
1/(c (c+1)^2 (c+2)) over ordinal c and by 1/((c-1) c (c+1) (c+2)) over ordinal c - 2 (the tests derive both).
Start mark 2 is position 0 of the paper, "bottom": ordinal 0 of every token. In loop 2 no key knows its ordinal yet, all
equal tokens draw, and a recency term smaller than any such gap decides for the latest.
"""

from itertools import product

import numpy as np

from looplm.lab.theory.transformer import Array, Integers, Layer, LoopedTransformer, Report, Size, Statement, one_hot
from looplm.lab.theory.wiring import Weight, Wiring, combine

MATCH = 4.0
"""Score of an equal token; ordinal and recency terms together stay within +-1.5."""
LONGEST = 510
"""Longest sequence whose scores fp64 tells apart with room to spare; see `score_bits`."""


def describe() -> Statement:
    """The claim and its conditions."""
    return Statement(
        name="hops",
        source="Saunshi et al., corollary 5.3",
        task="the token p induction hops back from position n, or bottom",
        idea="places are named by token and ordinal, so a doubling pointer takes one more hop by content: m to 2m + 1",
        loops="floor(log2 p) + 2, for every p",
        mask="causal",
        attention="three heads, uniform hard; ties in loop 1 only: averaging over c tokens and a mark counts them",
        norm="none",
        precision="O(log n) bits: scores differ by at least (n + 2)^-4 or by one recency step; width does not grow",
    )


def size(alphabet: int) -> Size:
    """Width 8 A + 26, one layer, three heads, 9 A + 25 neurons for A symbols: nothing grows with n or p."""
    return Size(8 * alphabet + 26, 1, 3, 2 * alphabet + 7, 9 * alphabet + 25, alphabet + 2)


def score_bits(length: int) -> int:
    """Bits of a score, from MATCH + 2 down to the recency step 2^-(5 ceil(log2(n + 2)) + 1)."""
    return 3 + _recency(length)


def loops_needed(hops: int) -> int:
    """Floor(log2 p) + 2."""
    return hops.bit_length() + 1


def build(alphabet: int, length: int, hops: int) -> LoopedTransformer:
    """The Transformer for sequences of `length` tokens over `alphabet` symbols and `hops` hops.

    Inputs are `inputs_of(sequences, alphabet)`, (B, n + 2, A + 2); the readout at the last position has A + 1 answers,
    the symbols and, as number A, bottom.

    Raises:
        ValueError: alphabet below 2, hops below 1, or a length outside 1..510.
    """
    if alphabet < 2 or hops < 1:
        raise ValueError(f"alphabet is {alphabet} and hops {hops}; p-hop needs 2 symbols and 1 hop at least")
    if not 1 <= length <= LONGEST:
        raise ValueError(f"length is {length}; it must lie in 1..{LONGEST}, where fp64 separates the scores")
    wires = _registers(alphabet)
    symbol = np.eye(alphabet + 2, alphabet)
    place = np.eye(alphabet + 2, alphabet + 2) * (np.arange(alphabet + 2) < alphabet)
    flags = np.eye(alphabet + 2)
    index = np.arange(length + 2.0)
    previous = np.maximum(index - 1, np.minimum(index, 1))  # the second mark is its own predecessor
    return LoopedTransformer(
        embedding=wires.rows(
            alphabet + 2,
            unmatched=symbol,
            place=place,
            jump=place,
            answer=place,
            mark=flags[:, [alphabet]],
            bottom=flags[:, [alphabet + 1]],
        ),
        positions=wires.rows(
            length + 2,
            one=1.0,
            first=1.0,
            schedule=float(int(f"{hops:b}"[::-1], 2)),
            position=index[:, None],
            square=index[:, None] ** 2,
            previous=previous[:, None],
        ),
        block=(combine(*_heads(wires, alphabet, length), *_feed_forward(wires, 2.0 ** (hops.bit_length() - 1))),),
        readout=wires.columns(
            alphabet + 1, answer=place[:, : alphabet + 1], one=0.5 * np.eye(1, alphabet + 1, k=alphabet)
        ),
    )


def _registers(alphabet: int) -> Wiring:
    """A place is a token (one-hot) and its ordinal (a, b); `key` is the previous position's place."""
    place = alphabet + 2
    return Wiring(
        place=place, key=place, jump=place, answer=place, new_key=place, new_jump=place, new_answer=place,
        unmatched=alphabet, tally=2, one=1, position=1, square=1, previous=1, mark=1, bottom=1, first=1, later=1,
        take=1, schedule=1,
    )  # fmt: skip


def _heads(wires: Wiring, alphabet: int, length: int) -> tuple[Layer, ...]:
    """Head 1 copies the previous place; heads 2 and 3 count in loop 1 and hop from `jump` and `answer` afterwards."""
    a, b = alphabet, alphabet + 1
    meet = np.diag([MATCH] * alphabet + [0.0, 0.0])
    meet[a, a] = meet[b, a] = 1.0  # (a + b) a_k
    peak = np.zeros((1, alphabet + 2))
    peak[0, a], peak[0, b] = -1.0, 1.0  # b_k - a_k
    shift = wires.head(
        scores=[("previous", "position", 2.0), ("one", "square", -1.0)],  # largest at the position asked for
        moves=[("place", "new_key", 1.0)],
    )

    def hop(pointer: str, marks: list[str], target: str, tally: Array) -> Layer:
        counting: list[tuple[str, str, Weight]] = [
            ("unmatched", "place", np.eye(alphabet, alphabet + 2)),
            *(("first", mark, 1.0) for mark in marks),
        ]
        hopping: list[tuple[str, str, Weight]] = [
            (pointer, "key", meet),
            ("one", "key", peak),
            ("later", "bottom", MATCH),
            ("later", "position", 2.0 ** -_recency(length)),
        ]
        return wires.head([*counting, *hopping], moves=[("jump", target, 1.0), ("mark", "tally", tally)])

    return (
        shift,
        hop("jump", ["mark"], "new_jump", np.array([[1.0, 0.0]])),
        hop("answer", ["mark", "bottom"], "new_answer", np.array([[0.0, 1.0]])),
    )


def _feed_forward(wires: Wiring, threshold: float) -> tuple[Layer, ...]:
    """Move what the heads fetched into place; in loop 1 set the ordinals; read the next bit of p off `schedule`."""
    place = wires.sizes["place"]
    ordinal = np.eye(2, place, k=place - 2)
    return (
        wires.clear("key", "new_jump", "new_answer", "unmatched", "tally", "take"),
        wires.neurons(place, {"new_key": 1.0}, writes={"key": 1.0, "new_key": -1.0}),
        wires.neurons(
            2, {"tally": 1.0, "first": 1.0}, bias=-1.0, writes={"place": ordinal, "jump": ordinal, "answer": ordinal}
        ),
        wires.neurons(place, {"new_jump": 1.0, "first": -1.0}, writes={"jump": 1.0}),
        wires.neurons(place, {"jump": 1.0, "first": -1.0}, writes={"jump": -1.0}),
        wires.neurons(place, {"new_answer": 1.0, "take": 1.0}, bias=-1.0, writes={"answer": 1.0}),
        wires.neurons(place, {"answer": 1.0, "take": 1.0}, bias=-1.0, writes={"answer": -1.0}),
        wires.neurons(1, {"first": 1.0}, writes={"first": -1.0, "later": 1.0}),
        wires.neurons(1, {"schedule": 1.0}, writes={"schedule": 1.0}),
        wires.neurons(1, {"schedule": 1.0}, 1.0 - threshold, {"take": 1.0, "schedule": -2 * threshold}),
        wires.neurons(1, {"schedule": 1.0}, -threshold, {"take": -1.0, "schedule": 2 * threshold}),
    )


def _recency(length: int) -> int:
    """The recency step is 2^-this, so small that n + 1 steps stay below half of any gap between two ordinals."""
    return 5 * (length + 1).bit_length() + 1


def inputs_of(sequences: Integers, alphabet: int) -> Array:
    """Sequences (B, n) of symbols as one-hot inputs (B, n + 2, A + 2) behind the two start marks."""
    marked = np.pad(sequences, ((0, 0), (2, 0)))
    marked[:, :2] = alphabet, alphabet + 1
    return one_hot(marked, alphabet + 2)


def next_positions(sequences: Integers) -> Integers:
    """The paper's find_1 by its definition: (B, n) to (B, n + 1) positions 0..n, counted from 1; 0 stays 0."""
    later, earlier = np.triu_indices(sequences.shape[1], k=1)[::-1]
    found = np.zeros((len(sequences), sequences.shape[1] + 1), dtype=np.int64)
    for i, before in sorted(zip(later.tolist(), earlier.tolist(), strict=True)):
        same = sequences[:, i] == sequences[:, before]
        found[same, i + 1] = before + 2
    return found


def solve(sequences: Integers, hops: int, alphabet: int) -> Integers:
    """The reference: hop one at a time; sequences (B, n) to symbols (B,), or `alphabet` for bottom."""
    jumps, rows = next_positions(sequences), np.arange(len(sequences))
    at = np.full(len(sequences), sequences.shape[1])
    for _ in range(hops):
        at = jumps[rows, at]
    return np.where(at > 0, sequences[rows, at - 1], alphabet)


def worst_case(hops: int) -> Integers:
    """The word 0 1 2 0 1 2 ... of length 2 p + 3: every hop goes back two places, so each number of hops shows.

    The answer is its third token; 2^k hops fewer end 2^(k+1) places later, never at the same of three tokens.
    """
    return np.arange(2 * hops + 3) % 3


def wrong(model: LoopedTransformer, sequences: Integers, hops: int, alphabet: int, loops: int) -> int:
    """How many sequences (B, n) the model gets wrong after `loops` loops."""
    answers = model.run(inputs_of(sequences, alphabet), loops)[:, -1].argmax(-1)
    return int((answers != solve(sequences, hops, alphabet)).sum())


def check(sequences: Integers, hops: int, alphabet: int) -> Report:
    """The sequences (B, n) in floor(log2 p) + 2 loops, and the worst case for p (at most 253) with one fewer."""
    loops, hard = loops_needed(hops), worst_case(hops)
    fails = wrong(build(3, len(hard), hops), hard[None], hops, 3, loops - 1) == 1
    failures = wrong(build(alphabet, sequences.shape[1], hops), sequences, hops, alphabet, loops)
    return Report("hops", len(sequences), failures, loops, fails)


def verify(random: int = 2000, seed: int = 0) -> Report:
    """Every short sequence over 2 and 3 symbols with p = 1..9, and about `random` long ones, p up to 40.

    The long ones have up to 160 of 4 symbols; two of three batches never repeat a token at once, because a repeated
    token is a fixed point of `next` at which all further hops agree.
    """
    report = Report("hops", 0, 0, 0, True)
    for alphabet, longest in ((2, 7), (3, 5)):
        for length in range(1, longest + 1):
            words = np.array(list(product(range(alphabet), repeat=length)))
            for hops in range(1, 10):
                report += check(words, hops, alphabet)
    generator = np.random.default_rng(seed)
    for batch in range(20):
        length, hops = int(generator.integers(8, 161)), int(generator.integers(1, 41))
        report += check(random_sequences(generator, max(1, random // 20), length, repeats=batch % 3 == 0), hops, 4)
    return report


def random_sequences(generator: np.random.Generator, count: int, length: int, repeats: bool) -> Integers:
    """Sequences (count, length) of 4 symbols, uniform; without `repeats` no token equals the one before it."""
    steps = generator.integers(0 if repeats else 1, 4, size=(count, length))
    return steps.cumsum(1) % 4
