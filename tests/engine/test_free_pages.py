"""Free pages against a plain set; neighbours by hand."""

from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.engine.free_pages import FreePages


def test_runs_grow_side_by_side_and_begin_far_apart_by_hand() -> None:
    free = FreePages(2, 18)  # 16 pages
    assert free.take(2) == [10, 11], "the middle of the only gap"
    assert free.take(1) == [6], "2 .. 9 is the widest now"
    assert free.take(3, after=11) == [12, 13, 14]
    assert free.take(2, after=6) == [7, 8]
    assert free.take(2, after=8) == [9, 2 + 2], "behind 9 another one begins: on in the middle of the widest gap"
    free.give([4, 10, 9])
    assert [*free] == [2, 3, 4, 5, 9, 10, 15, 16, 17] and len(free) == 9
    assert free.take(9) == [2, 3, 4, 5, 15, 16, 17, 9, 10] and len(free) == 0


@settings(max_examples=200, deadline=None)
@given(
    size=st.integers(1, 40),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 8), st.integers(0, 60)), max_size=40),
)
def test_it_is_a_set_of_pages(size: int, steps: list[tuple[bool, int, int]]) -> None:
    free, expected, held = FreePages(2, size + 2), set(range(2, size + 2)), []
    for taking, count, number in steps:
        if taking:
            after = number if number <= size + 2 else None
            pages = free.take(min(count, len(expected)), after)
            assert len(set(pages)) == len(pages) == min(count, len(expected)) and set(pages) <= expected
            if pages and after is not None and after + 1 in expected:
                assert pages[0] == after + 1
            held += pages
            expected -= set(pages)
        else:
            given_back = [held.pop(number % len(held)) for _ in range(min(count, len(held)))]
            free.give(given_back)
            expected |= set(given_back)
        assert [*free] == sorted(expected) and len(free) == len(expected)


def test_many_runs_stay_whole_while_there_is_room() -> None:
    """64 runs that grow in turn, in a pool of twice their size."""
    free = FreePages(2, 2 + 64 * 16)
    runs = [free.take(1) for _ in range(64)]
    for _ in range(7):
        for run in runs:
            run += free.take(1, run[-1])
    assert all(run == [*range(run[0], run[0] + 8)] for run in runs)
