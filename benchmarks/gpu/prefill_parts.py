"""Where the time of a prefill chunk goes: each operation of the model, and each kernel, at several positions.

    PYTHONPATH=src python -m benchmarks.gpu.prefill_parts [--layers 4] [--starts 0 57344 253952] [--rows 8192]

Four layers are one of each kind and the first, which has no compressor either. `gpu` is the time between two events
around an operation, `host` what the host needed to enqueue it: where the second is the larger one, the chunk waits for
the host. `wall` is a whole step through the runner. Kernels come from the profiler, where the machine allows it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch

from benchmarks.gpu import made
from benchmarks.gpu.prefill import run, show
from triptych.cache.geometry import CacheCapacity
from triptych.engine.pools import Pools
from triptych.engine.runner import DeviceRunner
from triptych.kernels.registry import KernelSet

Times = dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event, float]]]


def main() -> None:
    """Print tables; keeps no row, since these are parts of what prefill.py measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--starts", type=int, nargs="+", default=[0, 57344, 253952])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--kernels", type=int, default=1, help="0: no profiler")
    given = parser.parse_args()
    runner = runner_of(given.layers, max(given.starts) + given.rows)
    kernels = runner.model.kernels
    for start in given.starts:
        end = start + given.rows
        begun = time.perf_counter()
        step(runner, start, end)
        print(f"== {given.rows} rows at {start}; first time {time.perf_counter() - begun:.1f} s", flush=True)
        walls = [step(runner, start, end) for _ in range(3)]
        print("   wall ms", *(f"{wall * 1e3:.2f}" for wall in walls), flush=True)
        times: Times = {}
        runner.model.use_kernels(watched(kernels, times))
        step(runner, start, end)
        table(times)
        runner.model.use_kernels(kernels)
        if given.kernels:
            show(lambda start=start, end=end: step(runner, start, end))


def runner_of(layers: int, context: int) -> DeviceRunner:
    """A runner for one request of `context` tokens at most."""
    shape = made.shape_of("flash", layers)
    weights = made.released_weights(shape)
    config = made.config_of(context, 1)
    geometry = made.geometry_of(shape, config.cache)
    pools = Pools(shape, geometry, CacheCapacity(made.pages_of(context), 1), torch.device("cuda"), spare=1)
    made.fill_pools(pools)
    return DeviceRunner(weights, config, pools, capture=False)


def step(runner: DeviceRunner, start: int, end: int) -> float:
    """Seconds of one chunk."""
    return run(runner, start, end)


def watched(kernels: KernelSet, times: Times) -> KernelSet:
    """The same operations, timed."""

    def timing(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **more: Any) -> Any:
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            at = time.perf_counter()
            out = work(*args, **more)
            took = time.perf_counter() - at
            ended.record()
            times.setdefault(label(name, args), []).append((begun, ended, took))
            return out

        return timed

    return replace(kernels, **{f.name: timing(f.name, getattr(kernels, f.name)) for f in fields(kernels)})


def label(name: str, args: tuple[Any, ...]) -> str:
    """Operations of different sizes apart."""
    sizes = [f"{a.shape[-2]}x{a.shape[-1]}" for a in args[1:2] if hasattr(a, "shape") and len(a.shape) > 1]
    mode = ""
    if name == "attend":
        mode = "swa" if args[2] is None else f"hca {args[2].most}" if args[3] is None else "csa"
    return " ".join([name, *(sizes if "linear" in name else []), mode]).strip()


def table(times: Times) -> None:
    """Sums by operation, largest first."""
    torch.cuda.synchronize()
    lines = []
    for name, calls in times.items():
        gpu = [begun.elapsed_time(ended) * 1e3 for begun, ended, _ in calls]
        lines.append((sum(gpu), len(calls), name, [round(each) for each in gpu], sum(took for *_, took in calls) * 1e6))
    whole = sum(line[0] for line in lines)
    print(f"   operations: {whole / 1e3:.2f} ms on the GPU, {sum(line[4] for line in lines) / 1e3:.2f} ms of the host")
    for total, count, name, each, host in sorted(lines, reverse=True):
        print(f"   {total:9.0f} us {count:3d} x {name:28s} host {host:7.0f} us   each {each[:6]}", flush=True)


if __name__ == "__main__":
    main()
