"""Splits an operation's independent items over threads of our own.

Compiled kernels and the library's products both run without the GIL, so plain threads do. The library's own threads
stay out of it (`torch.set_num_threads(1)`): they spin while they wait, which on a busy machine costs many times more
than it gains. What an item computes never depends on how the items are split.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_workers: ThreadPoolExecutor | None = None
_threads = 1


def set_threads(count: int | None) -> None:
    """How many threads `over` uses from now on; None means one per processor that this process may use."""
    global _workers, _threads
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    _threads = count or available
    torch.set_num_threads(1)
    old, _workers = _workers, None
    if old is not None:
        old.shutdown(wait=False)
    if _threads > 1:
        _workers = ThreadPoolExecutor(_threads - 1, thread_name_prefix="triptych-kernel")


def over(count: int, least: int, run: Callable[[int, int], object]) -> None:
    """Call run(first, last) on disjoint ranges that cover [0, count), side by side.

    A part has at least `least` items: fewer are not worth waking a thread, which takes some 30 µs.
    """
    parts = min(_threads, count // least)
    if parts <= 1 or _workers is None:
        run(0, count)
        return
    edges = [count * i // parts for i in range(parts + 1)]
    others = [_workers.submit(_in_thread, run, edges[i], edges[i + 1]) for i in range(1, parts)]
    try:
        run(edges[0], edges[1])
    finally:
        for other in others:
            other.result()


def _in_thread(run: Callable[[int, int], object], first: int, last: int) -> None:
    with torch.inference_mode():  # a thread-local switch, without which results may not be written in place
        run(first, last)
