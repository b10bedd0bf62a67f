"""Pages between a GPU and the host, as the mover copies them, against one plain copy over the same link.

    PYTHONPATH=src python -m benchmarks.gpu.tiers [--pages 4096]

Pages of V4-Flash's 43 layers in FP8. `down`: demotions of scattered frames; `down_step_ms`: how long they keep the
compute stream. `up`: fetches, with checksums compared. Goal: 80 % of the plain copy.
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks import rows
from benchmarks.gpu import made
from triptych.cache.geometry import CacheCapacity, CacheGeometry
from triptych.cache.jobs import HOST, Demotion, Fetch, FetchPart, Jobs
from triptych.cache.store.protocol import ObjectKey
from triptych.config import SHAPES
from triptych.engine.gpu_mover import GpuMover
from triptych.engine.pools import Pools

_SPAN = 512  # pages of one fetch: a prompt of 64K tokens


def main() -> None:
    """Print the rates and append them to results/gpu_tiers.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=int, default=4096)
    given = parser.parse_args()
    shape = SHAPES["flash"]
    geometry = CacheGeometry.of(shape, "fp8")
    pools = Pools(shape, geometry, CacheCapacity(given.pages, 1), torch.device("cuda"))
    mover = GpuMover(pools, geometry, given.pages)
    frames = pools.frames.view(torch.uint8)
    made._bytes(frames, torch.Generator("cuda").manual_seed(0))
    size = frames.nbytes
    plain = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(plain, device="cuda")
    out: dict[str, float | int | str] = {"card": torch.cuda.get_device_name(), "pages": given.pages}
    for name, target, source in (("link_down", plain, there), ("link_up", there, plain)):
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        out[name] = round(plain.nbytes / (time.perf_counter() - started) / 1e9, 1)
    order = torch.randperm(given.pages).tolist()
    keys = [ObjectKey("page", i.to_bytes(32, "little")) for i in range(given.pages)]
    before = frames[: 1 << 10].clone()
    demotions = tuple(Demotion(key, (frame,), (at,)) for at, (key, frame) in enumerate(zip(keys, order, strict=True)))
    for _ in range(2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        mover.run(Jobs(demotions))
        ended.record()
        mover._down.synchronize()
        out["down"] = round(size / (time.perf_counter() - started) / 1e9, 1)
        out["down_step_ms"] = round(begun.elapsed_time(ended), 1)
    frames.zero_()
    parts = [FetchPart(key, HOST, (frame,), (at,)) for at, (key, frame) in enumerate(zip(keys, order, strict=True))]
    fetches = tuple(Fetch(at, tuple(parts[at : at + _SPAN])) for at in range(0, given.pages, _SPAN))
    torch.cuda.synchronize()
    started = time.perf_counter()
    mover.run(Jobs((), fetches))
    done = []
    while len(done) < len(fetches):
        done += mover.poll(1.0)
    out["up"] = round(size / (time.perf_counter() - started) / 1e9, 1)
    out["intact"] = all(all(one.ok) for one in done) and torch.equal(frames[: 1 << 10], before)
    mover.close()
    print(out, flush=True)
    values = {"command": "python -m benchmarks.gpu.tiers", "table": [out]}
    rows.append("gpu_tiers", values, kv_bytes={"entry": 584}, threads=8)


if __name__ == "__main__":
    main()
