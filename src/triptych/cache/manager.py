"""The cache manager: the one door to pages, window slots, snapshots and the prefix tree.

The life of a page and of a request's page table (n tokens known, p processed, s = sealed pages):

    free -> held by one request (being filled) -> sealed, in the tree -> no pins: evictable -> free (or a lower tier)

    0                     128 s            p            128 len(table)
    |  sealed, in the tree  |  held, filled  |  held, empty  |

Order of calls for one request: (held, ready while it waits) admit, then per step grow, snapshot_writes, (the step
runs) advance; at its end boundary_snapshot, publish_snapshot, release. Nothing here is a tensor.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from itertools import islice

import numpy as np

from triptych.cache.geometry import CacheCapacity, CacheGeometry
from triptych.cache.history import REACH, Forks, Visits, kind_of
from triptych.cache.holding import NOTHING, Holding, PageTable, Room, pages_for
from triptych.cache.inflight import Hold, InFlight
from triptych.cache.integrity import check
from triptych.cache.jobs import Done, Jobs
from triptych.cache.leases import Leases
from triptych.cache.memory import Memory
from triptych.cache.places import Prompt
from triptych.cache.policies import Below, Policies
from triptych.cache.prefetch import Prefetcher
from triptych.cache.prefix import Branch, Names, Node, Snapshot, Tenant, page_keys, root_key
from triptych.cache.resume import Planner, ResumePlan, snapshot_is_exact
from triptych.cache.sessions import Sessions
from triptych.cache.stats import CacheStats, Counters, collect
from triptych.cache.tiers import Tiers
from triptych.config import PAGE
from triptych.words import NO_HINTS, CacheHints, SlotSave, SnapshotWrite, TokenIds

logger = logging.getLogger(__name__)

NOTHING_BELOW = Below()

UNSHARED = -1
"""The epoch of a request whose pages nobody may find: part of its prompt is not trusted."""

OUTLIVED = 0.25
"""What remains of the worth of a session's older snapshots once the session has continued from them."""


class CacheManager:
    """All cache memory of one engine, as ids. `layers` is the depth that a replay has to rebuild.

    `namespace` separates what must never be mixed: weights fingerprint and cache formats. `clock` gives seconds.
    """

    def __init__(
        self,
        geometry: CacheGeometry,
        capacity: CacheCapacity,
        layers: int,
        *,
        policies: Policies | None = None,
        below: Below = NOTHING_BELOW,
        namespace: bytes = b"",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        policies = policies or Policies()
        self.geometry = geometry
        self.capacity = capacity
        self.prefix_cache = policies.prefix_cache
        self._ttl = policies.ttl
        self.places = policies.places
        self.retention = policies.retention
        self.rates = policies.rates
        self.clock = clock
        self.memory = Memory(
            capacity.frames, geometry.snapshot_frames, self.retention, clock, policies.quota, policies.shares
        )
        self.planner = Planner(layers, self.rates, self.places.replay)
        self.leases = Leases(self.memory)
        self.tiers = Tiers(self.memory, geometry, self.rates, below)
        self.prefetcher = Prefetcher(self)
        self.inflight = InFlight(self)
        self.names = Names()
        self.holdings: dict[str, Holding] = {}
        self.distrusted: set[bytes] = set()
        self.free_slots = list(range(capacity.slots - 1, -1, -1))
        self.counters = Counters()
        self.visits = Visits()
        self.forks = Forks()
        self.sessions = Sessions()
        self._namespace = namespace
        self._tenants: dict[str, Tenant] = {}
        self.epoch = self._distrusts = 0
        self._changes = 0
        self._refused: tuple[str, Room, int] | None = None

    # ---- before admission

    def held(self, request_id: str, tokens: TokenIds, salt: str) -> Hold | None:
        """What a waiting request should wait for because a running one computes it; None if it should go on."""
        if not self.prefix_cache or self.prefetcher.fetching(request_id):
            return None
        return self.inflight.hold(request_id, tokens, salt)

    def ready(self, request_id: str, tokens: TokenIds, salt: str) -> bool:
        """Bring up from lower tiers what a waiting request can use. False while that is under way."""
        return not self.prefix_cache or self.prefetcher.ready(request_id, tokens, salt, self._changes)

    def withdraw(self, request_id: str) -> None:
        """A waiting request will not be admitted."""
        self._dequeue(request_id)
        self._changes += 1

    def _dequeue(self, request_id: str) -> None:
        for memory in (self.prefetcher, self.inflight, self.names):
            memory.forget(request_id)

    def due(self) -> Jobs:
        """Copies to carry out before the next step, asked once after each planning."""
        return self.tiers.due()

    def end(self, done: Done) -> None:
        """A background copy has ended."""
        self.prefetcher.end(done)
        self._changes += 1

    # ---- admission

    def admit(
        self,
        request_id: str,
        tokens: TokenIds,
        salt: str,
        limit: int,
        hints: CacheHints = NO_HINTS,
        keep: Room = NOTHING,
        whole: bool = False,
    ) -> ResumePlan | None:
        """Reserve a slot for `tokens`, pin what is cached of them and say how to continue.

        `limit` is the most tokens this request may ever have. None when no slot is free, or when the pages of the
        uncached tokens (and one more to decode into) do not fit in what is neither held nor promised; `keep` included.
        `whole`: all rows have to run; cached pages only spare the memory and the writing.
        """
        assert request_id not in self.holdings, request_id
        assert len(tokens) <= limit <= self.capacity.tokens, (len(tokens), limit, self.capacity.tokens)
        now = self.clock()
        self._changes += self.leases.expire(now)
        if len(self.free_slots) <= keep.slots or (request_id, keep, self._changes) == self._refused:
            return None
        root = self.root(salt)
        keys = self.names.of(request_id, root, tokens) if self.prefix_cache else []
        tainted = self.tainted(keys)
        chain = self.memory.tree.match([] if tainted else keys)
        if chain:
            self.memory.tree.pin(chain[-1])
        goal = min(pages_for(len(tokens)) + 1, pages_for(limit))
        room = self._room_beyond(goal - len(chain) + keep.frames)
        if room < 0:
            if chain:
                self.memory.tree.unpin(chain[-1], chain[-1].used)
            self._refused = (request_id, keep, self._changes)  # matching a long prompt in each step would be dear
            return None
        plan, source = self._plan(len(tokens), chain, room, whole)
        table = np.empty(pages_for(limit), np.int32)
        table[: len(chain)] = [node.page for node in chain]
        self.holdings[request_id] = Holding(
            slot=self.free_slots.pop(),
            root=root,
            epoch=UNSHARED if tainted else self.epoch,
            plan=plan,
            goal=goal,
            places=self._places(plan, source, hints.marks),
            keys=keys,
            table=table,
            chain=chain,
            branch=self._branch(salt, chain, keys, hints, now),
            hints=hints,
            count=len(chain),
            processed=plan.start,
            restoring=source,
        )
        self.inflight.admitted(request_id, plan)
        self._dequeue(request_id)
        self.counters.admitted(plan)
        if plan.write_from:
            logger.debug("%s resumes: %s", request_id, plan)
        return plan

    def tainted(self, keys: list[bytes]) -> bool:
        """Whether some page of a prompt is not trusted, so that it neither uses what is cached nor adds to it."""
        return bool(self.distrusted) and not self.distrusted.isdisjoint(keys)

    def root(self, salt: str) -> bytes:
        """The parent key of the first pages of a tenant."""
        return root_key(b"%d:%b" % (self._distrusts, self._namespace), salt)

    def tenant(self, salt: str) -> Tenant:
        """The tenant with this salt."""
        return self._tenants.setdefault(salt, Tenant(salt))

    def _plan(self, length: int, chain: list[Node], room: int, whole: bool) -> tuple[ResumePlan, Snapshot | None]:
        """The cheapest plan, and the snapshot that it restores and holds, if holding that one leaves `room`."""
        if whole:
            return self.planner.whole(length, len(chain) * PAGE), None
        source = next((node.snapshot for node in reversed(chain) if node.snapshot is not None), None)
        if source is not None and not source.holds and self.memory.snapshot_frames > room:
            source = None
        plan = self.planner.cheapest(length, len(chain) * PAGE, source.node.end if source else 0)
        tiers = self.tiers.found(chain, plan.start)
        if plan.kind != "snapshot" or source is None:
            return plan.after(None, tiers), None
        self.memory.hold(source)
        return plan.after(source.frames, tiers), source

    def _places(self, plan: ResumePlan, source: Snapshot | None, marks: tuple[int, ...]) -> dict[int, float]:
        """Boundaries to snapshot during this prefill: no prompt takes more than a quarter of all frames."""
        if not self.prefix_cache:
            return {}
        resumed = source.node.end if source is not None else 0
        prompt = Prompt(plan.length, plan.write_from, resumed, marks, self.planner.rebuild_tokens(plan.length))
        most = max(1, self.capacity.frames // (4 * self.memory.snapshot_frames))
        return dict(islice(self.places.places(prompt, self.forks).items(), most))

    def _branch(self, salt: str, chain: list[Node], keys: list[bytes], hints: CacheHints, now: float) -> Branch:
        """The branch that this request will add, and what its coming says about the one that it continues."""
        back = self.visits.came(keys, now)
        if back is not None:
            self.forks.add(back)
            self.retention.came_back(back)
            for node in chain[-REACH:]:  # the session has moved on
                if node.snapshot is not None and node.snapshot.uses < 2:
                    node.snapshot.worth *= OUTLIVED
        found = chain[-1].branch if chain else None
        if found is not None:
            found.used = now
            found.expired = False
        return Branch(
            tenant=self.tenant(salt),
            turn=back.turn + 1 if back else 0,
            created=now,
            start=len(chain) * PAGE,
            prompt=len(keys) * PAGE,
            session=hints.session,
            ttl=self._ttl if hints.ttl is None else hints.ttl,
            used=now,
        )

    def _room_beyond(self, frames: int) -> int:
        """Unpromised frames after `frames` are taken; below 0 if they do not suffice.

        What was brought up for those behind gives way to who is first; pins do so when nobody runs who would make
        room by ending.
        """
        while (room := self.unpromised() - frames) < 0:
            if not self.prefetcher.give_way() and (self.holdings or not self.leases.give_way()):
                break
            self._changes += 1
        return room

    def unpromised(self) -> int:
        """Frames that are free or can be freed and that no admitted request still counts on."""
        promised = sum(holding.promised for holding in self.holdings.values())
        return len(self.memory.free) + self.memory.evictable - promised

    # ---- before a step

    def slot(self, request_id: str) -> int:
        """The window slot of an admitted request."""
        return self.holdings[request_id].slot

    def grow(self, request_id: str, upto: int) -> bool:
        """Make pages cover [0, upto), evicting by the policy; False, and nothing changed, if that is impossible."""
        holding = self.holdings[request_id]
        missing = pages_for(upto) - holding.count
        if missing <= 0:
            return True
        if not self._room_for(missing):
            return False
        holding.table[holding.count : holding.count + missing] = self.memory.take(missing, holding.branch.tenant)
        holding.count += missing
        return True

    def _room_for(self, frames: int) -> bool:
        """Whether `frames` can be had, if need be from what is only kept for later: prefetched pages, then pins."""
        memory = self.memory
        while frames > len(memory.free) + memory.evictable:
            if not self.prefetcher.give_way() and not self.leases.give_way():
                return False
            self._changes += 1
        return True

    @property
    def copying(self) -> bool:
        """True while copies under way hold frames that will be free, or evictable, when they have ended."""
        return bool(self.tiers.fetching or self.tiers.saving)

    def page_table(self, request_id: str) -> PageTable:
        """The pages of a request so far, int32, read-only; `pages[i]` holds tokens [128 i, 128 (i + 1))."""
        holding = self.holdings[request_id]
        view = holding.table[: holding.count]
        view.flags.writeable = False
        return view

    def snapshot_writes(self, request_id: str, start: int, end: int) -> tuple[SnapshotWrite, ...]:
        """Reserve snapshots for the boundaries in (start, end] that the policy wants and that have none."""
        holding = self.holdings[request_id]
        holding.planned = end
        writes = []
        for boundary in range((start // PAGE + 1) * PAGE, end + 1, PAGE):
            if boundary in holding.places:
                write = self._reserve(holding, boundary)
                if write is not None:
                    writes.append(write)
        return tuple(writes)

    def _reserve(self, holding: Holding, boundary: int) -> SnapshotWrite | None:
        """Frames to write `boundary` into; None if it has a snapshot, its rows are inexact, or none can be had."""
        index = boundary // PAGE - 1
        if holding.epoch != self.epoch or not snapshot_is_exact(boundary, holding.plan.exact_from):
            return None
        if index < len(holding.chain) and holding.chain[index].snapshot is not None:
            return None
        if self.memory.snapshot_frames > self.unpromised():
            self.counters.snapshots_refused += 1
            return None
        frames = self.memory.take(self.memory.snapshot_frames, holding.branch.tenant)
        write = SnapshotWrite(boundary, tuple(frames))
        holding.reserved.append(write)
        return write

    # ---- after a step

    def advance(self, request_id: str, tokens: TokenIds, processed: int) -> None:
        """The first `processed` of `tokens` have run: seal full pages, publish the snapshots written meanwhile.

        A page that another request sealed first is adopted from the tree, and the duplicate freed.
        """
        holding = self.holdings[request_id]
        assert holding.processed < processed <= len(tokens), (holding.processed, processed, len(tokens))
        holding.processed = processed
        self._end_restore(holding)
        if processed // PAGE > len(holding.chain) and self.prefix_cache and holding.epoch == self.epoch:
            self._seal(holding, tokens, processed // PAGE)
        for write in tuple(holding.reserved):
            if write.position <= processed:  # others are of a step that is still under way
                self._publish(holding, write)

    def _seal(self, holding: Holding, tokens: TokenIds, upto: int) -> None:
        chain, sealed = holding.chain, len(holding.chain)
        self._changes += 1
        pages = holding.table[sealed:upto].tolist()
        old_tip = chain[-1] if chain else None
        holding.branch.used = self.clock()
        keys = holding.keys
        if len(keys) < upto:
            parent = keys[-1] if keys else holding.root
            keys.extend(page_keys(parent, tokens[len(keys) * PAGE : upto * PAGE]))
        duplicates = self.memory.tree.extend(keys[sealed:upto], chain, pages, holding.branch)
        self.memory.tree.pin(chain[-1])
        if old_tip is not None:
            self.memory.tree.unpin(old_tip, holding.branch.used)
        if duplicates:
            # plans already handed out keep the table they saw
            holding.table = holding.table.copy()
            for index in duplicates:
                holding.table[sealed + index] = chain[sealed + index].page
                self.memory.free.append(pages[index])
        self.counters.pages_adopted += len(duplicates)
        self.counters.pages_sealed += len(pages) - len(duplicates)

    def _publish(self, holding: Holding, write: SnapshotWrite) -> None:
        holding.reserved.remove(write)
        self._changes += 1
        index = write.position // PAGE - 1
        if index >= len(holding.chain):
            self.memory.free.extend(write.frames)
        elif self.memory.publish(holding.chain[index], write.frames, self._worth(holding, write.position)):
            self.counters.snapshots_written += 1

    def _end_restore(self, holding: Holding) -> None:
        if holding.restoring is not None:
            self.memory.unhold(holding.restoring, restored=True)
            holding.restoring = None
            self._changes += 1

    # ---- the end of a request

    def boundary_snapshot(self, request_id: str) -> SnapshotWrite | None:
        """Reserve a snapshot for the last sealed boundary, whose rows are still in the slot's ring.

        None if the policy wants none there, it has one, its rows did not run here, or no frames can be had. The
        caller copies the rows out of the slot before the slot is used again, and calls `publish_snapshot`.
        """
        holding = self.holdings[request_id]
        boundary = holding.processed // PAGE * PAGE
        if not boundary or not self.places.on_demand or boundary > len(holding.chain) * PAGE:
            return None
        return self._reserve(holding, boundary)

    def _worth(self, holding: Holding, boundary: int) -> float:
        """Tokens that a snapshot is expected to save; one without a place of its own is the end of an output."""
        worth = holding.places.get(boundary)
        if worth is not None:
            return worth
        beyond = boundary - max(holding.places, default=0)
        return self.forks.end_worth(self.planner.rebuild_tokens(boundary), beyond)

    def publish_snapshot(self, request_id: str, write: SnapshotWrite) -> None:
        """The snapshot reserved by `boundary_snapshot` will be written before the rows of the next step run."""
        self._publish(self.holdings[request_id], write)
        snapshot = self.memory.snapshots.get(write.frames)
        if snapshot is not None:
            self.tiers.unwritten(snapshot)

    def is_published(self, write: SlotSave) -> bool:
        """Whether the snapshot that `write` fills is still wanted; if not its frames may be somebody else's."""
        snapshot = self.memory.snapshots.get(write.frames)
        return snapshot is not None and snapshot.node.end == write.position

    def release(self, request_id: str, *, forget: bool = False) -> None:
        """Let go of everything a request holds. Its sealed pages stay until evicted.

        `forget` drops also the pages that it sealed itself, unless others use them: their content is suspect.
        """
        holding = self.holdings.pop(request_id)
        self._changes += 1
        self._end_restore(holding)
        for write in holding.reserved:
            self.memory.free.extend(write.frames)
        now = self.clock()
        holding.branch.used = now
        stale = holding.epoch != self.epoch
        if holding.chain:
            if not forget and not stale:
                self.leases.grant(holding, now)
                self._remember(holding, now)
                self.sessions.ended(holding)
                self.tiers.save(holding.chain, holding.plan.write_from // PAGE, self.places.stored)
            self.memory.tree.unpin(holding.chain[-1], now)
            for node in holding.chain:  # a snapshot may have waited in the queue while its page was in use
                if node.snapshot is not None:
                    self.memory.refresh(node)
        self.memory.free.extend(holding.table[len(holding.chain) : holding.count].tolist())
        self.free_slots.append(holding.slot)
        if forget:
            self.memory.remove_all(reversed(holding.chain[holding.plan.write_from // PAGE :]))
        elif stale:
            self.memory.remove_all(reversed(holding.chain))

    def _remember(self, holding: Holding, now: float) -> None:
        """A request ends: remember it by its kind, so that there is something to learn from when it is continued."""
        branch = holding.branch
        kind = kind_of(branch.turn, len(holding.chain), holding.processed - holding.plan.length)
        self.visits.left(holding.keys, branch.start // PAGE, holding.plan.length // PAGE, kind, branch.turn, now)
        self.retention.ended(branch, kind)
        branch.output_chance = branch.chance * self.forks.into_output
        for older in {node.branch for node in holding.chain}:  # they will be used when this one is
            older.chance = branch.chance

    def reset(self) -> None:
        """Drop the whole prefix cache. Pages of running requests go when these end; nobody finds them any more."""
        self._distrusts += 1  # lower tiers keep what they have, so that names must be others from here on
        self.renew(self._namespace)

    def renew(self, namespace: bytes) -> None:
        """As `reset`, because what is computed from here on has another `namespace`: other weights."""
        self._namespace = namespace
        self.epoch += 1
        self._changes += 1
        self.leases.drop_all()
        self.sessions.clear()
        self.tiers.reset()
        self.memory.clear()

    def distrust(self, tokens: TokenIds, salt: str) -> None:
        """Never serve a page or snapshot of this prefix again, from the device or from below."""
        self._changes += 1
        keys = list(page_keys(self.root(salt), tokens))
        chain = self.memory.tree.match(keys)
        self.distrusted.update(keys)
        self.tiers.distrust(keys)
        self.memory.remove_all(reversed(chain))

    # ---- what it says about itself

    def check_integrity(self) -> None:
        """Raise AssertionError with a sentence if any frame, slot, snapshot, pin or queue entry is out of place."""
        check(self)

    def stats(self) -> CacheStats:
        """Gauges and counters now."""
        return collect(self)
