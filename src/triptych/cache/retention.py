"""What to give up first, behind a Protocol of three methods; where snapshots are put is in places.py.

Ranks are asked when an object loses its last user; memory.py shows how they are used. A rank is a time and must not
depend on when it is asked: an exponentially decaying value v * exp(-(t - t0) / T) fits as t0 + T log v.
"""

from __future__ import annotations

import math
from typing import Protocol

from triptych.cache.prefix import Node, Snapshot
from triptych.config import PAGE
from triptych.errors import ConfigError, nearest


class RetentionPolicy(Protocol):
    """In which order pages and snapshots are given up; both kinds stand in one queue."""

    def observe(self, pause: float) -> float:
        """A request came that continues one that ended `pause` seconds ago, whether or not that is still cached.

        Returns from 0 to 1 how much of it a cache could have served: long pauses count little.
        """

    def rank(self, item: Node | Snapshot, now: float) -> float:
        """Rank, a time, of a leaf without pins or of a snapshot that nobody restores; asked at `now`."""

    def patience(self, now: float) -> float:
        """While the lowest rank is less than this many seconds ago, the newest goes instead of it."""


class Lru:
    """Least recently used first, whatever it is."""

    def observe(self, pause: float) -> float:
        """Nothing to learn."""
        return 1.0

    def rank(self, item: Node | Snapshot, now: float) -> float:
        """The time of the last use; a snapshot is used with its page."""
        return item.used if isinstance(item, Node) else max(item.used, item.node.used)

    def patience(self, now: float) -> float:
        """None: always the oldest."""
        return 0.0


class Value:
    """Value = P(reuse) x time saved / bytes, learned from who came back.

    P(reuse) falls with the time since the last use, as exp(-age / decay), so the order of values is that of
    used + decay * log(chance * saved per frame). `chance` is that of the kind of request relative to the mean
    (history.py), for the prompt's pages and the output's apart. A page saves its 128 tokens; a snapshot of k frames
    saves `worth`.
    What is restored again and again, like a system prompt, has a chance of its own: decay over the mean gap.

    Patience. The pauses after which branches were used again are counted; F(T) is the share within T. An object kept
    for T earns F(T) and costs T, so the best T maximises F(T) / T: where the line from the origin touches F.
    """

    def __init__(self) -> None:
        self._pauses = Pauses()

    def observe(self, pause: float) -> float:
        """Count the pause."""
        self._pauses.add(pause)
        return math.exp(-pause / self._pauses.decay)

    def rank(self, item: Node | Snapshot, now: float) -> float:
        """The last use, moved by the value of a byte."""
        node = item if isinstance(item, Node) else item.node
        branch, snapshot, decay = node.branch, node.snapshot, self._pauses.decay
        chance = branch.chance if node.end <= branch.prompt else branch.output_chance
        if snapshot is not None and snapshot.uses > 1:
            chance = max(chance, decay / (snapshot.gap + 1.0))
        if isinstance(item, Node):
            # not more for its snapshot's sake: a branch is used whole, so its pieces should go together
            return item.used + decay * math.log(max(chance, 1e-9))
        per_frame = chance * item.worth / (len(item.frames) * PAGE)
        return max(item.used, node.used) + decay * math.log(max(per_frame, 1e-9))

    def patience(self, now: float) -> float:
        """The pause worth waiting for."""
        return self._pauses.best


class Pauses:
    """How long branches rest before they are used again: a histogram that forgets. Seconds, in steps of a quarter."""

    def __init__(self, lowest: float = 0.1, steps: int = 64, memory: float = 2000.0) -> None:
        self._lowest, self._memory = lowest, memory
        self._counts = [0.0] * steps
        self._total = 0.0
        self._fresh = 0
        self.best = 0.0
        self.decay = 300.0

    def add(self, pause: float) -> None:
        """One more pause; the weight of the older ones falls."""
        step = 0 if pause <= self._lowest else int(math.log(pause / self._lowest, 1.25)) + 1
        self._counts[min(step, len(self._counts) - 1)] += 1.0
        self._total += 1.0
        self._fresh += 1
        if self._total > self._memory:
            self._counts = [count / 2 for count in self._counts]
            self._total /= 2
        if self._fresh >= 16:
            self._fresh = 0
            self._learn()

    def _learn(self) -> None:
        """Patience maximises F(T) / T. The decay is the mean of what is left after the median pause."""
        seen, best, score, late, late_sum, median = 0.0, 0.0, 0.0, 0.0, 0.0, None
        for step, count in enumerate(self._counts):
            end = self._lowest * 1.25**step
            seen += count
            if seen / end > score and seen > self._total / 10:
                best, score = end, seen / end
            if median is not None:
                late, late_sum = late + count, late_sum + count * (end - median)
            elif seen >= self._total / 2:
                median = end
        self.best = best if self._total >= 32 else 0.0
        if late >= 16:
            self.decay = max(1.0, late_sum / late)


class NextUse(Protocol):
    """Knows the future, because it is a trace."""

    def next_use(self, key: bytes, now: float) -> float:
        """The time at which the page named `key` is asked for next after `now`; infinity if never."""


class Belady:
    """Furthest next use first: a bound for comparison, only where the future is known."""

    def __init__(self, future: NextUse) -> None:
        self._future = future

    def observe(self, pause: float) -> float:
        """Nothing to learn: all is known."""
        return 1.0

    def rank(self, item: Node | Snapshot, now: float) -> float:
        """Sooner is higher; a snapshot counts like its page."""
        node = item if isinstance(item, Node) else item.node
        return -self._future.next_use(node.key, now)

    def patience(self, now: float) -> float:
        """None: ranks are no ages."""
        return -math.inf


NAMES = ("lru", "value", "belady")


def retention_named(name: str, future: NextUse | None = None) -> RetentionPolicy:
    """The policy called `name`; belady needs the `future`. ConfigError for an unknown name."""
    if name == "lru":
        return Lru()
    if name == "value":
        return Value()
    if name == "belady":
        if future is None:
            raise ConfigError("belady needs to know the future.", "It bounds other policies in `triptych replay` only.")
        return Belady(future)
    raise ConfigError(f"Unknown retention policy {name!r}.", nearest(name, NAMES))
