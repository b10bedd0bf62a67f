"""Who came back, after how long, and where it left what it shares: what retention and snapshot places learn from.

Kept apart from the tree, because what was evicted comes back too, and that is what there is to learn:

    request A   |=== shared ===|== own prompt ==|~~ output ~~|      remembered: keys of its last pages
    request B   |=== shared ===|== own pr|  ...                     came back after `pause`, left `distance` pages
                                         fork                       before the end of A's prompt
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from triptych.cache.geometry import LOOKBACK
from triptych.config import PAGE

REACH = 16
"""Pages before the end of a prompt within which a fork counts as coming back to that prompt."""

_MEMORY = 2000.0  # forks after which the weight of older ones halves


@dataclass(slots=True)
class Visit:
    """The last pages of one request: those named `keys` from page `first` on; its prompt ended in page `prompt`.

    `kind` is what it was like, for Chances; it was turn number `turn` of its session.
    """

    time: float
    first: int
    prompt: int
    keys: list[bytes]
    kind: int
    turn: int


@dataclass(frozen=True, slots=True)
class Return:
    """A request continued one that ended `pause` seconds ago. `distance` pages before the end of its prompt they
    part, counted from its last full page; negative: within its output. `at_end`: it was continued whole. `kind` and
    `turn` are those of the request that is continued."""

    pause: float
    distance: int
    at_end: bool
    kind: int
    turn: int


class Visits:
    """The last `limit` requests by the key of their first remembered page."""

    def __init__(self, limit: int = 16384) -> None:
        self._limit = limit
        self._visits: OrderedDict[bytes, Visit] = OrderedDict()

    def left(self, keys: Sequence[bytes], start: int, prompt: int, kind: int, turn: int, now: float) -> None:
        """A request ended whose sealed pages are `keys`; those from page `start` on are its own."""
        first = max(start, prompt - REACH)
        if first >= len(keys):
            return
        anchor = keys[first]
        self._visits.pop(anchor, None)
        self._visits[anchor] = Visit(now, first, prompt, list(keys[first : prompt + REACH]), kind, turn)
        if len(self._visits) > self._limit:
            self._visits.popitem(last=False)

    def came(self, keys: Sequence[bytes], now: float) -> Return | None:
        """A request with these page keys came: which one does it continue?"""
        visits = self._visits
        for at in range(len(keys) - 1, -1, -1):
            visit = visits.get(keys[at])
            if visit is None or visit.first != at:
                continue
            shared = 0
            for mine, theirs in zip(keys[at:], visit.keys, strict=False):
                if mine != theirs:
                    break
                shared += 1
            fork = at + shared
            return Return(now - visit.time, visit.prompt - fork, shared == len(visit.keys), visit.kind, visit.turn)
        return None


KINDS = 6 * 3 * 16

_DOUBT = 40.0  # requests of a kind that count as much as what is usual
_BY_TURN, _BY_TURN_MEAN = (0.30, 0.42, 0.51, 0.60, 0.71, 0.82), 0.38
"""Shares continued after turns 0, 1, 2-3, 4-7, 8-15 and later, and in all: counted in Mooncake's conversation trace."""


def kind_of(turn: int, pages: int, output: int) -> int:
    """The kind of a request of `pages` pages and `output` tokens that was turn number `turn` of its session.

    The turn in powers of two, whether the output was short or long, and of first turns the pages in powers of two.
    """
    answer = (output >= 32) + (output >= 512)
    return (min(turn.bit_length(), 5) * 3 + answer) * 16 + (0 if turn else min(pages.bit_length(), 15))


class Chances:
    """How likely requests of a kind are continued soon: decayed counts, those that come back late counting less.

    A request that continues another as turn n + 1 of a session says that turn n came back. Kinds are told apart because
    they differ much: in chat traffic a third of first turns is continued, and four fifths of tenth ones.
    """

    def __init__(self) -> None:
        self._left = [0.0] * KINDS
        self._back = [0.0] * KINDS
        self._all_left, self._all_back = 10.0, 3.0

    @property
    def mean(self) -> float:
        """The share of all that were continued."""
        return self._all_back / self._all_left

    def left(self, kind: int) -> None:
        """One of a kind ended."""
        self._left[kind] += 1.0
        self._all_left += 1.0
        if self._left[kind] > _MEMORY / 4:
            self._left[kind] /= 2
            self._back[kind] /= 2
        if self._all_left > _MEMORY:
            self._all_left /= 2
            self._all_back /= 2

    def back(self, kind: int, weight: float) -> None:
        """One of a kind was continued."""
        self._back[kind] += weight
        self._all_back += weight

    def of(self, kind: int) -> float:
        """The share that was continued, held near what is usual for the turn until enough is seen."""
        usual = _BY_TURN[kind // 48] / _BY_TURN_MEAN * self.mean
        return (self._back[kind] + _DOUBT * usual) / (self._left[kind] + _DOUBT)


class Forks:
    """Where requests leave the prompt they continue: decayed counts, from which places for snapshots follow."""

    def __init__(self) -> None:
        # before anything is seen: most clients send the output back, some change a little before the prompt's end
        self._before = [1.0, 0.5, 0.5] + [0.1] * (REACH - 1)
        self._after = 6.0
        self._fresh = 0
        self._known: dict[int, dict[int, float]] = {}

    @property
    def total(self) -> float:
        """Weight of all that was seen."""
        return sum(self._before) + self._after

    def add(self, back: Return) -> None:
        """One more."""
        if back.distance < 0:
            self._after += 1.0
        elif back.distance <= REACH:
            self._before[back.distance] += 1.0
        self._fresh += 1
        if self._fresh >= 16:  # the answer changes slowly, and working it out takes longer than a lookup
            self._fresh = 0
            self._known.clear()
        if self.total > _MEMORY:
            self._before = [count / 2 for count in self._before]
            self._after /= 2

    def rungs(self, cost: float) -> dict[int, float]:
        """As `_rungs`, remembered for a while; `cost` is rounded up to pages."""
        step = -(-int(cost) // PAGE)
        if step not in self._known:
            self._known[step] = self._rungs(float(step * PAGE))
        return self._known[step]

    def _rungs(self, cost: float, most: int = 4) -> dict[int, float]:
        """Distances in pages before the prompt's end, each with the tokens that a snapshot there saves on average.

        `cost` = tokens to run where no snapshot is usable. Greedy: each rung is the one that saves most beside
        those already chosen; a fork uses the nearest rung at or before it.
        """
        chosen: dict[int, float] = {}
        now = [cost] * len(self._before)
        total = self.total
        for _ in range(most):
            best, saved, after = -1, 16.0, now
            for rung in range(len(now)):
                if rung in chosen:
                    continue
                then = [min(c, (rung - d) * PAGE + LOOKBACK) if rung >= d else c for d, c in enumerate(now)]
                gain = sum(n * (c - t) for n, c, t in zip(self._before, now, then, strict=True)) / total
                # those who continue the output resume here too if its end has no snapshot
                gain += 0.5 * self._after / total * (cost if not chosen else 0.0)
                if gain > saved:
                    best, saved, after = rung, gain, then
            if best < 0:
                break
            chosen[best] = saved
            now = after
        return chosen

    @property
    def into_output(self) -> float:
        """Share of those who come back that continue the output too."""
        return self._after / self.total

    def end_worth(self, cost: float, output: int) -> float:
        """Tokens that a snapshot at the end of `output` tokens saves on average."""
        return self._after / self.total * min(cost, output)
