"""Priority queues that forget cheaply: what to give up next, in O(log n)."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class EvictionQueue(Generic[T]):
    """Items by rank: `put`, `discard` and `pop` cost O(log n), amortised. Equal ranks leave in order of arrival."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._live: dict[T, int] = {}
        self._serial = 0

    def put(self, item: T, rank: float) -> None:
        """Add `item`, or give it a new rank."""
        self._serial += 1
        self._live[item] = self._serial
        heapq.heappush(self._heap, (rank, self._serial, item))
        if len(self._heap) > 2 * len(self._live) + 64:
            # discarded entries stay in the heap until they surface; drop them before they outnumber the rest
            self._heap = [entry for entry in self._heap if self._live.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)

    def discard(self, item: T) -> None:
        """Take `item` out if it is in."""
        self._live.pop(item, None)

    def pop(self) -> T:
        """Take out the item of lowest rank; IndexError if there is none."""
        item = self.peek()[1]
        heapq.heappop(self._heap)
        del self._live[item]
        return item

    def peek(self) -> tuple[float, T]:
        """The lowest rank and its item, left in place; IndexError if there is none."""
        while True:
            rank, serial, item = self._heap[0]
            if self._live.get(item) == serial:
                return rank, item
            heapq.heappop(self._heap)

    def __contains__(self, item: T) -> bool:
        return item in self._live

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[T]:
        return iter(self._live)
