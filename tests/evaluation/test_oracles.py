"""Both oracles by hand and against trying every choice of loops."""

from itertools import product

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.evaluation.oracles import agreement_depths, hindsight_depths, read_at


def test_agreement_by_hand() -> None:
    """Equal and staying: a loop that agrees once and leaves again does not count; the last loop always agrees."""
    predictions = torch.tensor([[7, 7, 7, 7], [1, 7, 7, 7], [7, 1, 7, 7], [7, 7, 1, 7], [1, 2, 3, 7]])
    assert agreement_depths(predictions).tolist() == [1, 2, 3, 4, 4]


def test_hindsight_by_hand() -> None:
    """The first right loop, however long it stays right; loop 1 where none is."""
    right = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1], [0, 0, 0]]).bool()
    assert hindsight_depths(right).tolist() == [1, 2, 3, 2, 1]


def test_reading_at_a_depth() -> None:
    values = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    assert read_at(values, torch.tensor([3, 1])).tolist() == torch.tensor([0.3, 0.4]).tolist()


GRIDS = st.integers(1, 4).flatmap(
    lambda loops: st.lists(st.lists(st.integers(0, 2), min_size=loops, max_size=loops), min_size=1, max_size=4)
)


@given(GRIDS)
@settings(max_examples=60, deadline=None)
def test_agreement_is_the_earliest_that_stays(grid: list[list[int]]) -> None:
    for row, depth in zip(grid, agreement_depths(torch.tensor(grid)).tolist(), strict=True):
        stays = [all(later == row[-1] for later in row[t:]) for t in range(len(row))]
        assert depth == 1 + stays.index(True)


@given(GRIDS)
@settings(max_examples=60, deadline=None)
def test_no_choice_of_loops_beats_hindsight(grid: list[list[int]]) -> None:
    """Against every choice of a loop for each position: none is right more often, none as often with fewer loops."""
    right = torch.tensor(grid) == 1
    chosen = hindsight_depths(right)
    hits, cost = int(read_at(right, chosen).sum()), int(chosen.sum())
    loops = range(1, right.shape[1] + 1)
    for choice in product(loops, repeat=len(grid)):
        found = int(read_at(right, torch.tensor(choice)).sum())
        assert found <= hits
        assert found < hits or sum(choice) >= cost
