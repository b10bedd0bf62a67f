"""What every store below the device promises: whole immutable objects by name, exact bytes or a miss.

A store is a place where losing an object costs time and a wrong byte costs a wrong answer. So a store never raises
out of `put` or `get`: what cannot be kept is refused, what cannot be read exactly is a miss, and both are logged
once per kind of fault and counted in `StoreStats`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias

# collections.abc.Buffer needs Python 3.12; tensors and arrays come as memoryviews of their memory
Buffer: TypeAlias = bytes | bytearray | memoryview
Kind: TypeAlias = Literal["page", "snapshot"]

NAME_BYTES = 32


class ObjectKey(NamedTuple):
    """The name of one object. `name`: 32 bytes, the chained keyed hash of the prefix that the object belongs to.

    The hash already contains the weights' fingerprint, the formats and the tenant's salt: equal keys, equal bytes.
    """

    kind: Kind
    name: bytes


class StoreStats(NamedTuple):
    """Gauges (bytes_used, objects) and counters since the store was opened.

    bytes_used: bytes held of the quota, dead objects and padding included. bytes_written: everything handed to the
    medium, also headers, indexes and objects that were moved; divided by the payload bytes of successful puts it is
    the write amplification. bytes_read: payload bytes of successful gets. damaged: objects that were found unreadable
    and forgotten. refused: puts that returned False. bytes_room: what bytes_used may come to; 0: not known.
    """

    bytes_used: int = 0
    objects: int = 0
    bytes_written: int = 0
    bytes_read: int = 0
    damaged: int = 0
    refused: int = 0
    bytes_room: int = 0


class Store(Protocol):
    """Objects by key. All methods may be called from several threads at once; none but the constructor raises."""

    name: str

    def put(self, key: ObjectKey, payload: Sequence[Buffer]) -> bool:
        """Keep the concatenation of `payload`, bytes that must not change meanwhile.

        True: kept, or already there with this length. False: not kept (full, read-only, broken, unreachable).
        Atomic: after a crash the object is there as a whole or not at all.
        """
        ...

    def get(self, key: ObjectKey, into: Sequence[Buffer]) -> bool:
        """Fill the writable buffers `into`, whose lengths together are the object's.

        True: they hold exactly what was put. False: absent, or damaged (also: of another length) and now forgotten;
        then the contents of the buffers are undefined.
        """
        ...

    def __contains__(self, key: ObjectKey) -> bool:
        """Whether a get is expected to succeed; from memory, in microseconds."""
        ...

    def discard(self, key: ObjectKey) -> None:
        """Forget the object, also across a restart where the medium can be written. Absent keys are fine."""
        ...

    def touch(self, key: ObjectKey) -> None:
        """Say that the object is still wanted: what was touched last is given up last. Absent keys are fine."""
        ...

    def stats(self) -> StoreStats:
        """Counters and gauges, cheap enough to be read at every scrape."""
        ...

    def close(self) -> None:
        """Write what makes the next start fast, and let go. Afterwards everything is a miss. May be called twice."""
        ...


def as_views(buffers: Sequence[Buffer]) -> list[memoryview]:
    """The buffers as views of plain bytes, without a copy. Raises TypeError for memory that is not contiguous."""
    return [memoryview(buffer).cast("B") for buffer in buffers]


def total_bytes(views: Sequence[memoryview]) -> int:
    """Sum of the lengths of byte views."""
    return sum(len(view) for view in views)
