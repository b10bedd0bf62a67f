"""What moves between the device and the tiers below it, and when; ids only.

    device --evicted, ranks high enough--> host          at once (Demotion)
    device or host --a request ended--> disk, remote     in the background (Save), parents first, once per object
    host, disk, remote --a queued prompt wants it--> device   in the background (Fetch)

The tree knows only the device. Below it objects are found by key, so a prompt's pages are: a chain in the tree, then
keys that some tier has. A fetch holds its frames until all has arrived; then its pages join the tree as if sealed.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from triptych.cache.geometry import CacheGeometry
from triptych.cache.host import HostTier
from triptych.cache.jobs import DEVICE, HOST, Demotion, Done, Fetch, FetchPart, Jobs, Save
from triptych.cache.memory import Item, Memory
from triptych.cache.policies import Below
from triptych.cache.prefix import Branch, Node, Snapshot
from triptych.cache.rates import Rates, TierRate
from triptych.cache.store.protocol import ObjectKey
from triptych.config import PAGE

SAVING_BYTES = 64 << 20
"""Bytes on their way to stores at most: what is being saved cannot be evicted."""

WORTH = 1000.0
"""Tokens that a snapshot from below saves: it was fetched because it does."""

DEFAULT_RATES = {HOST: TierRate(20e-6, 10e9), "disk": TierRate(200e-6, 1.5e9), "remote": TierRate(1e-3, 0.5e9)}
"""Starting values: a copy in memory, one NVMe drive, a machine in the same rack."""


@dataclass(eq=False, slots=True)
class Fetching:
    """Pages [len(chain), len(chain) + len(keys)) and perhaps the snapshot at `snapshot_end` are on their way."""

    chain: list[Node]
    keys: list[bytes]
    pages: list[int]
    branch: Branch
    snapshot_key: bytes | None
    snapshot_frames: tuple[int, ...]
    parts: tuple[FetchPart, ...]
    epoch: int


@dataclass(eq=False, slots=True)
class Saving:
    """One object on its way to a store, protected where it lies."""

    key: ObjectKey
    tier: str
    node: Node | None
    snapshot: Snapshot | None
    size: int


@dataclass(slots=True)
class Moved:
    """Bytes and objects that were moved, by tier; `tokens` of prompts that were found there and fetched."""

    tokens: Counter[str] = field(default_factory=Counter)
    bytes_in: Counter[str] = field(default_factory=Counter)
    bytes_out: Counter[str] = field(default_factory=Counter)
    missed_saves: int = 0
    failed_saves: int = 0
    failed_fetches: int = 0


class Tiers:
    """Everything below the device. Without host and stores it does nothing."""

    def __init__(
        self,
        memory: Memory,
        geometry: CacheGeometry,
        rates: Rates,
        below: Below,
    ) -> None:
        self.host = HostTier(below.host_frames) if below.host_frames else None
        self.stores = {store.name: store for store in below.stores}
        self.moved = Moved()
        self.fetching: dict[int, Fetching] = {}
        self.saving: dict[int, Saving] = {}
        self._on_the_way: set[tuple[ObjectKey, str]] = set()
        self.loading: set[ObjectKey] = set()
        self._memory = memory
        self._geometry = geometry
        self._rates = rates
        self._wanted: deque[tuple[ObjectKey, Item]] = deque()
        self._touched: list[ObjectKey] = []
        self._refusing = False
        self._demotions: list[Demotion] = []
        self._fetches: list[Fetch] = []
        self._unwritten: set[Snapshot] = set()
        self._distrusted: set[bytes] = set()
        self._jobs = 0
        for name in (HOST, *self.stores):
            rates.tiers.setdefault(name, replace(DEFAULT_RATES.get(name, DEFAULT_RATES["disk"])))
        if self.enabled:
            memory.on_evict = self._demote

    @property
    def enabled(self) -> bool:
        """True if there is any tier below the device."""
        return self.host is not None or bool(self.stores)

    @property
    def busy(self) -> bool:
        """True while copies are under way or due."""
        return bool(self.fetching or self.saving or self._wanted or self._demotions)

    @property
    def leaving(self) -> Sequence[Demotion]:
        """Demotions that are due: their frames may be free already, but must not be written before."""
        return self._demotions

    def frames_loading(self) -> Iterator[Sequence[int]]:
        """Frames that fetches are filling."""
        for fetching in self.fetching.values():
            yield fetching.pages
            yield fetching.snapshot_frames

    def tips(self) -> Iterator[Node]:
        """Nodes that fetches and saves have pinned."""
        yield from (fetching.chain[-1] for fetching in self.fetching.values() if fetching.chain)
        yield from (saving.node for saving in self.saving.values() if saving.node is not None)

    def snapshots(self) -> Iterator[Snapshot]:
        """Snapshots that are being saved."""
        yield from (saving.snapshot for saving in self.saving.values() if saving.snapshot is not None)

    # ---- where things are

    def where(self, key: ObjectKey) -> str | None:
        """The fastest tier that has `key`."""
        if key.name in self._distrusted:
            return None
        if self.host is not None and key in self.host:
            return HOST
        return next((name for name, store in self.stores.items() if key in store), None)

    def size(self, key: ObjectKey) -> int:
        """Bytes of an object."""
        return self._geometry.page_bytes if key.kind == "page" else self._geometry.snapshot_bytes

    def found(self, chain: Sequence[Node], start: int) -> dict[str, int]:
        """Tokens of [0, start) that a prompt uses for the first time since they came up, by tier."""
        tiers: dict[str, int] = {}
        for node in chain[: -(-start // PAGE)]:
            if node.origin is not None:
                tiers[node.origin] = tiers.get(node.origin, 0) + min(PAGE, start - node.end + PAGE)
                node.origin = None
        self.moved.tokens.update(tiers)
        return tiers

    # ---- down

    def unwritten(self, snapshot: Snapshot) -> None:
        """`snapshot` is published, but its rows will only be copied at the start of the next step."""
        if self.enabled:
            self._unwritten.add(snapshot)

    def _demote(self, item: Item) -> None:
        """An item leaves the device: keep it on the host if it ranks high enough there."""
        if self.host is None or item in self._unwritten:
            return
        key = key_of(item)
        if key.name in self._distrusted:
            return
        frames = (item.page,) if isinstance(item, Node) else item.frames
        host_frames = self.host.put(key, len(frames), self._memory.rank(item))
        if host_frames is not None:
            self._demotions.append(Demotion(key, frames, host_frames))
            self.moved.bytes_in[HOST] += self.size(key)

    def save(self, nodes: Sequence[Node], fresh: int, every: bool = False) -> None:
        """A request ended that used `nodes`, parents first: they and their likely snapshots are to be in the stores.

        All of them, not only those from index `fresh` on, which are new: a store may have given up the first pages of a
        session that lives on the device, and without these the others are worth nothing. While stores refuse, as a
        broken disk does, only the new ones are tried, or each turn of a long session would try all of it again.
        `every`: all snapshots, not only the likely ones.
        """
        if not self.stores or not nodes:
            return
        snapshots = [node.snapshot for node in nodes if node.snapshot is not None]
        if not every:
            ends = nodes[-1], nodes[max(0, fresh - 1)]  # the last, and where this prompt left what others had brought
            snapshots = [one for one in snapshots if one.uses or one.node in ends]
        items: list[Item] = [*(nodes[fresh:] if self._refusing else nodes), *snapshots]
        for item in items:
            key = key_of(item)
            if all(key in store for store in self.stores.values()):
                self._touched.append(key)
            else:
                self._wanted.append((key, item))

    def _start_saves(self) -> list[Save]:
        """Jobs for what is to be saved, as far as the limit on protected bytes allows."""
        saves: list[Save] = []
        later: list[tuple[ObjectKey, Item]] = []
        under_way = sum(saving.size for saving in self.saving.values())
        while self._wanted and under_way < SAVING_BYTES:
            key, item = self._wanted.popleft()
            if item in self._unwritten:
                later.append((key, item))
                continue
            for tier, store in self.stores.items():
                if key in store or key.name in self._distrusted or (key, tier) in self._on_the_way:
                    continue
                save = self._start_save(key, item, tier)
                if save is None:
                    self.moved.missed_saves += 1
                else:
                    saves.append(save)
                    under_way += self.size(key)
        self._wanted.extendleft(reversed(later))
        return saves

    def _start_save(self, key: ObjectKey, item: Item, tier: str) -> Save | None:
        """Protect the object where it lies and say where that is; None if it is gone."""
        self._jobs += 1
        memory, size = self._memory, self.size(key)
        if isinstance(item, Node) and memory.tree.nodes.get(item.key) is item:
            memory.tree.pin(item)
            self._begin_save(Saving(key, tier, item, None, size))
            return Save(self._jobs, key, tier, DEVICE, (item.page,))
        if isinstance(item, Snapshot) and memory.snapshots.get(item.frames) is item:
            memory.hold(item)
            memory.tree.pin(item.node)
            self._begin_save(Saving(key, tier, item.node, item, size))
            return Save(self._jobs, key, tier, DEVICE, item.frames)
        if self.host is not None and key in self.host:
            self._begin_save(Saving(key, tier, None, None, size))
            return Save(self._jobs, key, tier, HOST, self.host.use(key))
        return None

    def _begin_save(self, saving: Saving) -> None:
        self.saving[self._jobs] = saving
        self._on_the_way.add((saving.key, saving.tier))

    def _end_save(self, saving: Saving, ok: bool) -> None:
        self._on_the_way.discard((saving.key, saving.tier))
        if saving.snapshot is not None:
            self._memory.unhold(saving.snapshot)
        if saving.node is not None:
            self._memory.tree.unpin(saving.node, saving.node.used)
        elif self.host is not None:
            self.host.end_use(saving.key)
        self._refusing = not ok
        if ok:
            self.moved.bytes_in[saving.tier] += saving.size
            if saving.key.name in self._distrusted:  # meanwhile
                self.stores[saving.tier].discard(saving.key)
        else:
            self.moved.failed_saves += 1

    # ---- up

    def fetch(
        self,
        chain: list[Node],
        keys: list[bytes],
        snapshot_key: bytes | None,
        branch: Branch,
        epoch: int,
    ) -> int:
        """Start to bring the pages `keys`, which follow `chain`, and a snapshot to the device; the job's number.

        The caller made sure of the room and that some tier has each of them.
        """
        self._jobs += 1
        if chain:
            self._memory.tree.pin(chain[-1])
        objects = pages_and_snapshot(keys, snapshot_key)
        # sources first: taking frames pushes others to the host, which must not give up what is wanted from it
        sources = [self._source(key) for key in objects]
        pages = self._memory.take(len(keys), branch.tenant)
        frames: tuple[int, ...] = ()
        if snapshot_key is not None:
            frames = tuple(self._memory.take(self._memory.snapshot_frames, branch.tenant))
        places = [(page,) for page in pages] + ([frames] if frames else [])
        parts = tuple(
            FetchPart(key, tier, place, host_frames)
            for key, place, (tier, host_frames) in zip(objects, places, sources, strict=True)
        )
        self.fetching[self._jobs] = Fetching(chain, keys, pages, branch, snapshot_key, frames, parts, epoch)
        self.loading.update(objects)
        self._fetches.append(Fetch(self._jobs, parts))
        return self._jobs

    def _source(self, key: ObjectKey) -> tuple[str, tuple[int, ...]]:
        """The tier that has `key`, and its frames if that is the host, where it stays until the fetch ends."""
        tier = self.where(key)
        assert tier is not None, key
        return tier, self.host.use(key) if tier == HOST and self.host is not None else ()

    def _end_fetch(self, fetching: Fetching, ok: tuple[bool, ...], stale: bool) -> Node | None:
        """Take in what arrived: pages up to the first that did not. Returns the new tip, pinned."""
        self.moved.failed_fetches += not all(ok)
        memory, chain = self._memory, list(fetching.chain)
        old_tip = chain[-1] if chain else None
        count = len(fetching.keys)
        whole = 0 if stale else next((index for index in range(count) if not ok[index]), count)
        duplicates = memory.tree.extend(fetching.keys[:whole], chain, fetching.pages[:whole], fetching.branch)
        for node, part in zip(chain[len(fetching.chain) :], fetching.parts, strict=False):
            if node.page == part.frames[0]:
                node.origin = part.tier
        memory.free.extend(fetching.pages[index] for index in duplicates)
        memory.free.extend(fetching.pages[whole:])
        if chain:
            memory.tree.pin(chain[-1])
        if old_tip is not None:
            memory.tree.unpin(old_tip, old_tip.used)
        home = None
        if fetching.snapshot_frames:
            if ok[-1] and not stale:
                home = next((n for n in reversed(chain) if n.key == fetching.snapshot_key), None)
            if home is None:
                memory.free.extend(fetching.snapshot_frames)
            else:
                memory.publish(home, fetching.snapshot_frames, WORTH)
        for index, (part, arrived) in enumerate(zip(fetching.parts, ok, strict=True)):
            self._end_part(part, arrived, taken=stale or index < whole or (index == count and home is not None))
        return chain[-1] if chain else None

    def _end_part(self, part: FetchPart, arrived: bool, taken: bool) -> None:
        """Count what arrived. The host gives up what is on the device now, and what is damaged: it would fail again
        each time, and hide a good copy further down."""
        if arrived:
            self.moved.bytes_out[part.tier] += self.size(part.key)
        if part.host_frames and self.host is not None:
            self.host.end_use(part.key, gone=taken or not arrived)

    # ---- both

    def due(self) -> Jobs:
        """What the mover has to carry out before the next step; asked once per step, after it was planned."""
        saves = tuple(self._start_saves())
        jobs = Jobs(tuple(self._demotions), tuple(self._fetches), saves, tuple(self._touched))
        self._demotions, self._fetches, self._touched = [], [], []
        self._unwritten.clear()
        return jobs

    def end(self, done: Done, epoch: int) -> tuple[Node | None, bool]:
        """A job has ended. Returns the tip of a fetch, pinned, if it was one, and whether it was a fetch."""
        saving = self.saving.pop(done.job, None)
        if saving is not None:
            self._end_save(saving, done.ok[0])
            return None, False
        fetching = self.fetching.pop(done.job)
        self.loading.difference_update(part.key for part in fetching.parts)
        self._observe(fetching, done)
        return self._end_fetch(fetching, done.ok, stale=fetching.epoch != epoch), True

    def _observe(self, fetching: Fetching, done: Done) -> None:
        tiers = {part.tier for part in fetching.parts}
        if done.seconds > 0 and all(done.ok) and len(tiers) == 1:
            size = sum(self.size(part.key) for part in fetching.parts)
            self._rates.tiers[tiers.pop()].observe(size, done.seconds)

    def reset(self) -> None:
        """Forget what was to be moved down and what lies on the host: nothing the device held is trusted."""
        self._wanted.clear()
        self._demotions = []
        self._unwritten.clear()
        if self.host is not None:
            for key in tuple(self.host.objects):
                self.host.discard(key)

    def distrust(self, names: Iterable[bytes]) -> None:
        """Never take in or serve the objects of these boundaries again."""
        names = list(names)
        self._distrusted.update(names)
        for name in names:
            for key in (ObjectKey("page", name), ObjectKey("snapshot", name)):
                if self.host is not None:
                    self.host.discard(key)
                for store in self.stores.values():
                    store.discard(key)


def key_of(item: Item) -> ObjectKey:
    """The name of a page or snapshot below the device."""
    return ObjectKey("page", item.key) if isinstance(item, Node) else ObjectKey("snapshot", item.node.key)


def pages_and_snapshot(pages: Sequence[bytes], snapshot: bytes | None) -> list[ObjectKey]:
    """The objects of these names."""
    return [ObjectKey("page", name) for name in pages] + ([ObjectKey("snapshot", snapshot)] if snapshot else [])
