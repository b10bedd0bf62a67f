"""Bringing a queued prompt's pages up before it is admitted, where that is quicker than computing them.

In pieces: what gives way to them goes to the host at once, between two steps, and nobody decodes meanwhile.

    | on the device: chain | piece | piece | last piece, and the snapshot | computed |
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import TYPE_CHECKING

from triptych.cache.jobs import Done
from triptych.cache.prefix import Branch, Node
from triptych.cache.store.protocol import ObjectKey
from triptych.cache.tiers import pages_and_snapshot
from triptych.config import PAGE
from triptych.words import TokenIds

if TYPE_CHECKING:
    from triptych.cache.manager import CacheManager

PIECE = 512
"""Pages that one fetch brings at most, 250 MB of Flash: some 30 ms for as many to go to the host."""


class Prefetcher:
    """Which waiting requests have a fetch under way, and what was brought up for them and is pinned until then.

    `_begun`: the tip of the pieces that have arrived while more are to come. `_tips`: nothing more is to be fetched.
    """

    def __init__(self, manager: CacheManager, piece: int = PIECE) -> None:
        self.piece = piece
        self._manager = manager
        self._jobs: dict[str, int] = {}
        self._begun: dict[str, Node] = {}
        self._tips: dict[str, Node | None] = {}
        self._refused: dict[str, int] = {}

    @property
    def tips(self) -> Iterator[Node]:
        """Nodes pinned for requests that are not admitted yet."""
        yield from (tip for tip in self._tips.values() if tip is not None)
        yield from self._begun.values()

    def fetching(self, request_id: str) -> bool:
        """Whether copies are under way for a waiting request."""
        return request_id in self._jobs

    def ready(self, request_id: str, tokens: TokenIds, salt: str, changes: int) -> bool:
        """Start a fetch for a waiting request if that pays. True when nothing is under way for it."""
        if request_id in self._jobs:
            return False
        if request_id in self._tips or not self._manager.tiers.enabled or self._refused.get(request_id) == changes:
            return True
        manager = self._manager
        names = manager.names.of(request_id, manager.root(salt), tokens)
        chain = manager.memory.tree.match(names)
        keys = self._below(names[len(chain) :])
        snapshot = self._snapshot(chain, keys)
        if manager.tiers.loading.intersection(pages_and_snapshot(keys[:1], snapshot)):
            return False  # somebody else's fetch brings them
        if not self._pays(len(tokens), chain, keys, snapshot):
            self._tips[request_id] = self._begun.pop(request_id, None)
            return True
        room = self._room_beside(chain) - len(keys)
        if room < manager.memory.snapshot_frames:
            snapshot = None
        if room < 0 or not (keys or snapshot):
            if request_id in self._begun:
                self._tips[request_id] = self._begun.pop(request_id)
            self._refused[request_id] = changes
            return True
        if len(keys) > self.piece:
            keys, snapshot = keys[: self.piece], None
        branch = self._branch(salt, chain, keys)
        self._jobs[request_id] = manager.tiers.fetch(chain, keys, snapshot, branch, manager.epoch)
        self._unpin(self._begun.pop(request_id, None))  # the fetch has pinned what it follows
        return False

    def _room_beside(self, chain: list[Node]) -> int:
        """Unpromised frames while `chain` may not be evicted."""
        manager = self._manager
        if not chain:
            return manager.unpromised()
        manager.memory.tree.pin(chain[-1])
        room = manager.unpromised()
        manager.memory.tree.unpin(chain[-1], chain[-1].used)
        return room

    def _below(self, names: list[bytes]) -> list[bytes]:
        """The first of `names` up to the one that no tier has."""
        where = self._manager.tiers.where
        return list(takewhile(lambda name: where(ObjectKey("page", name)) is not None, names))

    def _snapshot(self, chain: list[Node], keys: list[bytes]) -> bytes | None:
        """The deepest boundary that has a snapshot below, unless the device has one as deep."""
        where = self._manager.tiers.where
        for key in reversed(keys):
            if where(ObjectKey("snapshot", key)) is not None:
                return key
        for node in reversed(chain):
            if node.snapshot is not None:
                return None
            if where(ObjectKey("snapshot", node.key)) is not None:
                return node.key
        return None

    def _pays(self, length: int, chain: list[Node], keys: list[bytes], snapshot: bytes | None) -> bool:
        """Whether fetching and resuming there takes less time than resuming from what is on the device."""
        if not keys and snapshot is None:
            return False
        manager, tiers = self._manager, self._manager.tiers
        here = next((node.end for node in reversed(chain) if node.snapshot is not None), 0)
        now = manager.planner.cheapest(length, len(chain) * PAGE, here).seconds
        there = here
        if snapshot is not None:
            ends = [node.key for node in chain] + keys
            there = max(here, (len(ends) - ends[::-1].index(snapshot)) * PAGE)
        after = manager.planner.cheapest(length, (len(chain) + len(keys)) * PAGE, there).seconds
        sizes: dict[str, int] = {}
        for key in pages_and_snapshot(keys, snapshot):
            tier = tiers.where(key)
            if tier is not None:
                sizes[tier] = sizes.get(tier, 0) + tiers.size(key)
        fetch = sum(manager.rates.fetch_seconds(tier, size) for tier, size in sizes.items())
        return fetch + after < now

    def _branch(self, salt: str, chain: list[Node], keys: list[bytes]) -> Branch:
        """What comes back continues the history of what it hangs on."""
        now, start = self._manager.clock(), len(chain) * PAGE
        turn = chain[-1].branch.turn + 1 if chain else 0
        return Branch(self._manager.tenant(salt), turn, now, start, start + len(keys) * PAGE, used=now)

    def end(self, done: Done) -> None:
        """A fetch has ended; what arrived stays pinned until its request is admitted or gone."""
        tip, was_fetch = self._manager.tiers.end(done, self._manager.epoch)
        if not was_fetch:
            return
        owner = next((name for name, job in self._jobs.items() if job == done.job), None)
        if owner is None:
            self._unpin(tip)
            return
        del self._jobs[owner]
        if tip is not None and all(done.ok):
            self._begun[owner] = tip  # perhaps there is more
        else:
            self._tips[owner] = tip

    def forget(self, request_id: str) -> None:
        """The request is admitted or gone: what was brought up for it is like any other page now."""
        self._jobs.pop(request_id, None)
        self._refused.pop(request_id, None)
        self._unpin(self._tips.pop(request_id, None))
        self._unpin(self._begun.pop(request_id, None))

    def give_way(self) -> bool:
        """Unpin all that was brought up, because a request cannot be admitted otherwise. False if nothing was."""
        self._tips |= self._begun
        self._begun.clear()
        pinned = [name for name, tip in self._tips.items() if tip is not None]
        for name in pinned:
            self._unpin(self._tips[name])
            self._tips[name] = None
        return bool(pinned)

    def _unpin(self, tip: Node | None) -> None:
        if tip is not None:
            self._manager.memory.tree.unpin(tip, tip.used)
