"""What to keep and what to give up, behind a Protocol of three methods.

Ranks are asked when an object loses its last user; the lowest rank goes first. A rank must not depend on
when it is asked, only on the last use: an exponentially decaying value v * exp(-(t - t0) / T) fits as
log v + t0 / T, because all ranks of one kind sink together.
"""

from __future__ import annotations

from typing import Protocol

from triptych.cache.prefix import Node
from triptych.config import PAGE


class RetentionPolicy(Protocol):
    """Which boundaries get a snapshot, and in which order pages and snapshots are given up."""

    def places(self, length: int, matched: int) -> tuple[int, ...]:
        """Boundaries to snapshot while `length` tokens are prefilled whose cached chain ends at `matched`.

        Best first: when snapshots are few, only the first ones are taken.
        """

    def page_rank(self, node: Node) -> float:
        """Rank of the page of `node`; a parent is never ranked below its children, see PrefixTree."""

    def snapshot_rank(self, node: Node) -> float:
        """Rank of the snapshot of `node`."""


class Lru:
    """Least recently used first; snapshots on a ladder counted back from the end of the prompt.

    Prompts that share a long document and differ in the question fork shortly before the end, so rungs are
    dense there: the last full boundary, and 1, 2, 4, 8, ... pages before it. The boundary where this prompt
    left the cached chain is a junction that others will leave from too.
    """

    def places(self, length: int, matched: int) -> tuple[int, ...]:
        """The last full boundary, the junction, then the rungs of the ladder from near to far."""
        last = length // PAGE * PAGE
        rungs = [last, matched]
        step = PAGE
        while step < last:
            rungs.append(last - step)
            step *= 2
        return tuple(dict.fromkeys(rung for rung in rungs if rung > 0))

    def page_rank(self, node: Node) -> float:
        """The time of the last use."""
        return node.used

    def snapshot_rank(self, node: Node) -> float:
        """The time at which it was written or last restored."""
        return node.snapshot_used
