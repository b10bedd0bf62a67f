"""The cache manager: the one door to pages, window slots, snapshots and the prefix tree.

The life of a page and of a request's page table (n tokens known, p processed, s = sealed pages):

    free -> held by one request (being filled) -> sealed, in the tree -> no pins: evictable -> free

    0                     128 s            p            128 len(table)
    |  sealed, in the tree  |  held, filled  |  held, empty  |

Order of calls for one request: admit, then per step grow, snapshot_writes, (the step runs) advance; at its
end boundary_snapshot, publish_snapshot, release. Nothing here is a tensor; time is a counter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from triptych.cache.geometry import CacheCapacity, CacheGeometry
from triptych.cache.integrity import check
from triptych.cache.prefix import Node, PrefixTree, root_key
from triptych.cache.resume import ResumePlan, cheapest, snapshot_is_exact
from triptych.cache.retention import Lru, RetentionPolicy
from triptych.cache.snapshots import SnapshotStore
from triptych.cache.stats import CacheStats, Counters
from triptych.config import PAGE
from triptych.words import SnapshotWrite, TokenIds

PageTable = npt.NDArray[np.int32]


@dataclass(slots=True)
class Holding:
    """What one admitted request holds. `goal` pages are promised to it; `table[:count]` are there.

    `chain` are the nodes of its sealed pages, the last of them pinned. `reserved` are snapshots being written.
    """

    slot: int
    root: bytes
    epoch: int
    plan: ResumePlan
    goal: int
    places: frozenset[int]
    table: PageTable
    chain: list[Node]
    count: int = 0
    processed: int = 0
    restoring: Node | None = None
    reserved: list[SnapshotWrite] = field(default_factory=list)


class CacheManager:
    """All cache memory of one engine, as ids. `layers` is the depth a replay has to rebuild.

    `namespace` separates what must never be mixed: weights fingerprint and cache formats.
    """

    def __init__(
        self,
        geometry: CacheGeometry,
        capacity: CacheCapacity,
        layers: int,
        *,
        prefix_cache: bool = True,
        policy: RetentionPolicy | None = None,
        namespace: bytes = b"",
    ) -> None:
        self.geometry = geometry
        self.capacity = capacity
        self.layers = layers
        self.prefix_cache = prefix_cache
        self.policy: RetentionPolicy = policy or Lru()
        self.tree = PrefixTree(self.policy.page_rank)
        self.snapshots = SnapshotStore(capacity.snapshots, self.policy.snapshot_rank)
        self.holdings: dict[str, Holding] = {}
        self.free_pages = list(range(capacity.pages - 1, -1, -1))
        self.free_slots = list(range(capacity.slots - 1, -1, -1))
        self.counters = Counters()
        self._namespace = namespace
        self._epoch = 0
        self._tick = 0
        self._changes = 0
        self._refused: tuple[str, str, int, int] | None = None

    # ---- admission

    def admit(self, request_id: str, tokens: TokenIds, salt: str, limit: int) -> ResumePlan | None:
        """Reserve a slot for `tokens`, pin what is cached of them and say how to continue.

        `limit` is the most tokens this request may ever have. None when no slot is free, or when the pages of
        the uncached tokens (and one more to decode into) do not fit in what is neither held nor promised.
        """
        assert request_id not in self.holdings, request_id
        assert len(tokens) <= limit <= self.capacity.tokens, (len(tokens), limit, self.capacity.tokens)
        attempt = (request_id, salt, len(tokens), self._changes)
        if not self.free_slots or attempt == self._refused:
            return None
        root = root_key(b"%d:%b" % (self._epoch, self._namespace), salt)
        chain = self.tree.match(root, tokens) if self.prefix_cache else []
        if chain:
            self.tree.pin(chain[-1])
        goal = min(pages_for(len(tokens)) + 1, pages_for(limit))
        if goal - len(chain) > self._unpromised():
            if chain:
                self.tree.unpin(chain[-1], 0)
            # hashing a long prompt again in each step would be dear, and the answer the same
            self._refused = attempt
            return None
        plan, source = self._plan(len(tokens), chain)
        if source is not None:
            self.snapshots.hold(source)
        table = np.empty(pages_for(limit), np.int32)
        table[: len(chain)] = [node.page for node in chain]
        self.holdings[request_id] = Holding(
            slot=self.free_slots.pop(),
            root=root,
            epoch=self._epoch,
            plan=plan,
            goal=goal,
            places=self._places(len(tokens), plan.write_from),
            table=table,
            chain=chain,
            count=len(chain),
            processed=plan.start,
            restoring=source,
        )
        self._count_admission(plan)
        return plan

    def _plan(self, length: int, chain: list[Node]) -> tuple[ResumePlan, Node | None]:
        """The cheapest plan and the node whose snapshot it restores."""
        source = next((node for node in reversed(chain) if node.snapshot >= 0), None)
        found = None if source is None else (source.end, source.snapshot)
        plan = cheapest(length, len(chain) * PAGE, self.layers, found)
        return plan, source if plan.kind == "snapshot" else None

    def _places(self, length: int, matched: int) -> frozenset[int]:
        """Boundaries to snapshot during this prefill: no prompt takes more than a quarter of all snapshots."""
        if not self.prefix_cache or not self.capacity.snapshots:
            return frozenset()
        most = max(1, self.capacity.snapshots // 4)
        return frozenset(self.policy.places(length, matched)[:most])

    def _unpromised(self) -> int:
        """Pages that are free or can be freed and that no admitted request still counts on."""
        promised = sum(max(0, holding.goal - holding.count) for holding in self.holdings.values())
        return len(self.free_pages) + self.tree.evictable - promised

    def _count_admission(self, plan: ResumePlan) -> None:
        counters = self.counters
        counters.admissions += 1
        counters.cold_starts += plan.kind == "cold"
        counters.snapshot_resumes += plan.kind == "snapshot"
        counters.replay_resumes += plan.kind == "replay"
        counters.admitted_tokens += plan.length
        counters.cached_tokens += plan.cached_tokens
        counters.recomputed_tokens += plan.recomputed_tokens

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
        if missing > len(self.free_pages) + self.tree.evictable:
            return False
        self._free_up(missing)
        fresh = self.free_pages[-missing:]
        del self.free_pages[-missing:]
        holding.table[holding.count : holding.count + missing] = fresh
        holding.count += missing
        return True

    def page_table(self, request_id: str) -> PageTable:
        """The pages of a request so far, int32, read-only; `pages[i]` holds tokens [128 i, 128 (i + 1))."""
        holding = self.holdings[request_id]
        view = holding.table[: holding.count]
        view.flags.writeable = False
        return view

    def snapshot_writes(self, request_id: str, start: int, end: int) -> tuple[SnapshotWrite, ...]:
        """Reserve snapshots for the boundaries in (start, end] that the policy wants and that have none."""
        holding = self.holdings[request_id]
        if not holding.places:
            return ()
        writes = []
        for boundary in range((start // PAGE + 1) * PAGE, end + 1, PAGE):
            if boundary in holding.places:
                write = self._reserve(holding, boundary)
                if write is not None:
                    writes.append(write)
        return tuple(writes)

    def _reserve(self, holding: Holding, boundary: int) -> SnapshotWrite | None:
        """A snapshot to write `boundary` into; None if it has one, its rows are inexact, or none can be had."""
        index = boundary // PAGE - 1
        if holding.epoch != self._epoch or not snapshot_is_exact(boundary, holding.plan.exact_from):
            return None
        if index < len(holding.chain) and holding.chain[index].snapshot >= 0:
            return None
        snapshot = self.snapshots.reserve()
        if snapshot is None:
            self.counters.snapshots_refused += 1
            return None
        write = SnapshotWrite(boundary, snapshot)
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
        if processed // PAGE > len(holding.chain) and self.prefix_cache and holding.epoch == self._epoch:
            self._seal(holding, tokens, processed // PAGE)
        for write in tuple(holding.reserved):
            self._publish(holding, write)

    def _seal(self, holding: Holding, tokens: TokenIds, upto: int) -> None:
        chain, sealed = holding.chain, len(holding.chain)
        self._tick += 1
        self._changes += 1
        pages = holding.table[sealed:upto].tolist()
        old_tip = chain[-1] if chain else None
        duplicates = self.tree.extend(holding.root, chain, tokens[sealed * PAGE : upto * PAGE], pages, self._tick)
        self.tree.pin(chain[-1])
        if old_tip is not None:
            self.tree.unpin(old_tip, self._tick)
        if duplicates:
            # plans already handed out keep the table they saw
            holding.table = holding.table.copy()
            for index in duplicates:
                holding.table[sealed + index] = chain[sealed + index].page
                self.free_pages.append(pages[index])
        self.counters.pages_adopted += len(duplicates)
        self.counters.pages_sealed += len(pages) - len(duplicates)

    def _publish(self, holding: Holding, write: SnapshotWrite) -> None:
        holding.reserved.remove(write)
        index = write.position // PAGE - 1
        if index >= len(holding.chain):
            self.snapshots.cancel(write.snapshot)
            return
        self._tick += 1
        if self.snapshots.publish(write.snapshot, holding.chain[index], self._tick):
            self.counters.snapshots_written += 1

    def _end_restore(self, holding: Holding) -> None:
        if holding.restoring is not None:
            self._tick += 1
            self.snapshots.unhold(holding.restoring, self._tick)
            holding.restoring = None

    # ---- the end of a request

    def boundary_snapshot(self, request_id: str) -> SnapshotWrite | None:
        """Reserve a snapshot for the last sealed boundary, whose rows are still in the slot's ring.

        None if it has one, its rows did not run here, or no snapshot can be had. The caller copies the rows
        out of the slot before the slot is used again, and calls `publish_snapshot`.
        """
        holding = self.holdings[request_id]
        boundary = holding.processed // PAGE * PAGE
        if not boundary or not self.capacity.snapshots or boundary > len(holding.chain) * PAGE:
            return None
        return self._reserve(holding, boundary)

    def publish_snapshot(self, request_id: str, write: SnapshotWrite) -> None:
        """The snapshot reserved by `boundary_snapshot` is written, or will be before any later step reads it."""
        self._publish(self.holdings[request_id], write)

    def release(self, request_id: str, *, forget: bool = False) -> None:
        """Let go of everything a request holds. Its sealed pages stay until evicted.

        `forget` drops also the pages that it sealed itself, unless others use them: their content is suspect.
        """
        holding = self.holdings.pop(request_id)
        self._changes += 1
        self._end_restore(holding)
        for write in holding.reserved:
            self.snapshots.cancel(write.snapshot)
        self._tick += 1
        if holding.chain:
            self.tree.unpin(holding.chain[-1], self._tick)
        self.free_pages.extend(holding.table[len(holding.chain) : holding.count].tolist())
        self.free_slots.append(holding.slot)
        if forget:
            self._remove(reversed(holding.chain[holding.plan.write_from // PAGE :]))
        elif holding.epoch != self._epoch:
            self._remove(reversed(holding.chain))

    def reset(self) -> None:
        """Drop the whole prefix cache. Pages of running requests go when these end; nobody finds them any more."""
        self._epoch += 1
        self._changes += 1
        self._free_up(len(self.free_pages) + self.tree.evictable)

    def _remove(self, nodes: Iterable[Node]) -> None:
        """Take `nodes`, children first, out of the tree, up to the first that others use."""
        for node in nodes:
            if not self.tree.remove(node):
                return
            self._reclaim(node)

    def _free_up(self, wanted: int) -> None:
        """Evict until `wanted` pages are free."""
        while len(self.free_pages) < wanted:
            self._reclaim(self.tree.evict())
            self.counters.pages_evicted += 1

    def _reclaim(self, node: Node) -> None:
        self.snapshots.drop(node)
        self.free_pages.append(node.page)

    # ---- what it says about itself

    def check_integrity(self) -> None:
        """Raise AssertionError with a sentence if any page, slot, snapshot, pin or queue entry is out of place."""
        check(self)

    def stats(self) -> CacheStats:
        """Gauges and counters now."""
        cached = len(self.tree.nodes)
        used = self.capacity.pages - len(self.free_pages)
        published = len(self.snapshots.published)
        return CacheStats(
            pages=self.capacity.pages,
            pages_free=len(self.free_pages),
            pages_held=used - cached,
            pages_cached=cached,
            pages_evictable=self.tree.evictable,
            snapshots=self.capacity.snapshots,
            snapshots_free=len(self.snapshots.free),
            snapshots_cached=published,
            slots=self.capacity.slots,
            slots_free=len(self.free_slots),
            page_bytes_used=used * self.geometry.page_bytes,
            snapshot_bytes_used=(self.capacity.snapshots - len(self.snapshots.free)) * self.geometry.snapshot_bytes,
            snapshots_evicted=self.snapshots.evictions,
            **vars(self.counters),
        )


def pages_for(tokens: int) -> int:
    """Pages that cover `tokens`."""
    return -(-tokens // PAGE)
