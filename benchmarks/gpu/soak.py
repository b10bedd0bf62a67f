"""Mixed random load on a GPU under the integrity check: prefill, decode, stops, aborts, preemptions, tier moves.

    PYTHONPATH=src python -m benchmarks.gpu.soak [--seconds 1800] [--model tiny] [--layers 4] [--tokens 30000]
        [--longest 4000] [--canary 0.2] [--deterministic]

What is asked is in soak_load.py. The cache is small, so most of the load moves through the host and the disk; answers
of up to --longest tokens outgrow it, and running requests preempt each other. All frames, slots and pins are counted
again and again, and memory, of which what is allocated between steps must not grow. Whatever is asked again must be
answered as before where rows do not depend on their mates: with --deterministic. Otherwise the row says how many tokens
are the same; random weights are chaotic, and rounding in chunks of another size turns their answers. With --canary the
engine computes a share of resumed requests again, in lulls; steps then do not overlap.

`--model flash`: random weights of V4-Flash's first --layers layers, in the released formats. `--model tiny`: the
bundled checkpoint, whose trained weights let the canary judge without --deterministic, and grammars are among the
requests.

Ends by itself; interrupted or terminated it gives up what runs, and writes its row too. 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import signal
import tempfile
import time
from typing import Any

import torch

from benchmarks import rows
from benchmarks.gpu import made
from benchmarks.gpu.sessions import answer, engine_of, text
from benchmarks.gpu.soak_load import Load, Plan, facts_of
from triptych.cache.geometry import CacheGeometry
from triptych.checkpoint import CheckpointReader
from triptych.config import EngineConfig
from triptych.engine.api import Engine
from triptych.tiny import ensure_checkpoint

_HOST = 1.5  # times what the device holds; the disk has all of it
_GROWTH = 64  # MiB that may be allocated late and were not early: workspaces of shapes that came late


def main() -> int:
    """Run, print what happened and append a row to results/gpu_soak.jsonl."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--model", choices=("flash", "tiny"), default="flash")
    parser.add_argument("--device", default="cuda", help="of tiny; to try it out without a GPU")
    parser.add_argument("--layers", type=int, default=4, help="of flash")
    parser.add_argument("--canary", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=250_000, help="how many the cache on the device holds")
    parser.add_argument("--longest", type=int, default=4000, help="tokens of the longest answers")
    parser.add_argument("--deterministic", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as disk:
        engine = tiny(given, disk) if given.model == "tiny" else flash(given, disk)
        started = time.monotonic()
        load = Load(engine, Plan(given.seconds, given.tokens, given.longest, exact=given.deterministic), given.seed)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, load.stop)
        load.run()
        out = {"model": given.model, "layers": engine.shape.num_layers, "seconds": round(time.monotonic() - started, 1)}
        out |= {**load.done, **facts_of(engine)}
        if not load.wrong and not load.stopped:
            out |= asked_twice(engine, given)
        wrong = load.wrong + faults(out, given.deterministic)
        out |= {"interrupted": load.stopped, "wrong": wrong[:5]}
        if torch.cuda.is_available():
            out |= {"card": torch.cuda.get_device_name(), "retries": torch.cuda.memory_stats()["num_alloc_retries"]}
        print(out, flush=True)
        values = {"command": rows.command_of("gpu.soak"), "table": [out]}
        rows.append("gpu_soak", values, kv_bytes={"entry": 584} if given.model == "flash" else {}, threads=1)
        if not load.wrong:
            engine.close()
    return 1 if wrong else 0


def flash(given: argparse.Namespace, disk: str) -> Engine:
    """Random weights in the released formats."""
    shape = made.shape_of("flash", given.layers)
    host = int(_HOST * given.tokens * CacheGeometry.of(shape, "fp8").token_bytes)
    weights = made.released_weights(shape, tiles=not given.deterministic)
    return engine_of(
        *(shape, weights, given.tokens), spare=0, batch=16, step_tokens=2048, max_context=65536,
        host_memory=host, disk=disk, disk_memory=8 << 30, canary=given.canary, deterministic=given.deterministic,
    )  # fmt: skip


def tiny(given: argparse.Namespace, disk: str) -> Engine:
    """The bundled checkpoint, in the formats that it has by default."""
    options: dict[str, Any] = {"device": given.device, "max_running": 16, "step_tokens": 512, "canary": given.canary}
    options |= {"disk": disk, "disk_memory": 1 << 30, "deterministic": given.deterministic}
    cache = EngineConfig.from_options(**options).cache
    geometry = CacheGeometry.of(CheckpointReader(ensure_checkpoint()).shape, cache.kv_format, cache.index_format)
    memory = int(given.tokens * geometry.token_bytes) + 17 * geometry.slot_bytes
    host = int(_HOST * given.tokens * geometry.token_bytes)
    return Engine.load("tiny", kv_memory=memory, host_memory=host, **options)


def asked_twice(engine: Engine, given: argparse.Namespace) -> dict[str, Any]:
    """Some texts one after the other, each twice and alone: how many tokens of their answers are the same."""
    texts = [text(engine.shape, 1000 + i, min(5000, given.tokens // 3)) for i in range(3)]
    pairs = [(answer(engine, one, 8)[2], answer(engine, one, 8)[2]) for one in texts]
    engine.check_integrity()
    return {"same_tokens_of_24": sum(a == b for one in pairs for a, b in zip(*one, strict=True))}


def faults(out: dict[str, Any], exact: bool) -> list[str]:
    """Sentences for what the figures say must not be."""
    found = []
    if out["allocated_mib_late"] > out["allocated_mib_early"] + _GROWTH:
        found.append(f"the device's memory grew from {out['allocated_mib_early']} to {out['allocated_mib_late']} MiB")
    if out.get("fetches_failed") or out.get("saves_failed"):
        found.append("copies between tiers failed")
    if out.get("canary_failed") and (exact or out["model"] == "tiny"):
        found.append(
            f"the canary found {out['canary_failed']:.0f} of {out['canary_checked']:.0f} resumed requests wrong"
        )
    if exact and out.get("same_tokens_of_24", 24) != 24:
        found.append(f"{out['same_tokens_of_24']} of 24 tokens are the same when asked twice")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
