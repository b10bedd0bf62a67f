"""One log line for a fault, not one for each of the ten thousand objects that it hits."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

REPEAT_S = 60.0


class FaultLog:
    """Warnings limited per kind of fault: the first at once, then at most one in REPEAT_S with the number left out."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float], repeat_s: float = REPEAT_S) -> None:
        self._logger = logger
        self._clock = clock
        self._repeat_s = repeat_s
        self._lock = threading.Lock()
        self._last: dict[str, tuple[float, int]] = {}  # kind -> when a line was written, lines left out since

    def report(self, kind: str, message: str) -> None:
        """Log `message`, unless a line of this kind was written a moment ago."""
        now = self._clock()
        with self._lock:
            last, left_out = self._last.get(kind, (-float("inf"), 0))
            if now - last < self._repeat_s:
                self._last[kind] = last, left_out + 1
                return
            self._last[kind] = now, 0
        more = f" ({left_out} more of this kind since the last line)" if left_out else ""
        self._logger.warning("%s%s", message, more)
