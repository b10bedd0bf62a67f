"""The Protocol over a dictionary: what every store must look like from outside, for tests and as the reference.

Not a tier: the host tier keeps its objects in pinned memory and is the engine's.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from triptych.cache.store.protocol import Buffer, ObjectKey, StoreStats, as_views, total_bytes


class MemoryStore:
    """A `Store` of byte strings. `quota`: payload bytes beyond which puts are refused; nothing is ever evicted."""

    name = "memory"

    def __init__(self, quota: int | None = None) -> None:
        self._quota = quota
        self._lock = threading.Lock()
        self._objects: dict[ObjectKey, bytes] = {}
        self._used = self._written = self._read = self._damaged = self._refused = 0
        self._closed = False

    def put(self, key: ObjectKey, payload: Sequence[Buffer]) -> bool:
        """See `Store.put`."""
        data = b"".join(as_views(payload))
        with self._lock:
            old = self._objects.get(key)
            if old is not None and len(old) == len(data):
                return True
            used = self._used + len(data) - (len(old) if old is not None else 0)
            if self._closed or (self._quota is not None and used > self._quota):
                self._refused += 1
                return False
            self._objects[key] = data
            self._used = used
            self._written += len(data)
            return True

    def get(self, key: ObjectKey, into: Sequence[Buffer]) -> bool:
        """See `Store.get`."""
        views = as_views(into)
        with self._lock:
            data = self._objects.get(key)
            if data is None:
                return False
            if len(data) != total_bytes(views):
                self._damaged += 1
                self._forget(key)
                return False
            self._read += len(data)
        scatter(data, views)
        return True

    def __contains__(self, key: ObjectKey) -> bool:
        return key in self._objects

    def discard(self, key: ObjectKey) -> None:
        """See `Store.discard`."""
        with self._lock:
            self._forget(key)

    def touch(self, key: ObjectKey) -> None:
        """Nothing to do: nothing is evicted."""

    def stats(self) -> StoreStats:
        """See `Store.stats`."""
        with self._lock:
            return StoreStats(self._used, len(self._objects), self._written, self._read, self._damaged, self._refused)

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            self._closed = True
            self._objects.clear()
            self._used = 0

    def _forget(self, key: ObjectKey) -> None:
        self._used -= len(self._objects.pop(key, b""))


def scatter(data: bytes | memoryview, views: Sequence[memoryview]) -> None:
    """Copy `data` into the views one after the other; their lengths together are its own."""
    start = 0
    for view in views:
        view[:] = data[start : start + len(view)]
        start += len(view)
