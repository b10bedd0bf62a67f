"""The few system calls that the disk store makes, in one class, so that tests can put faults between."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

# Linux and macOS take at most this many buffers in one call
_IOV_MAX = 1024


class Files:
    """Positioned reads and writes without a copy. Every method may raise OSError."""

    def open(self, path: Path, flags: int) -> int:
        """A descriptor; never inherited by child processes."""
        return os.open(path, flags | os.O_CLOEXEC, 0o600)

    def close(self, fd: int) -> None:
        """Give the descriptor back."""
        os.close(fd)

    def readv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Bytes read, fewer than asked at the end of the file."""
        return os.preadv(fd, buffers, offset)

    def writev(self, fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> int:
        """Bytes written, which may be fewer than given."""
        return os.pwritev(fd, buffers, offset)

    def truncate(self, fd: int, length: int) -> None:
        """Cut the file."""
        os.ftruncate(fd, length)

    def size(self, fd: int) -> int:
        """Bytes in the file."""
        return os.fstat(fd).st_size

    def modified(self, fd: int) -> float:
        """Seconds since the epoch of the last write."""
        return os.fstat(fd).st_mtime

    def free(self, directory: Path) -> int:
        """Bytes that the file system of `directory` still has for this user, as far as it tells."""
        return shutil.disk_usage(directory).free

    def names(self, directory: Path) -> list[str]:
        """Names in the directory, unsorted."""
        return os.listdir(directory)

    def rename(self, source: Path, target: Path) -> None:
        """Replace `target` in one step."""
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        """Remove the name; an absent one is fine."""
        path.unlink(missing_ok=True)

    def read_all(self, fd: int, buffers: Sequence[memoryview], offset: int) -> bool:
        """Fill all buffers from `offset` on; False where the file ends before."""
        left = list(buffers)
        if len(left) <= _IOV_MAX:  # nearly always one call does it, and 500 kB take only 60 us
            count = self.readv(fd, left, offset)
            if count == sum(map(len, left)):
                return True
            offset += count
            _consume(left, count)
        while left := [view for view in left if len(view)]:
            count = self.readv(fd, left[:_IOV_MAX], offset)
            if count == 0:
                return False
            offset += count
            _consume(left, count)
        return True

    def write_all(self, fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        """Write all buffers at `offset`. Raises OSError, and then any part of them may have been written."""
        left = [memoryview(buffer) for buffer in buffers]
        while left := [view for view in left if len(view)]:
            count = self.writev(fd, left[:_IOV_MAX], offset)
            if count == 0:
                raise OSError(errno.EIO, "the file system wrote nothing and gave no reason")
            offset += count
            _consume(left, count)

    def read_bytes(self, fd: int, count: int, offset: int) -> bytes:
        """Up to `count` bytes; fewer at the end of the file."""
        buffer = bytearray(count)
        done = 0
        while done < count:
            step = self.readv(fd, [memoryview(buffer)[done:]], offset + done)
            if step == 0:
                break
            done += step
        return bytes(buffer[:done])


def _consume(views: list[memoryview], count: int) -> None:
    for i, view in enumerate(views):
        step = min(count, len(view))
        views[i] = view[step:]
        count -= step
        if count == 0:
            return
