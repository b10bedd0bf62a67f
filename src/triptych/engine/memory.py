"""How much memory there is to plan with. Nothing here allocates."""

from __future__ import annotations

import os
from pathlib import Path


def free_memory() -> int:
    """Bytes of RAM that new allocations can have without swapping; respects a container's limit."""
    free = _meminfo_available()
    limit = _cgroup_headroom()
    return free if limit is None else min(free, limit)


def _meminfo_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    # no /proc (macOS): half of the installed memory is a cautious guess at what is free
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _cgroup_headroom() -> int | None:
    base = Path("/sys/fs/cgroup")
    try:
        limit = (base / "memory.max").read_text().strip()
        used = int((base / "memory.current").read_text())
        return None if limit == "max" else max(0, int(limit) - used)
    except (OSError, ValueError):
        return None
