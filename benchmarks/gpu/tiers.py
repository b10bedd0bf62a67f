"""Pages between a GPU and the host, as the mover copies them, against one plain copy over the same link.

    PYTHONPATH=src python -m benchmarks.gpu.tiers [--pages 4096] [--rounds 5]

Pages of V4-Flash's 43 layers in FP8, from and to scattered frames of the device; GB/s, medians of some rounds after a
first one, which pins what it needs. `down`: demotions; `down_step_ms`: how long they keep the compute stream. `up`:
fetches, with checksums compared. `scattered`: the host's frames lie anywhere, too, where they are neighbours otherwise.
`share`: of the plain copy; goal 0.8.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

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
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    shape = SHAPES["flash"]
    geometry = CacheGeometry.of(shape, "fp8")
    pools = Pools(shape, geometry, CacheCapacity(given.pages, 1), torch.device("cuda"))
    mover = GpuMover(pools, geometry, given.pages)
    frames = pools.frames.view(torch.uint8)
    made._bytes(frames, torch.Generator("cuda").manual_seed(0))
    out: dict[str, Any] = {"card": torch.cuda.get_device_name(), "pages": given.pages, "page_bytes": frames[0].nbytes}
    out |= link(given.rounds)
    order = torch.randperm(given.pages).tolist()
    for name, places in (("", list(range(given.pages))), ("scattered_", torch.randperm(given.pages).tolist())):
        moved = both_ways(mover, frames, (order, places), given.rounds)
        out |= {f"{name}{key}": value for key, value in moved.items()}
        for way in ("down", "up"):
            out[f"{name}{way}_share"] = round(out[f"{name}{way}"] / out[f"link_{way}"], 3)
    mover.close()
    print(out, flush=True)
    values = {"command": rows.command_of("gpu.tiers"), "table": [out]}
    rows.append("gpu_tiers", values, kv_bytes={"entry": 584}, threads=8)


def link(rounds: int) -> dict[str, float]:
    """GB/s of one plain copy of a GiB of pinned memory, each way."""
    plain = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(plain, device="cuda")
    out = {}
    for name, target, source in (("link_down", plain, there), ("link_up", there, plain)):

        def copy(target: torch.Tensor = target, source: torch.Tensor = source) -> None:
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()

        out[name] = round(plain.nbytes / median_of(copy, rounds) / 1e9, 1)
    return out


def both_ways(
    mover: GpuMover, frames: torch.Tensor, placed: tuple[Sequence[int], Sequence[int]], rounds: int
) -> dict[str, Any]:
    """All frames down to the host and up again, and whether they are what they were; placed: frames, host frames."""
    pairs = list(zip(*placed, strict=True))
    keys = [ObjectKey("page", i.to_bytes(32, "little")) for i in range(len(pairs))]
    demotions = tuple(Demotion(key, (frame,), (at,)) for key, (frame, at) in zip(keys, pairs, strict=True))
    parts = [FetchPart(key, HOST, (frame,), (at,)) for key, (frame, at) in zip(keys, pairs, strict=True)]
    fetches = tuple(Fetch(at, tuple(parts[at : at + _SPAN])) for at in range(0, len(parts), _SPAN))
    before = frames[: 1 << 10].clone()
    held: list[float] = []
    good: list[bool] = []

    def down() -> None:
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        mover.run(Jobs(demotions))
        ended.record()
        mover._down.synchronize()
        held.append(begun.elapsed_time(ended))

    def up() -> None:
        mover.run(Jobs((), fetches))
        done = []
        while len(done) < len(fetches):
            done += mover.poll(1.0)
        good.append(all(all(one.ok) for one in done))

    out: dict[str, Any] = {"down": round(frames.nbytes / median_of(down, rounds) / 1e9, 1)}
    out["down_step_ms"] = round(statistics.median(held[1:]), 1)
    frames.zero_()
    out["up"] = round(frames.nbytes / median_of(up, rounds) / 1e9, 1)
    return out | {"intact": all(good) and torch.equal(frames[: 1 << 10], before)}


def median_of(run: Callable[[], None], rounds: int) -> float:
    """Seconds of `run`, the first time left out."""
    seconds = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
