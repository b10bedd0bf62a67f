"""What to give up first, behind a Protocol of three methods; where snapshots are put is in places.py.

Ranks are asked when an object loses its last user, and must order objects that were ranked at different times: an
exponentially decaying value v * exp(-(t - t0) / T) has the rank t0 + T log v, a time.
"""

from __future__ import annotations

import math
from typing import Protocol

from triptych.cache.history import Chances, Return
from triptych.cache.prefix import Branch, Node, Snapshot
from triptych.config import PAGE
from triptych.errors import ConfigError, nearest


class RetentionPolicy(Protocol):
    """In which order pages and snapshots are given up; both kinds stand in one queue."""

    def ended(self, branch: Branch, kind: int) -> None:
        """The request that made `branch` has ended; it was of this kind (history.py). May set the branch's chance."""

    def came_back(self, back: Return) -> None:
        """A request continues one that ended, whether or not that is still cached."""

    def rank(self, item: Node | Snapshot, now: float) -> float:
        """Rank of a leaf without pins or of a snapshot that nobody restores, asked at `now`. The lowest goes first."""


class Lru:
    """Least recently used first, whatever it is."""

    def ended(self, branch: Branch, kind: int) -> None:
        """Nothing to learn."""

    def came_back(self, back: Return) -> None:
        """Nothing to learn."""

    def rank(self, item: Node | Snapshot, now: float) -> float:
        """The time of the last use; a snapshot is used with its page."""
        return item.used if isinstance(item, Node) else max(item.used, item.node.used)


class Value:
    """Value = P(reuse) x time saved / bytes, learned from who came back.

    P(reuse) falls with the time since the last use, as exp(-age / decay), so the order of values is that of
    used + decay * log(chance * saved per frame). `chance` is that of the kind of request relative to the mean
    (history.py), for the prompt's pages and the output's apart. A page saves its 128 tokens; a snapshot of k frames
    saves `worth`. What is restored again and again, like a system prompt, has a chance of its own: decay over the mean
    gap. The logarithm goes in steps: what differs by less than is known of it goes in the order of use.
    """

    def __init__(self) -> None:
        self._pauses = Pauses()
        self._chances = Chances()

    def ended(self, branch: Branch, kind: int) -> None:
        """Its chance is that of its kind."""
        self._chances.left(kind)
        branch.chance = self._chances.of(kind) / self._chances.mean

    def came_back(self, back: Return) -> None:
        """Its kind came back; late comers count less, because keeping anything that long is dear."""
        self._pauses.add(back.pause)
        self._chances.back(back.kind, math.exp(-back.pause / self._pauses.decay))

    def rank(self, item: Node | Snapshot, now: float) -> float:
        """The last use, moved by the value of a byte."""
        node = item if isinstance(item, Node) else item.node
        branch, snapshot, decay = node.branch, node.snapshot, self._pauses.decay
        chance = branch.chance if node.end <= branch.prompt else branch.output_chance
        if snapshot is not None and snapshot.uses > 1:
            chance = max(chance, decay / (snapshot.gap + 1.0))
        if isinstance(item, Node):
            # not more for its snapshot's sake: a branch is used whole, so its pieces should go together
            return item.used + decay * _in_steps(chance)
        # its own use, not its page's: that others went past it does not make it worth more
        return item.used + decay * _in_steps(chance * item.worth / (len(item.frames) * PAGE))


_STEP = 0.5


def _in_steps(value: float) -> float:
    """The logarithm of `value`, to the nearest of some steps."""
    return _STEP * round(math.log(max(value, 1e-9)) / _STEP)


class Pauses:
    """How long branches rest before they are used again: a histogram that forgets. Seconds, in steps of a quarter."""

    def __init__(self, lowest: float = 0.1, steps: int = 64, memory: float = 2000.0) -> None:
        self._lowest, self._memory = lowest, memory
        self._counts = [0.0] * steps
        self._total = 0.0
        self._fresh = 0
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
        """The decay is the mean of what is left after the median pause."""
        seen, late, late_sum, median = 0.0, 0.0, 0.0, None
        for step, count in enumerate(self._counts):
            end = self._lowest * 1.25**step
            seen += count
            if median is not None:
                late, late_sum = late + count, late_sum + count * (end - median)
            elif seen >= self._total / 2:
                median = end
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

    def ended(self, branch: Branch, kind: int) -> None:
        """Nothing to learn: all is known."""

    def came_back(self, back: Return) -> None:
        """Nothing to learn."""

    def rank(self, item: Node | Snapshot, now: float) -> float:
        """Sooner is higher; a snapshot counts like its page."""
        node = item if isinstance(item, Node) else item.node
        return -self._future.next_use(node.key, now)


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
