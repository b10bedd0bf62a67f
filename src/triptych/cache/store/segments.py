"""The disk tier: append-only segment files, an index in memory, nothing that has to be repaired.

Writing: one record after another into the open segment (`segment.py`), headers and checksums as in `record.py`. There
is no fsync at all. What a killed process had written the kernel still has; what a power cut tears fails its checksum
and is a miss. So nothing is gained by waiting for the disk, and nothing on the disk is ever trusted unread.

Reclaiming: under the quota, or what the file system has room for (`room.py`), whole segments go, the least valuable
first; objects in them that are used more than the average are carried over as long as all bytes written stay below
MAX_AMPLIFICATION x the payload put.

Locks: `_index_lock` guards every dictionary and counter and is held for dictionary work only, never for a system
call on data. `_write_lock` serialises appends, which the file system does anyway for one file; so at most one
record is ever torn. It is taken before the index lock. Reads take the index lock only.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from triptych.cache.store.faultlog import FaultLog
from triptych.cache.store.files import Files
from triptych.cache.store.protocol import Buffer, ObjectKey, StoreStats, as_views, total_bytes
from triptych.cache.store.reclaim import least_valuable, worth_carrying
from triptych.cache.store.record import HEADER_BYTES, Header, checksum_of, pack_header, parse_header, seal_of
from triptych.cache.store.recovery import lock_directory, recover
from triptych.cache.store.room import FULL, Room
from triptych.cache.store.segment import (
    SUPERBLOCK_BYTES,
    Entry,
    Segment,
    aligned,
    data_name,
    pack_superblock,
    place_of,
    write_index,
)
from triptych.errors import ConfigError

logger = logging.getLogger(__name__)

SEGMENT_BYTES = 256 << 20
# every segment keeps a descriptor open, and 1,024 of them is a common limit: larger stores get larger segments
MAX_SEGMENTS = 256
# reclaiming goes by segments, so a small quota needs small ones
MIN_SEGMENTS = 32
# all bytes written / payload bytes put; the promise is 1.3, and index files and headers must fit in, too
MAX_AMPLIFICATION = 1.25
# how often a put makes way on a full disk; segments that are being read free their space late
TRIES = 3


class _Fault(NamedTuple):
    """Why an object is a miss; empty: it was discarded. `mark`: its header is intact and must not be found again."""

    reason: str
    mark: bool = False


class SegmentStore:
    """A `Store` in one directory.

    fingerprint: whatever decides what stored bytes mean (weights, formats, layout); with another one all that the
    directory holds is removed. quota: bytes of all files together, at least a few objects; indexes (64 bytes an
    object) come on top. segment_bytes: where a file ends; by default from the quota. clock: wall-clock seconds.
    Raises ConfigError where the directory cannot be used or another process uses it.
    """

    name = "disk"

    def __init__(
        self,
        directory: Path,
        fingerprint: bytes,
        quota: int,
        segment_bytes: int | None = None,
        clock: Callable[[], float] = time.time,
        files: Files | None = None,
    ) -> None:
        if quota <= 0 or (segment_bytes is not None and segment_bytes <= 0):
            raise ConfigError(
                f"The quota of the disk cache {directory} is {quota} bytes.", "Name a size such as 64GiB."
            )
        self.directory = directory
        self._seal = seal_of(fingerprint)
        self._quota = quota
        self._most_in_segment = segment_bytes
        self._segment_bytes = self._fitting(quota)
        self._clock = clock
        self._files = files or Files()
        self._room = Room(self._files, directory, quota, clock, logger)
        self._faults = FaultLog(logger, time.monotonic)
        self._index_lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._closed = False
        self._written = self._read = self._damaged = self._refused = 0
        self._payload = 0  # payload bytes of successful puts
        self._lock_fd = lock_directory(directory)
        found = recover(self._files, directory, self._seal, self._faults)
        self._index = found.index
        self._segments = found.segments
        self._next_number = found.next_number
        self._open = found.appendable
        for entry in found.superseded:
            self._mark_dead(entry)
        coming = max(0, self._segment_bytes - self._open.end) if self._open else 0
        with self._write_lock:
            self._reclaim_down_to(self._quota - coming, carry=False)
            # on a full disk nothing is given up before something comes that wants its place
            self._segment_bytes = self._fitting(self._room.limit(self._held()))

    def _fitting(self, limit: int) -> int:
        """Where a file ends in a store of `limit` bytes."""
        fitting = max(min(SEGMENT_BYTES, limit // MIN_SEGMENTS), limit // MAX_SEGMENTS)
        return min(self._most_in_segment or fitting, max(1, limit // 4))

    def put(self, key: ObjectKey, payload: Sequence[Buffer]) -> bool:
        """See `Store.put`."""
        views = as_views(payload)
        length = total_bytes(views)
        if self._known(key, length):
            return True
        checksum = checksum_of(views)
        with self._write_lock:
            stored = self._closed is False and (self._known(key, length) or self._append(key, views, checksum))
            if stored:
                self._payload += length
            else:
                self._refused += 1
        return stored

    def get(self, key: ObjectKey, into: Sequence[Buffer]) -> bool:
        """See `Store.get`. A hit counts as a touch."""
        views = as_views(into)
        with self._index_lock:
            entry = self._index.get(key)
            if entry is None:
                return False
            entry.segment.readers += 1
        try:
            fault = self._read_entry(entry, views)
            if fault is None:
                with self._index_lock:
                    self._read += entry.length
                    if self._index.get(key) is entry:
                        entry.segment.touch(entry, self._clock())
                return True
            self._forget_damaged(entry, fault)
            return False
        finally:
            self._let_go(entry.segment)

    def __contains__(self, key: ObjectKey) -> bool:
        return key in self._index

    def discard(self, key: ObjectKey) -> None:
        """See `Store.discard`. The header is marked in place, so that the object stays away after a restart."""
        with self._index_lock:
            entry = self._forget(self._index.get(key))
            if entry is None:
                return
            entry.segment.readers += 1
        try:
            self._mark_dead(entry)
        finally:
            self._let_go(entry.segment)

    def touch(self, key: ObjectKey) -> None:
        """See `Store.touch`."""
        with self._index_lock:
            entry = self._index.get(key)
            if entry is not None:
                entry.segment.touch(entry, self._clock())

    def stats(self) -> StoreStats:
        """See `Store.stats`."""
        with self._index_lock:
            return StoreStats(
                bytes_used=sum(segment.end for segment in self._segments.values()),
                objects=len(self._index),
                bytes_written=self._written,
                bytes_read=self._read,
                damaged=self._damaged,
                refused=self._refused,
                bytes_room=self._room.lately,
            )

    def close(self) -> None:
        """See `Store.close`. Without it the next start reads the headers of what was written since the last index."""
        with self._write_lock:
            if self._closed:
                return
            self._closed = True
            for segment in self._segments.values():
                if segment.writable and not segment.indexed:
                    self._write_index(segment)
            with self._index_lock:
                segments = list(self._segments.values())
                self._index.clear()
                self._segments.clear()
            for segment in segments:
                self._retire(segment)
            os.close(self._lock_fd)

    # --- reading ---

    def _read_entry(self, entry: Entry, views: list[memoryview]) -> _Fault | None:
        """Read header and payload in one call; None when all is as it was put."""
        if total_bytes(views) != entry.length:
            return _Fault(f"it has {entry.length} bytes and {total_bytes(views)} were expected", mark=True)
        raw = bytearray(HEADER_BYTES)
        try:
            if not self._files.read_all(entry.segment.fd, [memoryview(raw), *views], entry.offset):
                return _Fault("the file ends before it does")
        except OSError as error:
            return _Fault(str(error))
        header = parse_header(raw, place_of(self._seal, entry.segment.number, entry.offset))
        if header is None:
            return _Fault("its header is damaged")
        if header.dead:  # discarded after the index file was written, before a crash
            return _Fault("")
        if header.key != entry.key or header.length != entry.length:
            return _Fault("another object lies in its place")
        return None if checksum_of(views) == header.checksum else _Fault("its checksum differs", mark=True)

    def _forget_damaged(self, entry: Entry, fault: _Fault) -> None:
        with self._index_lock:
            if self._closed or self._forget(entry) is None or not fault.reason:
                return
            self._damaged += 1
        self._faults.report(
            "damage",
            f"An object in {entry.segment.path} at {entry.offset} is unreadable and forgotten: {fault.reason}.",
        )
        if fault.mark:
            self._mark_dead(entry)

    def _let_go(self, segment: Segment) -> None:
        with self._index_lock:
            segment.readers -= 1
            last = segment.retired and segment.readers == 0
        if last:
            self._files.close(segment.fd)

    # --- the index; callers hold the index lock ---

    def _forget(self, entry: Entry | None) -> Entry | None:
        """Drop the entry from the index; None when it is no longer there."""
        if entry is None or self._index.get(entry.key) is not entry:
            return None
        del self._index[entry.key]
        entry.segment.remove(entry)
        return entry

    def _known(self, key: ObjectKey, length: int) -> bool:
        """Whether the object is there; takes the index lock, and touches it."""
        with self._index_lock:
            entry = self._index.get(key)
            if entry is None or entry.length != length:
                return False
            entry.segment.touch(entry, self._clock())
            return True

    # --- writing; callers hold the write lock ---

    def _append(self, key: ObjectKey, views: list[memoryview], checksum: bytes, replaced: Entry | None = None) -> bool:
        """Write one record and make it visible. `replaced`: copy of this entry, valid only while that is current."""
        header = Header(key, total_bytes(views), checksum, dead=False)
        record = aligned(HEADER_BYTES + header.length)
        reclaim = replaced is None and self._room.helps  # whoever carries is making way already
        for _ in range(TRIES if reclaim else 1):
            try:
                segment = self._segment_for(record, reclaim)
                if segment is None:
                    return False
                entry = Entry(key, segment, segment.end, header.length, self._clock())
                self._write_record(segment, header, views)
                return self._publish(entry, record, replaced)
            except OSError as error:
                if error.errno not in FULL:
                    self._faults.report("write", f"The disk cache {self.directory} cannot be written: {error}.")
                    return False
            self._room.met(self._held(), record)
            if reclaim:
                self._close_open()
        if reclaim:
            self._room.no_help()
        return False

    def _write_record(self, segment: Segment, header: Header, views: list[memoryview]) -> None:
        """All of it at the segment's end, or nothing and an OSError."""
        raw = pack_header(header, place_of(self._seal, segment.number, segment.end))
        try:
            self._files.write_all(segment.fd, [raw, *views], segment.end)
        except OSError:
            self._cut(segment, segment.end)
            raise
        self._room.found()

    def _publish(self, entry: Entry, record: int, replaced: Entry | None) -> bool:
        with self._index_lock:
            entry.segment.end = entry.offset + record
            self._written += record
            current = self._index.get(entry.key)
            stale = replaced is not None and current is not replaced
            if not stale:
                self._forget(current)
                if replaced is not None:
                    entry.touched = replaced.touched
                self._index[entry.key] = entry
                entry.segment.add(entry)
            if current is not None:
                current.segment.readers += 1
        try:
            if stale:  # discarded while it was copied
                self._mark_dead(entry)
            elif current is not None and replaced is None:  # or it would come back when the new one is discarded
                self._mark_dead(current)
        finally:
            if current is not None:
                self._let_go(current.segment)
        return not stale

    def _segment_for(self, record: int, reclaim: bool) -> Segment | None:
        """The segment to append `record` bytes to; None where there is no room. Raises OSError.

        `reclaim`: whether others may go for a new one.
        """
        segment = self._open
        if segment is not None and segment.end + record <= self._segment_bytes:
            return segment
        limit = self._room.limit(self._held())
        self._segment_bytes = self._fitting(limit)
        # room for the coming segment and for what reclaiming carries over, which is at most half a segment
        ahead = max(self._segment_bytes, SUPERBLOCK_BYTES + record) + self._segment_bytes // 2
        if ahead > self._quota:
            self._faults.report("size", f"An object of {record} bytes is too large for the quota of {self.directory}.")
        if ahead > limit:
            return None
        self._close_open()
        if reclaim:
            if not self._reclaim_down_to(limit - ahead, carry=True):
                return None
            if self._open is not None:  # opened for what was carried over
                return self._segment_for(record, reclaim)
        self._open = self._new_segment()
        return self._open

    def _close_open(self) -> None:
        """Nothing is appended to the open segment any more."""
        segment, self._open = self._open, None
        if segment is not None:
            self._write_index(segment)

    def _new_segment(self) -> Segment:
        number = self._next_number
        path = self.directory / data_name(number)
        fd = self._files.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        self._next_number += 1
        try:
            self._files.write_all(fd, [pack_superblock(self._seal, number)], 0)
        except OSError:
            self._files.close(fd)
            self._unlink(path)
            raise
        segment = Segment(number, path, fd, writable=True)
        with self._index_lock:
            self._segments[number] = segment
            self._written += SUPERBLOCK_BYTES
        return segment

    def _cut(self, segment: Segment, offset: int) -> None:
        """Take a half-written record away. Where that fails, too, the next one overwrites it or a scan skips it."""
        try:
            self._files.truncate(segment.fd, offset)
        except OSError as error:
            self._faults.report("cut", f"The end of {segment.path} cannot be cut off: {error}.")

    def _reclaim_down_to(self, limit: int, carry: bool) -> bool:
        """Drop segments until all files together have at most `limit` bytes; False where that is not possible."""
        while self._held() > limit:
            with self._index_lock:
                closed = [segment for segment in self._segments.values() if segment is not self._open]
                victim = least_valuable(closed, self._clock())
                budget = self._carry_budget(victim) if victim is not None and carry else 0
                carried = worth_carrying(victim, self._segments.values(), budget) if victim and budget > 0 else []
            if victim is None:
                return False
            for entry in carried:
                self._carry(entry)
            self._drop(victim)
        return True

    def _held(self) -> int:
        """Bytes of all files, as far as the quota is concerned."""
        return sum(segment.end for segment in self._segments.values())

    def _carry_budget(self, victim: Segment) -> int:
        half = min(victim.end, self._segment_bytes) // 2 - 2 * SUPERBLOCK_BYTES
        return min(half, int(MAX_AMPLIFICATION * self._payload) - self._written)

    def _carry(self, entry: Entry) -> None:
        payload = [memoryview(bytearray(entry.length))]
        fault = self._read_entry(entry, payload)
        if fault is None:
            self._append(entry.key, payload, checksum_of(payload), replaced=entry)

    def _drop(self, segment: Segment) -> None:
        with self._index_lock:
            del self._segments[segment.number]
            for entry in list(segment.live.values()):
                self._forget(entry)
        self._unlink(segment.index_path)
        self._unlink(segment.path)
        self._retire(segment)

    def _retire(self, segment: Segment) -> None:
        """Close the descriptor, or have the last reader do it."""
        with self._index_lock:
            segment.retired = True
            now = segment.readers == 0
        if now:
            self._files.close(segment.fd)

    def _unlink(self, path: Path) -> None:
        try:
            self._files.unlink(path)
        except OSError as error:
            self._faults.report("remove", f"The disk cache file {path} cannot be removed: {error}.")

    def _mark_dead(self, entry: Entry) -> None:
        """Overwrite the header by one that says so. The caller sees to it that the segment's descriptor stays open."""
        if not entry.segment.writable:
            return
        with self._index_lock:
            stale, entry.segment.has_index = entry.segment.has_index, False
        if stale:  # after a crash the headers are read instead, and this one says that it is dead
            self._unlink(entry.segment.index_path)
        header = Header(entry.key, entry.length, bytes(16), dead=True)
        raw = pack_header(header, place_of(self._seal, entry.segment.number, entry.offset))
        try:
            self._files.write_all(entry.segment.fd, [raw], entry.offset)
        except OSError as error:
            self._faults.report("write", f"The disk cache {self.directory} cannot be written: {error}.")
            return
        with self._index_lock:
            self._written += HEADER_BYTES

    def _write_index(self, segment: Segment) -> None:
        with self._index_lock:
            entries = sorted(segment.live.values(), key=lambda entry: entry.offset)
            segment.indexed = True
        try:
            count = write_index(self._files, segment, self._seal, entries)
        except OSError as error:
            with self._index_lock:
                segment.indexed = False  # close tries again
            if error.errno in FULL:  # what was written of it takes room that records need
                self._unlink(segment.index_path.with_suffix(".index.new"))
            else:
                self._faults.report("index", f"The index of {segment.path} cannot be written: {error}.")
            return
        with self._index_lock:
            self._written += count
            segment.has_index = segment.indexed
        if not segment.has_index:  # something changed meanwhile; close writes it again
            self._unlink(segment.index_path)
