"""Graph reachability in ceil(log2 D) + 1 loops (Ouro section 6.3 and appendix B.5, theorem 1).

A hidden graph is in the weights, a context graph in the input, one token a vertex: its name and its row of the context
graph's adjacency matrix. In one loop every vertex attends to the vertices it is known to reach and takes over what
they reach (distances double), then the feed-forward network adds its edges of the hidden graph. So after loop i row j
holds every vertex within distance 2^(i-1) of j in the union, and possibly more.

The appendix is wrong in two places, and the construction fails as printed (the tests keep both failures):
- its query matrix [[0, 0], [0, I]] never meets its key matrix [[I, 0], [0, 0]], so every score is 0; the query must be
  [[0, I], [0, 0]], which asks with the row for the vertex names;
- a vertex without out-edges scores 0 everywhere and so attends to everyone; with self-loops (a_jj = 1) in the input it
  attends to itself. Every vertex then reaches itself, as it should.

D is the largest finite distance in the union. (An infinite diameter would make the statement empty.)
"""

from itertools import product

import numpy as np
import numpy.typing as npt

from looplm.lab.theory.transformer import Array, Integers, LoopedTransformer, Report, Size, Statement
from looplm.lab.theory.wiring import Wiring, combine


def describe() -> Statement:
    """The claim and its conditions."""
    return Statement(
        name="reachability",
        source="Ouro, theorem 1 (appendix B.5), with two corrections",
        task="is there a path from s to t in the union of a hidden and a context graph on n vertices?",
        idea="each vertex attends to all it is known to reach and takes their rows: distances double every loop",
        loops="ceil(log2 D) + 1, D the largest finite distance",
        mask="none: every vertex sees every vertex",
        attention="one head, uniform hard; up to n keys tie and are averaged, each with weight 1/ties",
        norm="LN(x) = 1{x > 0} after attention and after the feed-forward network",
        precision="states are bits; an average is 0 or at least 1/n, so ceil(log2 n) bits below the point decide it",
    )


def size(vertices: int) -> Size:
    """Width 2n, one layer, one head; n live neurons (the appendix writes 2n, half of them zero)."""
    return Size(2 * vertices, 1, 1, vertices, vertices, vertices)


def build(hidden: npt.ArrayLike) -> LoopedTransformer:
    """The Transformer that knows the hidden graph.

    Args:
        hidden: (n, n) 0/1 adjacency matrix, entry (j, k) for an edge from j to k.

    Returns:
        A model whose inputs are `rows_of(context)`, (B, n, n), and whose readout at vertex s is its row: entry t is 1
        if s reaches t.
    """
    graph = adjacency(hidden, "hidden").astype(np.float64)
    n = len(graph)
    wires = Wiring(vertex=n, row=n)
    head = wires.head(scores=[("row", "vertex", 1.0)], moves=[("row", "row", 1.0)])
    edges = wires.neurons(n, {"vertex": graph}, writes={"row": 1.0})
    return LoopedTransformer(
        embedding=wires.rows(n, row=np.eye(n)),
        positions=wires.rows(n, vertex=np.eye(n)),
        block=(combine(head, edges),),
        readout=wires.columns(n, row=1.0),
        causal=False,
        threshold_norm=True,
    )


def rows_of(context: npt.ArrayLike) -> Array:
    """The input (B, n, n) for context graphs (B, n, n): every vertex's row, with the self-loop that is needed."""
    graphs = adjacency(context, "context", dimensions=3).astype(np.float64)
    return np.maximum(graphs, np.eye(graphs.shape[-1]))


def loops_needed(distance: int) -> int:
    """Loops for a largest finite distance D: ceil(log2 D) + 1, and 1 for a union without edges (D = 0)."""
    return max(distance - 1, 0).bit_length() + 1


def distances(graphs: npt.ArrayLike) -> Integers:
    """The reference: breadth-first search, level by level; (B, n, n) numbers of edges, -1 where there is no path."""
    edges = adjacency(graphs, "graphs", dimensions=3).astype(bool)
    frontier = np.broadcast_to(np.eye(edges.shape[-1], dtype=bool), edges.shape)
    found = np.where(frontier, 0, -1)
    for level in range(1, edges.shape[-1]):
        frontier = (frontier.astype(np.float64) @ edges > 0) & (found < 0)
        found[frontier] = level
    return found


def worst_case(distance: int) -> tuple[Integers, Integers]:
    """Hidden and context graph (n, n), n = D + 1: one path of D hidden edges and nothing in the context."""
    if distance < 1:
        raise ValueError(f"distance is {distance}; a path needs at least 1 edge")
    return np.eye(distance + 1, k=1, dtype=np.int64), np.zeros((distance + 1, distance + 1), dtype=np.int64)


def check(hidden: npt.ArrayLike, contexts: npt.ArrayLike, fewer: int = 0) -> tuple[int, int]:
    """Run one hidden graph with contexts (B, n, n), each for `loops_needed(D) - fewer` loops, against the search.

    Returns:
        How many instances have a wrong entry, and the most loops used.
    """
    graph = adjacency(hidden, "hidden")
    true = distances(np.maximum(adjacency(contexts, "contexts", dimensions=3), graph))
    loops = np.array([loops_needed(int(d)) for d in true.max((1, 2))]) - fewer
    return wrong(build(graph), contexts, true >= 0, loops), int(loops.max())


def wrong(model: LoopedTransformer, contexts: npt.ArrayLike, true: npt.NDArray[np.bool_], loops: Integers) -> int:
    """How many contexts (B, n, n) the model gets wrong, each read after its own number of loops (B,)."""
    readouts = np.stack([state @ model.readout for state in model.states(rows_of(contexts), int(loops.max()))])
    answers = readouts[loops, np.arange(len(loops))] > 0
    return int((answers != true).any((1, 2)).sum())


def verify(random: int = 2000, seed: int = 0) -> Report:
    """All digraphs on 3 vertices with every split of their edges, `random` larger ones, and the worst cases to D = 16.

    An edge may be in neither graph, in one, or in both: 4^6 instances. The random unions have 4 to 24 vertices, half of
    them sparse and half a long path plus sparse edges, so that D is anything from 0 to n - 1.
    """
    places = [(j, k) for j, k in product(range(3), repeat=2) if j != k]
    every = np.zeros((64, 3, 3), dtype=np.int64)
    for graph, bits in zip(every, product((0, 1), repeat=6), strict=True):
        graph[tuple(np.transpose(places))] = bits
    runs = [(len(every), *check(hidden, every)) for hidden in every]
    generator = np.random.default_rng(seed)
    contexts_each = 25
    for index in range(-(-random // contexts_each)):
        hidden, contexts = random_graphs(generator, contexts_each, long_path=index % 2 == 1)
        runs.append((contexts_each, *check(hidden, contexts)))
    fails = all(check(hidden, context[None], fewer=1)[0] for hidden, context in map(worst_case, range(1, 17)))
    instances, failures, loops = (np.array(column) for column in zip(*runs, strict=True))
    return Report("reachability", int(instances.sum()), int(failures.sum()), int(loops.max()), fails)


def random_graphs(generator: np.random.Generator, contexts: int, long_path: bool) -> tuple[Integers, Integers]:
    """A hidden graph (n, n) and context graphs (contexts, n, n), n from 4 to 24, with about half an edge a vertex each.

    With `long_path` a random path of random length runs through the union, its edges split at random.
    """
    n = int(generator.integers(4, 25))
    hidden = (generator.random((n, n)) < 0.5 / n).astype(np.int64)
    graphs = (generator.random((contexts, n, n)) < 0.5 / n).astype(np.int64)
    if long_path:
        path = generator.permutation(n)[: generator.integers(2, n + 1)]
        shared = generator.random(len(path) - 1) < 0.7
        hidden[path[:-1][shared], path[1:][shared]] = 1
        graphs[:, path[:-1][~shared], path[1:][~shared]] = 1
    return hidden, graphs


def adjacency(graph: npt.ArrayLike, name: str, dimensions: int = 2) -> Integers:
    """The graph as an integer array (..., n, n); ValueError unless it is square, of that rank and made of 0 and 1."""
    matrix = np.asarray(graph)
    if matrix.ndim != dimensions or matrix.shape[-1] != matrix.shape[-2] or not np.isin(matrix, (0, 1)).all():
        shape = "(n, n)" if dimensions == 2 else "(B, n, n)"
        raise ValueError(f"{name} has shape {matrix.shape}; it must be a 0/1 adjacency matrix {shape}")
    return matrix.astype(np.int64)
