"""Time to live and pins: what callers asked for about how long their prefixes stay."""

from __future__ import annotations

import heapq
import itertools

from triptych.cache.holding import Holding
from triptych.cache.memory import Memory
from triptych.cache.prefix import Branch, Node

PIN_LIMIT = 0.5
"""Share of all frames that pins may protect; beyond it a pin is refused and counted, so that work can go on."""


class Leases:
    """Deadlines of pinned chains and of branches with a time to live, soonest first."""

    def __init__(self, memory: Memory) -> None:
        self.refused = 0
        self.broken = 0
        self._memory = memory
        self._serial = itertools.count()
        self._pins: list[tuple[float, int, Node]] = []
        self._ttls: list[tuple[float, int, Node]] = []

    @property
    def pinned(self) -> list[Node]:
        """The tips that are pinned now."""
        return [tip for _, _, tip in self._pins]

    @property
    def pinned_until(self) -> dict[bytes, float]:
        """The latest deadline by the key of the pinned tip."""
        return {tip.key: until for until, _, tip in sorted(self._pins, key=lambda pin: pin[:2])}

    def grant(self, holding: Holding, now: float) -> None:
        """A request ends: pin its chain or start its time to live, as its hints say."""
        tip, hints = holding.chain[-1], holding.hints
        if hints.pin:
            if self._pinned_frames() + len(holding.chain) > PIN_LIMIT * self._memory.frames:
                self.refused += 1
            else:
                self._memory.tree.pin(tip)
                heapq.heappush(self._pins, (now + hints.pin, next(self._serial), tip))
        ttl = holding.branch.ttl
        if ttl is not None:
            heapq.heappush(self._ttls, (now + ttl, next(self._serial), tip))

    def expire(self, now: float) -> bool:
        """End the pins and times to live that are over at `now`. True if a pin ended, so that there is more room."""
        before = len(self._pins)
        while self._pins and self._pins[0][0] <= now:
            self._memory.tree.unpin(heapq.heappop(self._pins)[2], now)
        while self._ttls and self._ttls[0][0] <= now:
            _, _, tip = heapq.heappop(self._ttls)
            branch = tip.branch
            if branch.ttl is None or self._memory.tree.nodes.get(tip.key) is not tip:
                continue
            if branch.used + branch.ttl > now:  # used since: its time starts again
                heapq.heappush(self._ttls, (branch.used + branch.ttl, next(self._serial), tip))
                continue
            self._expire(branch, tip)
        return len(self._pins) < before

    def give_way(self) -> bool:
        """End the pin that would end first, because running requests need the room. False if there is none."""
        if not self._pins:
            return False
        tip = heapq.heappop(self._pins)[2]
        self._memory.tree.unpin(tip, tip.used)
        self.broken += 1
        return True

    def drop_all(self) -> None:
        """Forget all deadlines; what was pinned is not any more."""
        for _, _, tip in self._pins:
            self._memory.tree.unpin(tip, tip.used)
        self._pins, self._ttls = [], []

    def _expire(self, branch: Branch, tip: Node) -> None:
        branch.expired = True
        node: Node | None = tip
        while node is not None and node.branch is branch:
            self._memory.refresh(node)
            node = node.parent

    def _pinned_frames(self) -> int:
        """Upper bound of the frames under pins: chains may share ancestors, which then count twice."""
        return sum(tip.depth for _, _, tip in self._pins)
