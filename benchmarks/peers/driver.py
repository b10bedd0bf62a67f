"""One engine's cache manager on one trace, in this process; prints one JSON line. Run by benchmarks.peers.run.

An engine offers:
    start(request) -> handle            make its request object
    prefill(handle) -> int | None       look up, admit, allocate the prompt in chunks; tokens hit, None if no room
    decode(handle, output, at) -> int   append output from `at` on; how far it came
    finish(handle)                      the request is over, its blocks become cache
    stats() -> dict

Requests are admitted in order of arrival, `in_flight` are held, the oldest ends when one more is wanted or when an
allocation fails. That is what `triptych replay` does with our manager, so the three are compared on equal terms.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import time
from collections import deque
from pathlib import Path
from typing import Any

from triptych.config import SHAPES
from triptych.workload.trace_files import read_trace
from triptych.workload.traces import TraceRequest

ENGINES = {"vllm": "benchmarks.peers.vllm_engine", "sglang": "benchmarks.peers.sglang_engine"}


def drive(engine: Any, trace: Any, in_flight: int) -> dict[str, Any]:
    """Go through the trace; counts of tokens and of what could not be served."""
    running: deque[Any] = deque()
    prompt = hit = forced = unservable = requests = 0
    began = time.thread_time()
    for request in trace:
        requests += 1
        prompt += len(request.prompt)
        while len(running) >= in_flight:
            engine.finish(running.popleft())
        handle = engine.start(request)
        found = engine.prefill(handle)
        while found is None and running:
            engine.finish(running.popleft())
            forced += 1
            found = engine.prefill(handle)
        if found is None:
            unservable += 1
            engine.finish(handle)
            continue
        hit += found
        forced += _decode(engine, handle, request, running)
        running.append(handle)
    while running:
        engine.finish(running.popleft())
    return {
        "requests": requests,
        "unservable": unservable,
        "forced_finishes": forced,
        "prompt_tokens": prompt,
        "hit_tokens": hit,
        "hit_rate": hit / max(1, prompt),
        "cpu_seconds": round(time.thread_time() - began, 1),
    }


def _decode(engine: Any, handle: Any, request: TraceRequest, running: deque[Any]) -> int:
    at, forced = engine.decode(handle, request.output, 0), 0
    while at < len(request.output) and running:
        engine.finish(running.popleft())
        forced += 1
        at = engine.decode(handle, request.output, at)
    return forced


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=sorted(ENGINES))
    parser.add_argument("trace", type=Path)
    parser.add_argument("--model", choices=sorted(SHAPES), default="flash")
    parser.add_argument("--gib", type=float, required=True)
    parser.add_argument("--tokens", choices=("literal", "session"), default="literal")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=8192)
    given = parser.parse_args()
    gc.disable()
    module = importlib.import_module(ENGINES[given.engine])
    engine = module.Engine(int(given.gib * 2**30), SHAPES[given.model], given.chunk, given.in_flight)
    trace = read_trace(given.trace, given.tokens, given.limit)
    row = drive(engine, trace, given.in_flight) | engine.stats()
    settings = {"engine": engine.name, "model": given.model, "gib": given.gib, "tokens": given.tokens}
    print(json.dumps(settings | row))


if __name__ == "__main__":
    main()
