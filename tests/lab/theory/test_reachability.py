"""Reachability in ceil(log2 D) + 1 loops: every 3-vertex instance, random ones, the printed version, damage."""

from collections import deque
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from damage import flips
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.lab.theory import reachability
from looplm.lab.theory.reachability import build, check, distances, loops_needed, random_graphs, rows_of, size, wrong

CYCLE = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]])


def search(graph: np.ndarray) -> list[list[int]]:
    """Breadth-first search with a queue, one source at a time."""
    table = []
    for source in range(len(graph)):
        found, queue = {source: 0}, deque([source])
        while queue:
            vertex = queue.popleft()
            for after in np.flatnonzero(graph[vertex]).tolist():
                if after not in found:
                    found[after] = found[vertex] + 1
                    queue.append(after)
        table.append([found.get(vertex, -1) for vertex in range(len(graph))])
    return table


def every_context(vertices: int = 3) -> np.ndarray:
    places = [(j, k) for j, k in product(range(vertices), repeat=2) if j != k]
    graphs = np.zeros((2 ** len(places), vertices, vertices), dtype=int)
    for graph, bits in zip(graphs, product((0, 1), repeat=len(places)), strict=True):
        graph[tuple(np.transpose(places))] = bits
    return graphs


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.floats(0, 0.6), st.integers(0, 10**6))
def test_the_reference_equals_a_queue(vertices, density, seed):
    graph = (np.random.default_rng(seed).random((vertices, vertices)) < density).astype(int)
    assert distances(graph[None])[0].tolist() == search(graph)


def test_distances_by_hand():
    assert distances(np.array([[[0, 1, 0], [0, 0, 1], [0, 0, 0]]]))[0].tolist() == [[0, 1, 2], [-1, 0, 1], [-1, -1, 0]]


@pytest.mark.parametrize(
    ("distance", "loops"), [(0, 1), (1, 1), (2, 2), (3, 3), (4, 3), (5, 4), (8, 4), (9, 5), (16, 5)]
)
def test_loops_by_hand(distance, loops):
    assert loops_needed(distance) == loops


def test_verified_exhaustively_and_at_random():
    report = reachability.verify()
    assert report.holds and report.instances == 64 * 64 + 2000 and report.loops >= 5


@pytest.mark.slow
def test_verified_on_many():
    assert all(reachability.verify(20_000, seed).holds for seed in range(1, 6))


@pytest.mark.parametrize("distance", range(2, 24))
def test_one_loop_fewer_misses_the_ends_of_a_hidden_path(distance):
    hidden, context = reachability.worst_case(distance)
    assert check(hidden, context[None]) == (0, loops_needed(distance))
    assert check(hidden, context[None], fewer=1)[0] == 1
    answer = build(hidden).run(rows_of(context[None]), loops_needed(distance) - 1)[0, 0]
    assert answer.tolist() == [1.0] * (2 ** (loops_needed(distance) - 2) + 1) + [0.0] * (
        distance - 2 ** (loops_needed(distance) - 2)
    )


def test_a_path_in_the_context_alone_needs_one_loop_fewer():
    """The first loop already doubles what the input knows, so the + 1 pays for the hidden edges only."""
    path, nothing = reachability.worst_case(8)
    assert check(nothing, path[None], fewer=1)[0] == 0
    assert check(nothing, path[None], fewer=2)[0] == 1


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.booleans())
def test_after_a_loop_rows_are_sound_and_reach_far_enough(seed, long_path):
    """The induction itself: after loop i a row holds everything within 2^(i-1) and nothing out of reach; bits only."""
    hidden, contexts = random_graphs(np.random.default_rng(seed), 3, long_path)
    true = distances(np.maximum(contexts, hidden))
    n = len(hidden)
    for loop, state in enumerate(build(hidden).states(rows_of(contexts), 5)):
        assert np.isin(state, (0, 1)).all() and (state[..., :n] == np.eye(n)).all()
        rows = state[..., n:] > 0
        assert (true[rows] >= 0).all()
        if loop:
            assert rows[(true >= 0) & (true <= 2 ** (loop - 1))].all()


def as_printed(hidden: np.ndarray, query_fixed: bool):
    """The appendix's matrices: query [[0, 0], [0, I]], or with that corrected but no self-loops."""
    model = build(hidden)
    n, head = len(hidden), model.block[0].heads[0]
    query, key = np.zeros((2 * n, 2 * n)), np.zeros((2 * n, 2 * n))
    key[:n, :n] = np.eye(n)
    query[n:, :n] = np.eye(n) if query_fixed else 0
    query[n:, n:] = 0 if query_fixed else np.eye(n)
    return replace(model, block=(replace(model.block[0], heads=(replace(head, query=query, key=key),)),))


def failing_as_printed(query_fixed: bool) -> int:
    generator, count = np.random.default_rng(0), 0
    for index in range(60):
        hidden, contexts = random_graphs(generator, 1, long_path=index % 2 == 1)
        true = distances(np.maximum(contexts, hidden))
        inputs = contexts.astype(float) if query_fixed else rows_of(contexts)
        answer = as_printed(hidden, query_fixed).run(inputs, loops_needed(int(true.max()))) > 0
        count += bool((answer | np.eye(len(hidden), dtype=bool) != (true >= 0)).any())
    return count


@pytest.mark.parametrize("query_fixed", [False, True])
def test_the_construction_as_printed_fails(query_fixed):
    """Neither correction alone is enough: scores of zero attend to everyone, who then seem reachable."""
    assert failing_as_printed(query_fixed) >= 50


def test_our_matrices_are_the_corrected_ones():
    """The narrow head we build gives the scores of the 2n x 2n matrices of the appendix, query corrected."""
    ours, theirs = build(CYCLE).block[0].heads[0], as_printed(CYCLE, True).block[0].heads[0]
    np.testing.assert_array_equal(ours.query @ ours.key.T, theirs.query @ theirs.key.T)


def test_every_flipped_weight_is_noticed():
    contexts = every_context()
    true = distances(np.maximum(contexts, CYCLE))
    sparse = np.array([[0, 1, 0], [0, 0, 0], [0, 0, 0]])
    for hidden in (CYCLE, sparse):
        true = distances(np.maximum(contexts, hidden))
        loops = np.array([loops_needed(int(d)) for d in true.max((1, 2))])
        assert wrong(build(hidden), contexts, true >= 0, loops) == 0
        unnoticed = [path for path, model in flips(build(hidden)) if not wrong(model, contexts, true >= 0, loops)]
        assert unnoticed == ([] if hidden is CYCLE else [("block", 0, "outer", (0, 3)), ("block", 0, "outer", (2, 5))])


@pytest.mark.parametrize("vertices", [1, 2, 5])
def test_size(vertices):
    assert build(np.zeros((vertices, vertices), dtype=int)).size == size(vertices)
    assert size(vertices).width == 2 * vertices


@pytest.mark.parametrize("graph", [[[0, 1]], [[0, 2], [0, 0]], [0, 1], [[0.5]]])
def test_graphs_that_are_none_are_refused(graph):
    with pytest.raises(ValueError, match=r"hidden has shape .*; it must be a 0/1 adjacency matrix \(n, n\)"):
        build(graph)


def test_a_path_without_edges_is_refused():
    with pytest.raises(ValueError, match="distance is 0"):
        reachability.worst_case(0)


def test_it_says_what_it_does():
    text = str(reachability.describe())
    assert "ceil(log2 D) + 1" in text and "none: every vertex" in text and "LN(x) = 1{x > 0}" in text
