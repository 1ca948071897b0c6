"""Pages that nobody holds, handed out so that a sequence's pages come to lie side by side.

A row whose pages are one unbroken run is attended to where it lies; others are copied together first (see
`looplm.engine.paged_pass`). Nothing is reserved: a run that grows takes the page behind its last one if that is free,
and a new one starts in the middle of the widest gap, so that all have room to grow for as long as there is any.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush


class FreePages:
    """The free ones of the pages `first` .. `stop` - 1, as gaps between those that are taken."""

    def __init__(self, first: int, stop: int) -> None:
        self._starts, self._stops = [first], [stop]  # of each gap, ascending; no two touch
        self._count = stop - first
        self._widths = [(first - stop, first)]  # a heap: minus the width, and the start; some gaps are no more

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        for start, stop in zip(self._starts, self._stops, strict=True):
            yield from range(start, stop)

    def take(self, count: int, after: int | None = None) -> list[int]:
        """`count` pages, ascending from `after` + 1 for as long as those are free; there must be as many."""
        pages: list[int] = []
        page = None if after is None else after + 1
        while len(pages) < count:
            gap = None if page is None else self._gap_of(page)
            if gap is None or page is None:
                gap, page = self._widest(count - len(pages))
            end = min(self._stops[gap], page + count - len(pages))
            self._cut(gap, page, end)
            pages += range(page, end)
            page = end
        return pages

    def give(self, pages: Iterable[int]) -> None:
        """Pages are free again."""
        for page in pages:
            gap = bisect_right(self._starts, page)
            if gap and self._stops[gap - 1] == page:
                self._stops[gap - 1] += 1
            else:
                self._starts.insert(gap, page)
                self._stops.insert(gap, page + 1)
                gap += 1
            if gap < len(self._starts) and self._starts[gap] == page + 1:
                del self._starts[gap], self._stops[gap - 1]
            self._count += 1
            self._note(gap - 1)

    def _gap_of(self, page: int) -> int | None:
        gap = bisect_right(self._starts, page) - 1
        return gap if gap >= 0 and page < self._stops[gap] else None

    def _widest(self, count: int) -> tuple[int, int]:
        """The widest gap, and where `count` pages are to start in it."""
        while True:
            width, start = self._widths[0]
            gap = bisect_left(self._starts, start)
            if gap < len(self._starts) and (self._starts[gap], self._stops[gap]) == (start, start - width):
                break
            heappop(self._widths)
        stop = self._stops[gap]
        middle = (start + stop) // 2
        return gap, middle if stop - middle >= count else max(start, stop - count)

    def _cut(self, gap: int, start: int, end: int) -> None:
        """Take `start` .. `end` - 1 out of a gap."""
        parts = [(self._starts[gap], start), (end, self._stops[gap])]
        parts = [(first, stop) for first, stop in parts if first < stop]
        self._starts[gap : gap + 1] = [first for first, _ in parts]
        self._stops[gap : gap + 1] = [stop for _, stop in parts]
        self._count -= end - start
        for part in range(gap, gap + len(parts)):
            self._note(part)

    def _note(self, gap: int) -> None:
        """A gap is new or another one."""
        if len(self._widths) > 64 + 4 * len(self._starts):  # most are no more
            self._widths = [(first - stop, first) for first, stop in zip(self._starts, self._stops, strict=True)]
            heapify(self._widths)
        heappush(self._widths, (self._starts[gap] - self._stops[gap], self._starts[gap]))
