"""The host tier: frames in main memory that hold what the device gave up. Bytes are engine/mover.py's business."""

from __future__ import annotations

from dataclasses import dataclass

from triptych.cache.eviction import EvictionQueue
from triptych.cache.store.protocol import ObjectKey


@dataclass(eq=False, slots=True)
class HostObject:
    """One object in `frames`; `users` are copies under way that read it."""

    key: ObjectKey
    frames: tuple[int, ...]
    rank: float
    users: int = 0


class HostTier:
    """Frames and what is in them, by key. The lowest rank goes first; ranks are those of the device's policy."""

    def __init__(self, frames: int) -> None:
        self.frames = frames
        self.free = list(range(frames - 1, -1, -1))
        self.objects: dict[ObjectKey, HostObject] = {}
        self.evicted = 0
        self.refused = 0
        self.snapshots = 0
        self._queue: EvictionQueue[HostObject] = EvictionQueue()

    def put(self, key: ObjectKey, count: int, rank: float) -> tuple[int, ...] | None:
        """`count` frames for `key`, giving up what ranks lower. None if it is here already or ranks lowest itself."""
        found = self.objects.get(key)
        if found is not None:
            self._rank(found, max(rank, found.rank))
            return None
        if count > self.frames:
            self.refused += 1
            return None
        while len(self.free) < count:
            if not self._queue or self._queue.peek()[0] > rank:
                self.refused += 1
                return None
            self.evicted += 1
            self.discard(self._queue.peek()[1].key)
        frames = tuple(self.free[-count:])
        del self.free[-count:]
        item = self.objects[key] = HostObject(key, frames, rank)
        self._queue.put(item, rank)
        self.snapshots += key.kind == "snapshot"
        return frames

    def use(self, key: ObjectKey) -> tuple[int, ...]:
        """The frames of `key`, which stay until `end_use`."""
        item = self.objects[key]
        item.users += 1
        self._queue.discard(item)
        return item.frames

    def end_use(self, key: ObjectKey, *, gone: bool = False) -> None:
        """Undo one `use`; with `gone` the object goes, because it has moved up or is damaged, unless others read it."""
        item = self.objects[key]
        item.users -= 1
        if not item.users:
            if gone:
                self._drop(item)
            else:
                self._queue.put(item, item.rank)

    def discard(self, key: ObjectKey) -> None:
        """Give up `key` unless it is being read."""
        item = self.objects.get(key)
        if item is not None and not item.users:
            self._drop(item)

    def __contains__(self, key: ObjectKey) -> bool:
        return key in self.objects

    def _drop(self, item: HostObject) -> None:
        self._queue.discard(item)
        del self.objects[item.key]
        self.snapshots -= item.key.kind == "snapshot"
        self.free.extend(item.frames)

    def _rank(self, item: HostObject, rank: float) -> None:
        item.rank = rank
        if not item.users:
            self._queue.put(item, rank)

    def check(self) -> None:
        """AssertionError if a frame is in no place or in two."""
        if self.snapshots != sum(key.kind == "snapshot" for key in self.objects):
            raise AssertionError("The host miscounts its snapshots.")
        used = [frame for item in self.objects.values() for frame in item.frames]
        if sorted(used + self.free) != list(range(self.frames)):
            raise AssertionError("A host frame is lost or in two places.")
        waiting = {item.key for item in self._queue}
        if waiting != {key for key, item in self.objects.items() if not item.users}:
            raise AssertionError("The host's eviction queue does not hold what may go.")
