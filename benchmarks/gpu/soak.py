"""Mixed random load on a GPU under the integrity check: prefill, decode, stops, aborts, preemptions, tier moves.

    PYTHONPATH=src python -m benchmarks.gpu.soak [--seconds 1800] [--layers 4] [--tokens 30000] [--canary 0.2]
        [--deterministic]

The cache is small, so most of the load moves through the host and the disk; with --tokens 30000 running requests
preempt each other too, since their answers outgrow it. Every few steps all frames, slots and pins are counted, and the
device's memory, of which what is allocated between steps must not grow. At the end some texts are asked twice, alone:
with --deterministic to the same bits, otherwise the second ones run in other chunks, and the row says how many tokens
are the same. With --canary the engine computes a share of resumed requests again; steps then do not overlap. Random
weights are chaotic: without --deterministic the canary's limit is passed by rounding alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter

import numpy as np
import torch

from benchmarks import rows
from benchmarks.gpu import made
from benchmarks.gpu.sessions import answer, engine_of, text
from triptych.engine.api import Engine
from triptych.words import FinishReason, Request, SamplingParams

_EVERY = 50  # steps between two checks
_TELL = 15.0  # seconds between two lines of progress


def main() -> None:
    """Run, print what happened and append a row to results/gpu_soak.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--canary", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=250_000, help="how many the cache on the device holds")
    parser.add_argument("--deterministic", action="store_true")
    given = parser.parse_args()
    shape = made.shape_of("flash", given.layers)
    weights = made.released_weights(shape)
    with tempfile.TemporaryDirectory() as disk:
        engine = engine_of(
            *(shape, weights, given.tokens), spare=0, batch=16, step_tokens=2048, max_context=65536,
            host_memory=1 << 30, disk=disk, disk_memory=8 << 30, canary=given.canary, deterministic=given.deterministic,
        )  # fmt: skip
        started = time.monotonic()
        done = load(engine, given, np.random.default_rng(given.seed))
        stats = engine._loop.stats()
        texts = [text(shape, 1000 + i, 5000) for i in range(3)]
        pairs = [(answer(engine, one, 8)[2], answer(engine, one, 8)[2]) for one in texts]
        same = sum(a == b for first, second in pairs for a, b in zip(first, second, strict=True))
        engine.check_integrity()
        engine.close()
    took = round(time.monotonic() - started, 1)
    out = {"card": torch.cuda.get_device_name(), "layers": given.layers, "seconds": took}
    kept = (
        "preemptions",
        "rerun_tokens",
        "host_bytes_in",
        "host_bytes_out",
        "disk_bytes_in",
        "disk_bytes_out",
        "fetches_failed",
    )
    kept += ("canary_checked", "canary_failed")
    out |= {**done, "steps": stats.steps, "generated": stats.generated_tokens, "prompt": stats.prompt_tokens}
    out |= {
        "cached": stats.cached_tokens,
        "same_tokens_of_24": same,
        "retries": torch.cuda.memory_stats()["num_alloc_retries"],
    }
    out |= {name: stats.cache[name] for name in kept if name in stats.cache}
    print(out, flush=True)
    values = {"command": " ".join(["python -m benchmarks.gpu.soak", *sys.argv[1:]]), "table": [out]}
    rows.append("gpu_soak", values, kv_bytes={"entry": 584}, threads=1)


def load(engine: Engine, given: argparse.Namespace, random: np.random.Generator) -> Counter[str]:
    """Random requests for `given.seconds`; what became of them."""
    loop, shape = engine._loop, engine.shape
    bases = [text(shape, i, min(40_000, given.tokens // 2)) for i in range(6)]
    live: set[str] = set()
    done: Counter[str] = Counter()
    memory: list[int] = []
    deadline = time.monotonic() + given.seconds
    told = time.monotonic()
    step = 0
    while loop.busy or time.monotonic() < deadline:
        step += 1
        if time.monotonic() < deadline and len(live) < 24 and random.random() < 0.4:
            base = bases[int(random.integers(len(bases)))]
            cut = int(random.integers(1, len(base)) if random.random() < 0.5 else random.integers(1, 3000))
            tail = text(shape, int(random.integers(1 << 30)), int(random.integers(1, 400)))
            prompt = np.concatenate([base[:cut], tail])
            params = SamplingParams(
                max_tokens=int(random.integers(1, 4000 if random.random() < 0.3 else 200)),
                temperature=float(random.choice([0.0, 0.8])),
                top_p=float(random.choice([1.0, 0.9])),
                repetition_penalty=float(random.choice([1.0, 1.1])),
                seed=int(random.integers(1 << 30)),
                ignore_eos=True,
                stop_token_ids=tuple(random.integers(2, shape.vocab_size, 300).tolist()),
            )
            name = f"q{step}"
            loop.add(Request(name, prompt, params))
            live.add(name)
            done["requests"] += 1
        if live and random.random() < 0.02:
            name = str(random.choice(sorted(live)))
            loop.finish(name, FinishReason.ABORT)
            live.discard(name)
            done["aborted"] += 1
        for event in loop.step():
            if event.error is not None:
                raise SystemExit(f"{event.request_id}: {event.error}")
            if event.reason is not None:
                live.discard(event.request_id)
                done[event.reason.value] += 1
        if step % _EVERY == 0:
            engine.check_integrity()
            memory.append(torch.cuda.memory_allocated())
        if time.monotonic() > told + _TELL:
            told = time.monotonic()
            left, preempted = max(0, round(deadline - told)), loop.stats().cache["preemptions"]
            print(f"{left} s left, {step} steps, {len(live)} live, {preempted} preempted, {dict(done)}", flush=True)
    engine.check_integrity()
    third = max(1, len(memory) // 3)
    done["allocated_mib_early"] = max(memory[third : 2 * third], default=0) >> 20
    done["allocated_mib_late"] = max(memory[2 * third :], default=0) >> 20
    return done


if __name__ == "__main__":
    main()
