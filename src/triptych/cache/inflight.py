"""What running requests are about to have: a waiting one that would compute the same waits until it is there.

    leader, runs      |== in the tree ==|== has run ==|~~~~ still to run ~~~~|~~~~ its own ~~~|
    follower, waits   |== in the tree ==|-------------- the same ------------|---- its own ---|
                                        c             p                      P, whole pages

To resume at P its windows are needed too, and they exist only while the leader passes P. So where the policy allows
it, the leader is asked for a snapshot there: no policy can foresee the place, which depends on who will come. Where
only windows are missing (pages are cached, snapshots are not), who rebuilds them is waited for alike.

Whether to wait. A follower that runs beside its leader gets no more rows of each step than the leader does. So waiting
costs it nothing while the leader has at most twice as much to run up to P as the follower saves by it, and everybody
else gains what is saved.

Nobody waits for ever: a leader runs in every step or gives its place up, and who waits for one that is gone (it ended,
failed, was preempted, or the cache was renewed) goes on at the next plan, or finds itself another. A waiting request
holds no memory; the scheduler keeps what it will need from those who pass it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from triptych.cache.holding import Holding, pages_for
from triptych.cache.resume import ResumePlan, snapshot_is_exact
from triptych.config import PAGE
from triptych.words import TokenIds

if TYPE_CHECKING:
    from triptych.cache.manager import CacheManager

WORTH = 100.0
"""Tokens that a wait has to save at least: nearly a page. Less than a page is never shared."""

PATIENCE = 2.0
"""How much more the leader may have to run than the follower saves; see above."""


@dataclass(frozen=True, slots=True)
class Hold:
    """A waiting request goes on when the request `leader`, which has `holding`, has run the tokens up to `until`.

    `frames`: what it will need then beside what it shares. `start`: where it would have begun now.
    """

    leader: str
    holding: Holding
    until: int
    frames: int
    start: int


class Known(NamedTuple):
    """What is cached of a prompt of `length` tokens: pages up to `chain`, and the last boundary with a snapshot."""

    length: int
    chain: int
    snapshot: int


class InFlight:
    """Who waits for whom, among the requests of one manager."""

    def __init__(self, manager: CacheManager) -> None:
        self._manager = manager
        self._holds: dict[str, Hold] = {}
        self._starts: dict[str, int] = {}  # where those who were held would have begun

    def held(self, request_id: str) -> Hold | None:
        """What a request waits for, if that is still to come."""
        hold = self._holds.get(request_id)
        return hold if hold is not None and self._lasts(hold) else None

    def hold(self, request_id: str, tokens: TokenIds, salt: str) -> Hold | None:
        """What a waiting request has to wait for; None if it need not, or not any more."""
        hold = self.held(request_id) or self._choose(request_id, tokens, salt)
        if hold is None:
            self._holds.pop(request_id, None)
            return None
        self._holds[request_id] = hold
        if self._manager.free_slots and request_id not in self._starts:  # or it would have to wait anyway
            self._starts[request_id] = hold.start
            self._manager.counters.requests_held += 1
        return hold

    def admitted(self, request_id: str, plan: ResumePlan) -> None:
        """A request was admitted: count what it saved by waiting."""
        start = self._starts.get(request_id)
        if start is not None:
            self._manager.counters.held_tokens_saved += max(0, plan.start - start)
        self.forget(request_id)

    def forget(self, request_id: str) -> None:
        """A request waits no more."""
        self._holds.pop(request_id, None)
        self._starts.pop(request_id, None)

    def _lasts(self, hold: Hold) -> bool:
        manager, holding = self._manager, hold.holding
        runs = manager.holdings.get(hold.leader) is holding and holding.epoch == manager.epoch
        return runs and holding.processed < hold.until

    def _leaders(self) -> Iterator[tuple[str, Holding]]:
        """Requests with whole pages still to run, that others will find."""
        for name, holding in self._manager.holdings.items():
            if holding.epoch == self._manager.epoch and holding.processed < len(holding.keys) * PAGE:
                yield name, holding

    def _choose(self, request_id: str, tokens: TokenIds, salt: str) -> Hold | None:
        """The leader by whom a waiting request saves most, which is asked for a snapshot if need be."""
        leaders = list(self._leaders())
        if not leaders or len(tokens) < PAGE:
            return None
        manager = self._manager
        keys = manager.names.of(request_id, manager.root(salt), tokens)
        if manager.tainted(keys):
            return None
        known = self._known(len(tokens), keys)
        now = manager.planner.cheapest(*known)
        best, most, place = None, WORTH * manager.rates.token, 0
        for name, leader in leaders:
            parting = _shared(keys, leader.keys) * PAGE
            if parting <= known.snapshot:
                continue
            snapshot = self._snapshot(leader, parting, known.snapshot)
            until = snapshot or parting
            chain = max(known.chain, until)
            then = manager.planner.cheapest(known.length, chain, max(known.snapshot, snapshot))
            saved = now.seconds - then.seconds
            if saved >= most and self._seconds(leader, until) <= PATIENCE * saved:
                frames = max(0, pages_for(known.length) + 1 - chain // PAGE)
                best, most, place = Hold(name, leader, until, frames, now.start), saved, snapshot
        if best is not None and place:
            best.holding.places.setdefault(place, float(place - known.snapshot))
        return best

    def _known(self, length: int, keys: list[bytes]) -> Known:
        """Found by bisection and a look back no further than a rebuilt window is dear: this is asked in each step."""
        manager = self._manager
        nodes = manager.memory.tree.nodes
        pages = bisect_left(range(len(keys)), True, key=lambda index: keys[index] not in nodes)
        reach = pages_for(int(manager.planner.rebuild_tokens(pages * PAGE)))
        for depth in range(pages, max(0, pages - reach - 1), -1):
            if nodes[keys[depth - 1]].snapshot is not None:
                return Known(length, pages * PAGE, depth * PAGE)
        return Known(length, pages * PAGE, 0)

    def _snapshot(self, leader: Holding, parting: int, known: int) -> int:
        """The last boundary in (known, parting] at which `leader` writes a snapshot, or can be asked to; 0 if none."""
        manager = self._manager
        planned = max(leader.processed, leader.planned)
        coming = [write.position for write in leader.reserved]
        coming += [at for at in leader.places if at > planned]
        if parting > planned and manager.places.on_demand and manager.memory.snapshot_frames <= manager.unpromised():
            coming.append(parting)
        exact = leader.plan.exact_from
        return max((at for at in coming if known < at <= parting and snapshot_is_exact(at, exact)), default=0)

    def _seconds(self, leader: Holding, until: int) -> float:
        """What `leader` needs up to `until`; rows that only rebuild windows run in half of the layers on average."""
        rates, begin = self._manager.rates, leader.processed
        again = max(begin, min(until, leader.plan.replay_to))
        return rates.prefill_seconds(begin, again) / 2 + rates.prefill_seconds(again, until)


def _shared(one: list[bytes], other: list[bytes]) -> int:
    """Pages that two prompts have in common: each key names all pages up to its own."""
    return bisect_left(range(min(len(one), len(other))), True, key=lambda index: one[index] != other[index])
