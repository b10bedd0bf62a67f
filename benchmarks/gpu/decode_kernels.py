"""Where a decode step's time goes: a few layers of V4-Flash with random released weights, by kernel.

    python -m benchmarks.gpu.decode_kernels [--layers N] [--batch N ...] [--context N ...]

Prints for each case the median of graph replays, launches a layer, and the kernels by their time in the profiler.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triptych.cache.geometry import CacheCapacity, CacheGeometry
from triptych.config import CSA_LAYER, HCA_LAYER, PAGE, SHAPES, WINDOW, ModelShape
from triptych.engine.batching import build_batch
from triptych.engine.device import on_device
from triptych.engine.pools import Pools
from triptych.kernels.registry import select
from triptych.model.batch import DecodeBatch
from triptych.model.transformer import Transformer
from triptych.model.weights import ModelWeights, WeightStore, in_tiles
from triptych.words import Chunk

REPLAYS = 9


def shape_of(layers: int) -> ModelShape:
    """V4-Flash with its CSA and HCA layers in turn, learned routing."""
    ratios = tuple(CSA_LAYER if i % 2 == 0 else HCA_LAYER for i in range(layers))
    return replace(SHAPES["flash"], ratios=ratios, num_hash_layers=0, num_mtp_layers=0)


def random_weights(shape: ModelShape) -> ModelWeights:
    """Released formats on the GPU, filled with finite random values."""
    store = WeightStore(shape, "released", mtp=False, device="cuda")
    for tensor in found(store.weights):
        if tensor.dtype == torch.uint8:
            scales = tensor.shape[-1] * 16 in (shape.hidden_size // 2, shape.moe_intermediate_size // 2)
            tensor.random_(117, 121) if scales else tensor.random_(0, 256)
        elif tensor.dtype == torch.float8_e4m3fn:
            for part in tensor.flatten(0, -2).split(4096):
                part.copy_(torch.randn(part.shape, device="cuda"))
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.02)
        else:
            tensor.zero_()
    for layer in store.weights.layers:
        for matrix in found(layer):
            if matrix.dtype == torch.float32 and matrix.dim() >= 2 and matrix.shape[-1] in (32, 8, 64, 16):
                matrix.fill_(2.0**-6)
    return in_tiles(store.weights)


def found(value: Any) -> Iterator[Tensor]:
    """All tensors inside dataclasses and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from found(part)
    elif is_dataclass(value):
        for item in fields(value):
            yield from found(getattr(value, item.name))


def batch_at(rows: int, context: int, frames: int) -> DecodeBatch:
    """Rows that stand at about `context`, none of which completes a group of 128."""
    pages = -(-context // PAGE)
    at = context - 2 - torch.arange(rows, device="cuda") % 64
    table = torch.randint(0, frames, (rows, pages), device="cuda", dtype=torch.int32)
    return DecodeBatch(
        token_ids=torch.randint(0, 1000, (rows,), device="cuda"),
        positions=at,
        slots=torch.arange(rows, device="cuda"),
        lowest=at - (WINDOW - 1),
        page_table=table,
        max_csa=pages * 32,
        max_hca=pages,
    )


def main() -> int:
    """Time and profile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--context", type=int, nargs="+", default=[8192])
    parser.add_argument("--chunk", type=int, default=0, help="rows of a chunk of a prompt, to profile one too")
    parser.add_argument("--table", type=int, default=24, help="kernels to show")
    options = parser.parse_args()
    shape = shape_of(options.layers)
    weights = random_weights(shape)
    frames = 4096
    pools = Pools(
        shape, CacheGeometry.of(shape, "fp8"), CacheCapacity(frames, max(options.batch)), torch.device("cuda"), spare=1
    )
    for value in vars(pools).values():
        if isinstance(value, Tensor):
            value.random_(0x28, 0x38) if value.dtype == torch.uint8 else value.normal_()
    model = Transformer(weights, select("auto", device="cuda"), "native")
    for context in options.context:
        for rows in options.batch:
            measure(model, pools, batch_at(rows, context, frames), f"{rows} x {context}", options)
    if options.chunk:
        measure_chunk(model, pools, 0, options)
    return 0


def measure(model: Transformer, pools: Pools, batch: DecodeBatch, name: str, options: argparse.Namespace) -> None:
    """One case: graph replays, then one replay under the profiler."""
    for _ in range(2):
        logits = model.decode(batch, pools.layers)
    torch.cuda.synchronize()
    print(name, "logits finite:", bool(torch.isfinite(logits).all()), flush=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.decode(batch, pools.layers)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    us = statistics.median(times)
    profiled(graph.replay, f"{name}: {us:.1f} us a step", options)


def measure_chunk(model: Transformer, pools: Pools, start: int, options: argparse.Namespace) -> None:
    """One chunk of a prompt, from `start` on: the median of three runs, then one under the profiler."""
    rows = options.chunk
    tokens = np.arange(rows, dtype=np.int32) % 1000
    pages = np.arange(-(-(start + rows) // PAGE), dtype=np.int32)
    chunk = Chunk("r", 0, start, start + rows, tokens, pages, start, samples=True)
    batch = on_device(build_batch([chunk], pools), pools.device)
    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        began = time.perf_counter()
        model.forward(batch, pools.layers)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e6)
    us = statistics.median(times[1:])
    name = f"chunk of {rows} at {start}: {us:.0f} us, {rows / us * 1e6:.0f} tokens/s"
    profiled(lambda: model.forward(batch, pools.layers), name, options)


def profiled(run: Callable[[], Any], name: str, options: argparse.Namespace) -> None:
    """Print the kernels of one run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    count: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            count[event.name[:60]] += 1
            spent[event.name[:60]] += event.device_time
    total = sum(count.values())
    print(f"{name}, {options.layers} layers, {total} launches, {total / options.layers:.1f} a layer")
    for kernel, us in spent.most_common(options.table):
        print(f"  {us:9.1f} us {count[kernel]:4d} x {us / count[kernel]:7.2f}  {kernel}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
