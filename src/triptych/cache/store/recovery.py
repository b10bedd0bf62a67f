"""Opening a directory: take the lock, read every segment's index or headers, sort out what is not ours."""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass, field
from pathlib import Path

from triptych.cache.store.faultlog import FaultLog
from triptych.cache.store.files import Files
from triptych.cache.store.protocol import ObjectKey
from triptych.cache.store.record import HEADER_BYTES
from triptych.cache.store.segment import (
    SUPERBLOCK_BYTES,
    Entry,
    Segment,
    aligned,
    number_of,
    owner,
    pack_superblock,
    read_index,
    scan,
)
from triptych.errors import ConfigError

_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass
class Recovered:
    """What a directory holds. `next_number`: above that of every file there; `appendable`: the last segment, cut behind
    its last record, if it can be written; `superseded`: older records of objects that were found again later.
    """

    segments: dict[int, Segment] = field(default_factory=dict)
    index: dict[ObjectKey, Entry] = field(default_factory=dict)
    next_number: int = 0
    appendable: Segment | None = None
    superseded: list[Entry] = field(default_factory=list)


def lock_directory(directory: Path) -> int:
    """Create the directory, lock it for this process and return the descriptor that holds the lock.

    The lock is on the directory itself: it works where nothing can be written, leaves no file behind and ends with
    the process, however that ends. Raises ConfigError.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise ConfigError(
            f"The disk cache directory {directory} cannot be used: {reason}.",
            "Name a directory that this user may read and write.",
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if isinstance(error, BlockingIOError):
            raise ConfigError(
                f"The disk cache directory {directory} is in use by another process.",
                "Give each server a directory of its own, or stop the other one.",
            ) from error
        raise ConfigError(
            f"The disk cache directory {directory} cannot be locked: {error.strerror}.",
            "Name a directory on a local file system.",
        ) from error
    return fd


def recover(files: Files, directory: Path, seal: bytes, faults: FaultLog) -> Recovered:
    """Read what is there. Files of another seal are removed; files whose names are not the store's are left alone."""
    found = Recovered()
    try:
        numbered = sorted((number, name) for name in files.names(directory) if (number := number_of(name)) is not None)
    except OSError as error:
        faults.report("open", f"The disk cache {directory} cannot be listed and starts empty: {error}.")
        return found
    reader = _Reader(files, seal, faults, found)
    with_data = {number for number, name in numbered if name.endswith(".data")}
    for number, name in numbered:
        found.next_number = number + 1
        if name.endswith(".data"):
            reader.read(directory / name, number)
        elif number not in with_data or name.endswith(".new"):
            _unlink(files, directory / name, faults)
    if reader.foreign:
        faults.report(
            "fingerprint",
            f"The disk cache {directory} held {reader.foreign} segments of other weights, formats or layout;"
            " they are removed.",
        )
    for path in reader.worthless:
        _unlink(files, path.with_suffix(".index"), faults)
        _unlink(files, path, faults)
    last = found.segments.get(found.next_number - 1)
    if last is not None and last.writable and _cut(files, last, faults):
        found.appendable = last
    for segment in found.segments.values():
        if segment is not found.appendable:
            segment.end = max(segment.end, _size(files, segment))
    return found


class _Reader:
    def __init__(self, files: Files, seal: bytes, faults: FaultLog, found: Recovered) -> None:
        self._files = files
        self._seal = seal
        self._faults = faults
        self._found = found
        self.worthless: list[Path] = []
        self.foreign = 0

    def read(self, path: Path, number: int) -> None:
        try:
            segment = _open_segment(self._files, path, number)
        except OSError as error:
            self._faults.report(
                "open", f"The disk cache segment {path} cannot be opened, its objects are lost: {error}."
            )
            return
        try:
            belongs = owner(self._files, segment, self._seal)
            entries = [] if belongs is False else _load(self._files, segment, self._seal, self._faults)
        except OSError as error:
            # kept and never appended to: it may be readable again at the next start
            self._faults.report("open", f"The disk cache segment {path} cannot be read, its objects are lost: {error}.")
            segment.writable = False
            self._found.segments[number] = segment
            return
        if belongs is not True and not entries:
            self.worthless.append(path)
            self.foreign += belongs is False
            self._files.close(segment.fd)  # without a line for an empty file: a crash just after it was made
            return
        if belongs is None:
            self._restore_superblock(segment)
        self._found.segments[number] = segment
        for entry in entries:
            older = self._found.index.get(entry.key)
            if older is not None:  # a crash between the copy of an object and the removal of its old segment
                older.segment.remove(older)
                self._found.superseded.append(older)
            self._found.index[entry.key] = entry
            segment.add(entry)

    def _restore_superblock(self, segment: Segment) -> None:
        """Its records have proved whose it is; with a superblock the next start need not ask them."""
        self._faults.report("superblock", f"The first bytes of {segment.path} were damaged; its objects are not.")
        try:
            if segment.writable:
                self._files.write_all(segment.fd, [pack_superblock(self._seal, segment.number)], 0)
        except OSError as error:
            self._faults.report("write", f"The disk cache segment {segment.path} cannot be written: {error}.")


def _open_segment(files: Files, path: Path, number: int) -> Segment:
    try:
        return Segment(number, path, files.open(path, os.O_RDWR), writable=True)
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise
    return Segment(number, path, files.open(path, os.O_RDONLY), writable=False)


def _load(files: Files, segment: Segment, seal: bytes, faults: FaultLog) -> list[Entry]:
    """Objects from the index file as far as it goes, from headers beyond it. Sets the segment's end."""
    size = files.size(segment.fd)
    entries: list[Entry] = []
    try:
        indexed = read_index(files, segment, seal)
    except OSError as error:
        faults.report("index", f"The index {segment.index_path} cannot be read; headers are read instead: {error}.")
        indexed = None
    if indexed is not None:
        segment.has_index = True
        entries = [e for e in indexed[0] if e.offset + HEADER_BYTES + e.length <= size]
        segment.end = indexed[1]
        if len(entries) < len(indexed[0]) or segment.end > aligned(size):
            # cut since: what the file no longer holds is no object, and an index that says so must not outlive
            # the next record written there
            segment.end = max((aligned(e.offset + HEADER_BYTES + e.length) for e in entries), default=SUPERBLOCK_BYTES)
            segment.writable = segment.writable and _unlink(files, segment.index_path, faults)
    written = files.modified(segment.fd)
    for offset, header in scan(files, segment, seal, min(segment.end, aligned(size))):
        segment.end = aligned(offset + HEADER_BYTES + header.length)
        if not header.dead:
            entries.append(Entry(header.key, segment, offset, header.length, written))
    return entries


def _cut(files: Files, segment: Segment, faults: FaultLog) -> bool:
    """Take away what lies behind the last whole record: a put that the process did not live to finish."""
    try:
        if files.size(segment.fd) > segment.end:
            files.truncate(segment.fd, segment.end)
    except OSError as error:
        faults.report("cut", f"The end of {segment.path} cannot be cut off: {error}.")
        return False
    return True


def _size(files: Files, segment: Segment) -> int:
    """Bytes of the file, as far as the quota is concerned; 0 where that cannot be known."""
    try:
        return aligned(files.size(segment.fd))
    except OSError:
        return 0


def _unlink(files: Files, path: Path, faults: FaultLog) -> bool:
    try:
        files.unlink(path)
    except OSError as error:
        faults.report("remove", f"The disk cache file {path} cannot be removed: {error}.")
        return False
    return True
