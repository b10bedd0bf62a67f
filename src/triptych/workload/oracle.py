"""When each page of a trace is asked for: what the offline bound (Belady) knows and no cache can."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable

from triptych.cache.prefix import page_keys
from triptych.workload.traces import TraceRequest


class Future:
    """Times of use by page. `root(tenant)` gives the parent key of a tenant's first pages, as the manager has it."""

    def __init__(self, requests: Iterable[tuple[float, TraceRequest]], root: Callable[[str], bytes]) -> None:
        self._uses: dict[bytes, array[float]] = {}
        for time, request in requests:
            for key in page_keys(root(request.tenant), request.prompt):
                uses = self._uses.get(key)
                if uses is None:
                    uses = self._uses[key] = array("d")
                uses.append(time)

    def next_use(self, key: bytes, now: float) -> float:
        """The first use after `now`; infinity if there is none."""
        uses = self._uses.get(key)
        if uses is None:
            return math.inf
        at = bisect_right(uses, now)
        return uses[at] if at < len(uses) else math.inf
