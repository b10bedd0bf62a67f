"""How kernels are timed, and the ceilings of an H200 that floors are made of."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

READ, BF16, FP8 = 4.42e12, 757e12, 1475e12
"""Bytes read and operations a second of one H200, measured (docs/log.md)."""
CALLS, REPLAYS = 20, 7
Figures = dict[str, float | int | str]
"""What was measured of one case: microseconds, and what explains them."""


def timed(calls: list[Callable[[], Any]], launches: int = CALLS) -> float:
    """Microseconds of one call: the median over replays of a CUDA graph of `launches`, of `calls` in turn."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            calls[i % len(calls)]()
    graph.replay()
    return _median(graph.replay) * 1e3 / launches


def against(floor: float, us: float) -> dict[str, float]:
    """Microseconds, the floor below them, and what share of them it is."""
    return {"us": round(us, 2), "floor_us": round(floor, 2), "of_floor": round(floor / us, 3)}


def ceilings() -> tuple[float, float]:
    """Copy bandwidth in bytes/s, read plus written, and bfloat16 FLOP/s of a large product, of this card."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    copy = _seconds(lambda: target.copy_(source))
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = _seconds(lambda: a @ a)
    return 2 * source.nbytes / copy, 2 * 8192**3 / product


def _seconds(call: Callable[[], Any]) -> float:
    call()
    return _median(call) / 1e3


def _median(call: Callable[[], Any]) -> float:
    """Milliseconds on the card."""
    found = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)
