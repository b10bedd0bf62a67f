"""python -m benchmarks resume_cost: what a resumed position costs, by the way its windows are rebuilt.

A narrow model of DeepSeek-V4-Flash's depth and layer kinds (43 layers, random weights) has a long prompt in its cache
and continues it by a few tokens: cold, by the rectangle that the report calls "zero SWA caching" (the last n_win x L
tokens in all layers, section 3.5), by the trapezoid, and from a snapshot. Rows times layers are counted in the model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from benchmarks import rows
from triptych.cache.geometry import LOOKBACK, RESTORED, CacheCapacity, CacheGeometry, trapezoid_start
from triptych.checkpoint import random_tensors
from triptych.config import PAGE, SHAPES, WINDOW, EngineConfig, ModelShape
from triptych.engine.pools import Pools
from triptych.engine.runner import Runner
from triptych.engine.warmup import warm_up
from triptych.model.weights import ModelWeights, WeightStore
from triptych.words import Chunk, SnapshotWrite, StepPlan, TokenIds

TAIL = 64  # new tokens behind the cached prefix
STEP = 512  # rows a step runs, as the engine does by default on a CPU
WAYS = ("snapshot", "trapezoid", "rectangle", "cold")

NARROW = replace(
    SHAPES["flash"],
    vocab_size=512,
    hidden_size=64,
    num_heads=2,
    head_dim=32,
    rope_dim=16,
    q_lora_rank=32,
    o_groups=2,
    o_lora_rank=16,
    index_heads=4,
    index_head_dim=16,
    index_topk=128,
    num_experts=4,
    experts_per_token=2,
    moe_intermediate_size=32,
    num_mtp_layers=0,
)


def main(argv: list[str]) -> int:
    """Measure, print a table, write a row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks resume_cost", description=__doc__)
    parser.add_argument("--length", type=int, default=32_768, help="tokens of the cached prefix, a multiple of 128")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="write no row")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    bench = Bench(NARROW, given.length)
    bench.fill()
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    counted: dict[str, int] = {}
    answers: dict[str, torch.Tensor] = {}
    for _ in range(given.rounds):
        for way in WAYS:  # in turns, so that all meet the same disturbances
            seconds, counted[way], answers[way] = bench.resume(way)
            found[way].append(seconds)
    bound = WINDOW * NARROW.num_layers**2
    table = {
        way: {
            "seconds": [round(one, 3) for one in found[way]],
            "layer_tokens": counted[way],
            "of_n_win_L_L": round(counted[way] / bound, 4),
            "logits_off": float((answers[way] - answers["cold"]).abs().max()),
        }
        for way in WAYS
    }
    for way, line in table.items():
        print(f"{way:<10} {line}")
    if not given.dry:
        values = {"length": given.length, "tail": TAIL, "layers": NARROW.num_layers, "ways": table}
        rows.append("resume_cost", values | {"load": rows.load_average()}, kv_bytes={"pools": bench.nbytes}, threads=1)
    return 0


def _weights(shape: ModelShape) -> ModelWeights:
    store = WeightStore(shape, torch.float32, mtp=False)
    for name, tensor in random_tensors(shape, seed=0):
        store.place(name, tensor)
    return store.weights


class Bench:
    """A runner with a prompt of `length` tokens in its pages; slot 0 filled them, slot 1 resumes."""

    def __init__(self, shape: ModelShape, length: int) -> None:
        geometry = CacheGeometry.of(shape, "float32")
        self._length, self._layers = length, shape.num_layers
        pages = length // PAGE + 1
        capacity = CacheCapacity(frames=2 * pages + geometry.snapshot_frames, slots=2)
        config = EngineConfig()
        warm_up(config)
        pools = Pools(shape, geometry, capacity)
        self.nbytes = pools.nbytes
        self._runner = Runner(_weights(shape), config, pools)
        self._pages = np.arange(pages, dtype=np.int32)
        self._spare = np.arange(pages, 2 * pages, dtype=np.int32)
        self._snapshot = tuple(range(2 * pages, capacity.frames))
        self._text = np.random.default_rng(0).integers(0, shape.vocab_size, length + TAIL).astype(np.int32)
        self._step = 0

    def fill(self) -> None:
        """Run the prompt once into its pages, with a snapshot at its end."""
        for chunk in self._chunks(0, self._length, self._pages):
            last = chunk.end == self._length
            writes = (SnapshotWrite(self._length, self._snapshot),) if last else ()
            self._run(replace(chunk, slot=0, snapshots=writes))

    def resume(self, way: str) -> tuple[float, int, torch.Tensor]:
        """Seconds, rows times layers, and the last row's logits of prefix and tail, the tail's own work taken off."""
        before, started = self._runner.model.layer_rows, time.perf_counter()
        for chunk in self._plan(way):
            logits = self._run(chunk)
        seconds = time.perf_counter() - started
        tail = TAIL * self._layers
        return seconds, self._runner.model.layer_rows - before - tail, logits[-1].clone()

    def _plan(self, way: str) -> Iterator[Chunk]:
        end = self._length
        if way == "cold":
            yield from self._chunks(0, end + TAIL, self._spare)
            return
        start = end - LOOKBACK
        read_from = max(0, end - RESTORED)
        if way != "snapshot":
            start = trapezoid_start(end, self._layers) if way == "trapezoid" else end - WINDOW * self._layers
            read_from = start
        first = True
        for chunk in self._chunks(start, end + TAIL, self._pages):
            restore = self._snapshot if first and way == "snapshot" else None
            replay_to = end if way == "trapezoid" else 0
            yield replace(
                chunk, write_from=max(chunk.start, end), read_from=read_from, restore=restore, replay_to=replay_to
            )
            first = False

    def _chunks(self, start: int, end: int, pages: TokenIds) -> Iterator[Chunk]:
        for at in range(start, end, STEP):
            upto = min(end, at + STEP)
            samples = upto == len(self._text)
            yield Chunk("r", 1, at, upto, self._text[at:upto], pages, write_from=at, samples=samples)

    def _run(self, chunk: Chunk) -> torch.Tensor:
        self._step += 1
        return self._runner.logits(StepPlan(self._step, (chunk,)))
