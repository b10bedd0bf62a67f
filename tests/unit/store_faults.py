"""Faults for tests: a store that fails as real ones do, and a file layer that fails below the disk store."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from triptych.cache.store.files import Files
from triptych.cache.store.protocol import Buffer, ObjectKey, Store, StoreStats, as_views


def key_of(number: int, kind: str = "page") -> ObjectKey:
    """A distinct key for each number."""
    return ObjectKey(kind, number.to_bytes(32, "little"))  # type: ignore[arg-type]


def object_of(number: int, size: int) -> bytes:
    """`size` bytes that belong to this number and size and to no other."""
    return random.Random(number * 1_000_003 + size).randbytes(size)


def fetch(store: Store, key: ObjectKey, size: int) -> bytes | None:
    """The object, or None for a miss."""
    into = bytearray(size)
    return bytes(into) if store.get(key, [into]) else None


class FaultyStore:
    """Wraps a Store. `fault(operation, key)` is asked before each put and get and names what happens:

    "ok"; "fail": False without effect; "corrupt" (get): the buffers are scribbled on and the object is gone, as after a
    checksum that differs; "delay": the operation takes `delay_s` longer. `faults` counts what was injected.
    """

    def __init__(self, inner: Store, fault: Callable[[str, ObjectKey], str], delay_s: float = 0.001) -> None:
        self.name = inner.name
        self._inner = inner
        self._fault = fault
        self._delay_s = delay_s
        self.faults: dict[str, int] = {}

    def put(self, key: ObjectKey, payload: Sequence[Buffer]) -> bool:
        return self._meet("put", key) != "fail" and self._inner.put(key, payload)

    def get(self, key: ObjectKey, into: Sequence[Buffer]) -> bool:
        fault = self._meet("get", key)
        if fault == "corrupt":
            for view in as_views(into):
                view[:] = b"\xa5" * len(view)
            self._inner.discard(key)
            return False
        return fault != "fail" and self._inner.get(key, into)

    def __contains__(self, key: ObjectKey) -> bool:
        return key in self._inner

    def discard(self, key: ObjectKey) -> None:
        self._inner.discard(key)

    def touch(self, key: ObjectKey) -> None:
        self._inner.touch(key)

    def stats(self) -> StoreStats:
        return self._inner.stats()

    def close(self) -> None:
        self._inner.close()

    def _meet(self, operation: str, key: ObjectKey) -> str:
        fault = self._fault(operation, key)
        if fault != "ok":
            self.faults[fault] = self.faults.get(fault, 0) + 1
        if fault == "delay":
            time.sleep(self._delay_s)
        return fault


class Killed(BaseException):
    """The process ends here; no handler of ordinary errors may survive it."""


class FaultyFiles(Files):
    """A file layer with a full or read-only or broken disk, or a process that dies at its nth system call.

    room: bytes that can still be written, whatever is removed; then ENOSPC, after what fits has been written.
    capacity: bytes that all files of a directory may have, `others` of them taken by somebody else; `reports`: whether
    the file system says how little is free, or only a write that fails does, as with a user's own limit.
    read_error, write_error: errno of every read, or of everything that changes the disk. die_at: number of the
    changing call that is cut short.
    """

    def __init__(self) -> None:
        self.room: int | None = None
        self.capacity: int | None = None
        self.others = 0
        self.reports = True
        self.directory: Path | None = None
        self.read_error: int | None = None
        self.write_error: int | None = None
        self.die_at: int | None = None
        self.changes = 0

    def open(self, path: Path, flags: int) -> int:
        if flags & (os.O_CREAT | os.O_RDWR | os.O_WRONLY):
            self._fail(self.write_error)
        if flags & os.O_CREAT:
            self._change()
            if self.capacity is not None and not path.exists() and self._left(path.parent) < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.directory = path.parent
        return super().open(path, flags)

    def free(self, directory: Path) -> int:
        free = super().free(directory)
        if not self.reports:
            return free
        if self.room is not None:
            free = min(free, self.room)
        return free if self.capacity is None else max(0, min(free, self._left(directory)))

    def _left(self, directory: Path) -> int:
        assert self.capacity is not None
        used = sum(path.stat().st_size for path in directory.iterdir() if path.name.startswith("segment-"))
        return self.capacity - self.others - used

    def readv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._fail(self.read_error)
        return super().readv(fd, buffers, offset)

    def writev(self, fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> int:
        self._fail(self.write_error)
        data = b"".join(buffers)
        if self.die_at is not None and self.changes == self.die_at:
            os.pwrite(fd, data[: len(data) * 2 // 3], offset)
        self._change()
        if self.room is not None:
            if self.room <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data = data[: self.room]
            self.room -= len(data)
        if self.capacity is not None and self.directory is not None:
            fits = os.fstat(fd).st_size + max(0, self._left(self.directory)) - offset
            if fits <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data = data[:fits]
        return os.pwrite(fd, data, offset)

    def truncate(self, fd: int, length: int) -> None:
        self._fail(self.write_error)
        self._change()
        super().truncate(fd, length)

    def rename(self, source: Path, target: Path) -> None:
        self._fail(self.write_error)
        self._change()
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._fail(self.write_error)
        self._change()
        super().unlink(path)

    def _change(self) -> None:
        if self.die_at is not None and self.changes >= self.die_at:
            raise Killed
        self.changes += 1

    @staticmethod
    def _fail(number: int | None) -> None:
        if number is not None:
            raise OSError(number, os.strerror(number))
