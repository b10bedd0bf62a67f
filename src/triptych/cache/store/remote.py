"""The remote tier: the same Protocol against a Valkey or Redis server (from 6.2 on), shared by any number of engines.

Keys are `triptych:` + the store's seal (a digest of weights, formats and layout) + kind and name; values are framed
as on disk (`record.py`), so that what the server or the wire damages is a miss. Objects live for `ttl_s` after their
last use; what the server evicts by its own policy is a miss, too. Needs the extra `remote`.

A server that is gone costs one timeout and one log line; until RETRY_S have passed everything is a miss at once, then
one operation tries again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from triptych.cache.store.faultlog import FaultLog
from triptych.cache.store.memory import scatter
from triptych.cache.store.protocol import NAME_BYTES, Buffer, ObjectKey, StoreStats, as_views, total_bytes
from triptych.cache.store.record import (
    HEADER_BYTES,
    Header,
    checksum_of,
    kind_code,
    kind_of,
    pack_header,
    parse_header,
    seal_of,
)
from triptych.errors import ConfigError

if TYPE_CHECKING:
    import valkey

logger = logging.getLogger(__name__)
T = TypeVar("T")

RETRY_S = 5.0
# the client's parser copies what it reads piece by piece; an object in few pieces is read faster
_SOCKET_READ_BYTES = 512 << 10
_SCAN_COUNT = 1000


class RemoteStore:
    """A `Store` on a server.

    url: valkey://, redis://, rediss:// or unix://. fingerprint: as for `SegmentStore`; stores of other fingerprints
    share the server unseen. ttl_s: seconds that an unused object lives. timeout_s: for connecting and for each
    operation. Raises ConfigError for a wrong URL or a missing client; a server that does not answer is no error.
    """

    name = "remote"

    def __init__(
        self,
        url: str,
        fingerprint: bytes,
        ttl_s: float = 24 * 3600.0,
        timeout_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client, self._gone, self._error = _connect(url, timeout_s)
        self.url = _without_password(url)
        self._seal = seal_of(fingerprint)
        self._prefix = b"triptych:" + self._seal.hex().encode() + b":"
        self._ttl_ms = max(1, int(ttl_s * 1000))
        self._clock = clock
        self._faults = FaultLog(logger, clock)
        self._lock = threading.Lock()
        self._until: dict[bytes, float] = {}  # server key -> clock seconds until which it may live
        self._down_until: float | None = None
        self._closed = False
        self._used: dict[bytes, int] = {}  # server key -> bytes, of what this process put or read
        self._written = self._read = self._damaged = self._refused = 0
        self.refresh()

    def put(self, key: ObjectKey, payload: Sequence[Buffer]) -> bool:
        """See `Store.put`. One copy is made: the client takes a value in one piece."""
        views = as_views(payload)
        place = self._place(key)
        known = self._used.get(place) == HEADER_BYTES + total_bytes(views) and key in self
        if known and self._try(lambda: self._client.pexpire(place, self._ttl_ms)):
            return True
        header = Header(key, total_bytes(views), checksum_of(views), dead=False)
        value = b"".join([pack_header(header, self._seal), *views])
        stored = self._try(lambda: self._client.set(place, value, px=self._ttl_ms))
        with self._lock:
            if not stored:
                self._refused += 1
                return False
            self._written += len(value)
            self._note(place, len(value))
        return True

    def get(self, key: ObjectKey, into: Sequence[Buffer]) -> bool:
        """See `Store.get`. Asks the server also for what is not in the index: another engine may have put it."""
        views = as_views(into)
        place = self._place(key)
        value = self._try(lambda: self._client.getex(place, px=self._ttl_ms), missing=b"")
        if value is None:
            return False
        if not value:
            self._forget(place)
            return False
        data = memoryview(value)
        header = parse_header(data[:HEADER_BYTES], self._seal)
        payload = data[HEADER_BYTES:]
        intact = (
            header is not None
            and header.key == key
            and header.length == len(payload) == total_bytes(views)
            and checksum_of([payload]) == header.checksum
        )
        if not intact:
            with self._lock:
                self._damaged += 1
            self._faults.report("damage", f"An object on {self.url} is unreadable or of another length: removed.")
            self.discard(key)
            return False
        scatter(payload, views)
        with self._lock:
            self._read += len(payload)
            self._note(place, len(value))
        return True

    def __contains__(self, key: ObjectKey) -> bool:
        return self._until.get(self._place(key), 0.0) > self._clock()

    def discard(self, key: ObjectKey) -> None:
        """See `Store.discard`."""
        place = self._place(key)
        self._forget(place)
        self._try(lambda: self._client.unlink(place))

    def touch(self, key: ObjectKey) -> None:
        """See `Store.touch`: a new time to live."""
        place = self._place(key)
        if self._try(lambda: self._client.pexpire(place, self._ttl_ms)):
            with self._lock:
                if place in self._until:
                    self._until[place] = self._clock() + self._ttl_ms / 1000

    def refresh(self) -> None:
        """Read the names that the server holds for this fingerprint: one round trip a thousand names of any kind.

        Called at the start and when the server answers again; whoever wants to see other engines' objects in
        `__contains__` calls it from time to time.
        """
        until = self._clock() + self._ttl_ms / 1000
        names = self._try(lambda: list(self._client.scan_iter(self._prefix + b"*", count=_SCAN_COUNT)))
        if names is None:
            return
        length = len(self._prefix) + 1 + NAME_BYTES
        held = {name for name in names if len(name) == length and kind_of(name[len(self._prefix)]) is not None}
        with self._lock:
            held |= {name for name, time_s in self._until.items() if time_s >= until}  # put while the server was asked
            self._until = {name: self._until.get(name, until) for name in held}
            self._used = {name: size for name, size in self._used.items() if name in held}

    def stats(self) -> StoreStats:
        """See `Store.stats`. bytes_used counts what this process put or read, not what others did."""
        with self._lock:
            return StoreStats(
                sum(self._used.values()),
                len(self._until),
                self._written,
                self._read,
                self._damaged,
                self._refused,
            )

    def close(self) -> None:
        """Close the connections; the objects stay on the server until their time is over."""
        with self._lock:
            self._closed = True
            self._until.clear()
            self._used.clear()
        self._client.close()

    def _place(self, key: ObjectKey) -> bytes:
        return self._prefix + bytes([kind_code(key.kind)]) + key.name

    def _note(self, place: bytes, size: int) -> None:
        """Remember that the server holds it; the caller holds the lock."""
        if not self._closed:
            self._until[place] = self._clock() + self._ttl_ms / 1000
            self._used[place] = size

    def _forget(self, place: bytes) -> None:
        with self._lock:
            self._until.pop(place, None)
            self._used.pop(place, None)

    def _try(self, ask: Callable[[], T | None], missing: T | None = None) -> T | None:
        """The server's answer, `missing` for its nil, None when it cannot be asked or refuses."""
        was_down = self._down_until
        if self._closed or (was_down is not None and self._clock() < was_down):
            return None
        if was_down is not None:
            self._down_until = self._clock() + RETRY_S  # one operation tries, the others go on missing
        try:
            answer = ask()
        except self._gone as error:
            self._down_until = self._clock() + RETRY_S
            self._faults.report(
                "gone", f"The cache server {self.url} does not answer and is left alone: {str(error).rstrip('.')}."
            )
            return None
        except (self._error, OSError, ValueError) as error:  # full, read-only, wrong user, closed meanwhile
            self._faults.report("refused", f"The cache server {self.url} refuses: {error}.")
            return None
        if was_down is not None:
            self._down_until = None
            logger.warning("The cache server %s answers again.", self.url)
            self.refresh()
        return missing if answer is None else answer


def _connect(url: str, timeout_s: float) -> tuple[valkey.Valkey, tuple[type[Exception], ...], type[Exception]]:
    """(client, exceptions that mean that the server is gone, base of all others)."""
    try:
        import valkey
        from valkey import exceptions
    except ImportError as error:
        raise ConfigError(
            "The remote cache needs the Valkey client.", "Install it: pip install 'triptych[remote]'."
        ) from error
    try:
        pool = valkey.ConnectionPool.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            socket_read_size=_SOCKET_READ_BYTES,
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"The address of the remote cache, {_without_password(url)!r}, is none: {error}.",
            "Write it as valkey://host:6379/0.",
        ) from error
    gone = (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.BusyLoadingError)
    return valkey.Valkey(connection_pool=pool), gone, exceptions.ValkeyError


def _without_password(url: str) -> str:
    """The address as it may stand in a log."""
    scheme, mark, rest = url.partition("://")
    return scheme + mark + rest.rpartition("@")[2]
