"""Reachability against a walk up the edges."""

from collections import Counter

import pytest
from task_rows import items, only

from looplm.lab.tasks import make_task


def read(item):
    """Edges as child to parent, and the nodes asked about with their places."""
    mark = item.words.index("?")
    pairs = list(zip(item.words[:mark:2], item.words[1:mark:2], strict=True))
    assert all(child.startswith(">") for _, child in pairs)
    parents = {child[1:]: parent for parent, child in pairs}
    assert len(parents) == len(pairs)
    return parents, {mark + 1 + place: node for place, node in enumerate(item.words[mark + 1 :])}


def climb(parents, node):
    steps = 0
    while node in parents:
        node, steps = parents[node], steps + 1
    return node, steps


@pytest.mark.parametrize("scale", ["laptop", "paper"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers(scale, split):
    task = make_task("reachability", scale)
    for item in items(task, split=split, size=128):
        parents, asked = read(item)
        assert len(parents) == task.settings.nodes - 2
        assert item.learnt == {place: climb(parents, node)[0] for place, node in asked.items()}
        place, root = only(item.answers)
        assert place == max(asked) and climb(parents, asked[place]) == (root, item.level)
        if task.settings.dense:
            assert sorted(asked.values(), key=int) == [str(node) for node in range(task.settings.nodes)]


def test_neither_size_nor_depth_gives_the_answer_away():
    task = make_task("reachability")
    larger, bushier, rows = 0, 0, items(task, size=2048)
    for item in rows:
        parents, asked = read(item)
        trees, depths = Counter(), {}
        for node in asked.values():
            root, depth = climb(parents, node)
            trees[root] += 1
            depths.setdefault(root, []).append(depth)
        assert len(trees) == 2 and {max(found) for found in depths.values()} == {item.level}
        (_, root), children = only(item.answers), Counter(parents.values())
        other = next(name for name in trees if name != root)
        larger += (trees[root] > trees[other]) - (trees[root] < trees[other])
        bushier += (children[root] > children[other]) - (children[root] < children[other])
    assert abs(larger) < 0.08 * len(rows) and abs(bushier) < 0.08 * len(rows)


@pytest.mark.parametrize("dense", [True, False])
def test_held_out_graphs_are_never_trained_in_another_order(dense):
    task = make_task("reachability", nodes=6, levels=(1, 2), test_levels=(1, 2), dense=dense)

    def graphs(**more):
        return [frozenset(read(item)[0].items()) for item in items(task, **more)]

    trained, asked = set(graphs(size=4096)), graphs(seed=1, size=1024, split="test")
    validated = set(graphs(seed=2, size=1024, split="validation"))
    assert not trained & set(asked) and not trained & validated and not set(asked) & validated
    assert len(set(asked)) < len(asked) / 4


def test_too_few_nodes():
    with pytest.raises(ValueError, match=r"nodes is 17; two trees of depth 8 need at least 18"):
        make_task("reachability", nodes=17)
