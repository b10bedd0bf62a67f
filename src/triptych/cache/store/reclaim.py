"""Which segment to give up, and which of its objects to take along. Pure choices over counters."""

from __future__ import annotations

from collections.abc import Collection

from triptych.cache.store.record import HEADER_BYTES
from triptych.cache.store.segment import Entry, Segment, aligned

# seconds; segments whose objects were used this close together are equally recent
RECENT_S = 60.0


def least_valuable(segments: Collection[Segment], now: float) -> Segment | None:
    """The segment that loses least per byte freed.

    The chance of a reuse falls with the time since the last use, about as its inverse; so a segment is worth its
    live bytes over the age of their mean last touch, and costs its length. Dead bytes are worth nothing.
    """
    return min(segments, key=lambda segment: _value(segment, now), default=None)


def worth_carrying(victim: Segment, segments: Collection[Segment], budget: int) -> list[Entry]:
    """Objects of the victim that were used later than the store's average, last used first, up to `budget` bytes.

    Where nothing was ever touched again the victim is the oldest segment, below the average, and none is carried.
    """
    live_bytes = sum(segment.live_bytes for segment in segments)
    if not live_bytes:
        return []
    mean = sum(segment.weight for segment in segments) / live_bytes
    carried = []
    for entry in sorted(victim.live.values(), key=lambda entry: entry.touched, reverse=True):
        budget -= record_bytes(entry)
        if entry.touched <= mean or budget < 0:
            break
        carried.append(entry)
    return carried


def record_bytes(entry: Entry) -> int:
    """Bytes of the object in its file."""
    return aligned(HEADER_BYTES + entry.length)


def _value(segment: Segment, now: float) -> float:
    if not segment.live_bytes:
        return 0.0
    age = max(0.0, now - segment.weight / segment.live_bytes)
    return segment.live_bytes / (segment.end * (RECENT_S + age))
