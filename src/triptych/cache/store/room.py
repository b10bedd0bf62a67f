"""How much a store on disk may hold: its quota, or what the file system has, where that is less.

The file system is asked anew for each segment, so a store makes way for others who fill the disk, and takes the space
again when they leave. Limits that it does not report, as a user's own, show when a write fails: then what is held at
that moment is the limit, which is lifted step by step, because nobody says when such a limit is gone.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from pathlib import Path

from triptych.cache.store.files import Files

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""What the system says when there is no more room, on the file system or for this user."""

LIFT_S = 60.0
"""Seconds after which a limit that the file system does not report is tried at twice its size, and after which more is
given up where giving up did not help."""

RESERVE = 64
"""One part in so many of what fits is left free: for index files, which the quota does not count, and for others."""


class Room:
    """The limit of one store. `quota`: bytes that it may take at most; `clock`: seconds. Not thread-safe."""

    def __init__(
        self, files: Files, directory: Path, quota: int, clock: Callable[[], float], logger: logging.Logger
    ) -> None:
        self._files = files
        self._directory = directory
        self._quota = quota
        self._clock = clock
        self._logger = logger
        self._unreported: tuple[float, int] | None = None  # when a limit was met that nobody reports, and bytes
        self._no_help: float | None = None
        self._told = False
        self.lately = quota
        """The limit when it was last asked for."""

    @property
    def helps(self) -> bool:
        """Whether giving something up is likely to make room: not if that has just failed, as where others take at
        once what becomes free, or snapshots of the file system keep it."""
        return self._no_help is None or self._clock() - self._no_help >= LIFT_S

    def no_help(self) -> None:
        """Something was given up, and there was no room nevertheless."""
        self._no_help = self._clock()

    def found(self) -> None:
        """There was room for a write."""
        self._no_help = None

    def limit(self, held: int) -> int:
        """Bytes that a store which holds `held` now may hold. Says so, once, when that is less than the quota."""
        limit = min(self._quota, self._reported(held))
        if self._unreported is not None:
            since, least = self._unreported
            least <<= int(max(0.0, self._clock() - since) / LIFT_S)
            if least < self._quota:
                limit = min(limit, least)
            else:
                self._unreported = None
        self._tell(limit)
        self.lately = max(0, limit)
        return limit

    def met(self, held: int, wanted: int) -> None:
        """A write of `wanted` bytes found no room while the store held `held`."""
        if self._free() >= wanted:  # or the next limit is right by itself
            self._unreported = self._clock(), max(held, 4 * wanted)
        self._tell(min(held, self._quota - 1))

    def _reported(self, held: int) -> int:
        fits = held + self._free()
        return fits - fits // RESERVE

    def _free(self) -> int:
        try:
            return self._files.free(self._directory)
        except OSError:  # then writes will tell
            return self._quota

    def _tell(self, limit: int) -> None:
        if limit >= self._quota:
            if self._told:
                self._logger.info("The disk cache %s has room for all its %s again.", self._directory, _size(limit))
            self._told = False
        elif not self._told:
            self._told = True
            self._logger.warning(
                "The disk cache %s may take %s, but its file system has room for %s only: it keeps to that, and gives "
                "up earlier what was not used for long. Free some space, or lower --disk-memory.",
                self._directory,
                _size(self._quota),
                _size(max(0, limit)),
            )


def _size(count: int) -> str:
    for unit, shift in (("GiB", 30), ("MiB", 20)):
        if count >> shift:
            return f"{count / (1 << shift):.1f} {unit}"
    return f"{count / 1024:.1f} KiB"
