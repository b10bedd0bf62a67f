"""Snapshots: which are free, being written, published at a boundary, or held for a restore.

free -> reserved (being written, nobody sees it) -> published on a node -> free
                                                    held: restored in a coming step, may not go
"""

from __future__ import annotations

from collections.abc import Callable

from triptych.cache.eviction import EvictionQueue
from triptych.cache.prefix import Node


class SnapshotStore:
    """Ids 0 .. capacity-1 and what they hold. `rank` orders published ones, the lowest goes first."""

    def __init__(self, capacity: int, rank: Callable[[Node], float]) -> None:
        self.capacity = capacity
        self.free = list(range(capacity - 1, -1, -1))
        self.reserved: set[int] = set()
        self.published: dict[int, Node] = {}
        self.holds: dict[int, int] = {}
        self.queue: EvictionQueue[Node] = EvictionQueue()
        self.evictions = 0
        self._rank = rank

    def reserve(self) -> int | None:
        """An id to write into, taken from the lowest ranked boundary if none is free; None if all are in use."""
        if self.free:
            snapshot = self.free.pop()
        elif self.queue:
            node = self.queue.pop()
            snapshot = node.snapshot
            del self.published[snapshot]
            node.snapshot = -1
            self.evictions += 1
        else:
            return None
        self.reserved.add(snapshot)
        return snapshot

    def cancel(self, snapshot: int) -> None:
        """Give a reserved id back unwritten."""
        self.reserved.remove(snapshot)
        self.free.append(snapshot)

    def publish(self, snapshot: int, node: Node, tick: int) -> bool:
        """Make the written id the snapshot of `node`; False, and the id is free, if the node has one already."""
        if node.snapshot >= 0:
            self.cancel(snapshot)
            return False
        self.reserved.remove(snapshot)
        self.published[snapshot] = node
        node.snapshot = snapshot
        node.snapshot_used = tick
        self.queue.put(node, self._rank(node))
        return True

    def hold(self, node: Node) -> None:
        """Keep the snapshot of `node` until `unhold`."""
        self.holds[node.snapshot] = self.holds.get(node.snapshot, 0) + 1
        self.queue.discard(node)

    def unhold(self, node: Node, tick: int) -> None:
        """Undo one `hold`."""
        left = self.holds[node.snapshot] - 1
        if left:
            self.holds[node.snapshot] = left
            return
        del self.holds[node.snapshot]
        node.snapshot_used = tick
        self.queue.put(node, self._rank(node))

    def drop(self, node: Node) -> None:
        """Free the snapshot of a node that leaves the tree."""
        if node.snapshot >= 0:
            self.queue.discard(node)
            del self.published[node.snapshot]
            self.free.append(node.snapshot)
            node.snapshot = -1
