"""Some cells run for real: the bundled checkpoint in an engine of this process, beside a replay of the same requests.

Answers have one token, so that what is timed is the time to the first token. Engine and replay see the same tokens but
different clocks, a second a request here and what it took there; policies that learn pauses may differ by that.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.prefix_policy.traffic import Cell, Traffic
from triptych import Engine, SamplingParams
from triptych.cache.geometry import CacheGeometry
from triptych.config import PAGE
from triptych.planner.models import model_named
from triptych.words import CacheHints
from triptych.workload.replay import ReplaySettings
from triptych.workload.replay import replay as run_replay
from triptych.workload.traces import TraceRequest

CELLS = (Cell("shared", 2048, 6, requests=48), Cell("turns", 2048, 6, requests=48))
PRESSURES = (0.12, 0.8)
POLICIES = ("full", "periodic:1024", "none", "adaptive")
_RUNNING = 128  # frames beside, for the longest running request
ENGINE: dict[str, Any] = {"kv_format": "float32", "max_running": 1, "threads": 1, "max_context": 16384}


@dataclass
class Recorded:
    """Requests as they were run, real answers included, to be replayed."""

    requests: list[TraceRequest]
    name: str = "recorded"

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[TraceRequest]:
        return iter(self.requests)


def spot_checks() -> list[dict[str, Any]]:
    """All cells, pressures and policies; policies take turns, so that they meet the same disturbances."""
    found = []
    shape = model_named("tiny").shape
    assert shape is not None
    geometry = CacheGeometry.of(shape, "float32")
    for cell in CELLS:
        for pressure in PRESSURES:
            frames = int(cell.live * cell.length / PAGE / pressure) + _RUNNING
            memory = frames * geometry.page_bytes + geometry.slot_bytes
            for policy in POLICIES:
                found.append({"pressure": pressure} | _run(cell, policy, memory, geometry))
    return found


def _run(cell: Cell, policy: str, memory: int, geometry: CacheGeometry) -> dict[str, Any]:
    """One cell in an engine, one request after the other, then the same requests replayed."""
    engine = Engine.load("tiny", kv_memory=memory, policy=policy, **ENGINE)
    traffic = Traffic(cell)
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    done: list[TraceRequest] = []
    seconds: list[float] = []
    cached = total = 0
    for request in traffic:
        prompt = (request.prompt % 4000 + 90).astype(np.int32)  # the vocabulary is small
        hints = CacheHints(marks=request.marks, session=request.session)
        begun = time.process_time()
        [out] = engine.generate([prompt], params, hints=hints)
        seconds.append(time.process_time() - begun)
        cached += out.usage.cached_tokens
        total += len(prompt)
        done.append(replace(request, prompt=prompt, output=np.asarray(out.token_ids, np.int32)))
    again = [i for i, one in enumerate(traffic.again) if one and i >= cell.requests // 4]
    settings = ReplaySettings(geometry, memory, policy, in_flight=1, chunk=512)
    replayed = run_replay(Recorded(done), settings)
    return {
        **{"scenario": cell.scenario, "length": cell.length, "policy": policy, "returning": len(again)},
        "cpu_ms": round(1e3 * statistics.mean(seconds[i] for i in again), 2),
        "hit": round(cached / total, 4),
        "replayed_hit": round(replayed.hit_rate, 4),
    }
