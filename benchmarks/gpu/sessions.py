"""Whole engines on a GPU: time to the first token of a cached prompt, and a million tokens that leave and come back.

    PYTHONPATH=src python -m benchmarks.gpu.sessions [--layers 20 | --kinds csa hca] [--million 1000000]
        [--skip resume million returned] [--deterministic]

Random weights in the released formats. `resume`: a prompt of 64K tokens runs, then the same one with 256 tokens more;
goal 0.03 s, vLLM 0.105 s (20 layers). `million`: one request in chunks of 8,192, decoded for a while; another of the
same length; then the first again. Its tokens must be the same and nothing but the last page may be run again.
`returned`: the cache holds only one of the two, so the first one leaves for the host and comes back from there.
--kinds: layers of these kinds only, for which a million tokens take seconds. Outside deterministic mode the last tokens
of the prompt run in a smaller chunk the second time, which may turn over a near-tie; so the row says how many of the
tokens are the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks import rows
from benchmarks.gpu import made
from triptych.cache.geometry import plan_capacity
from triptych.config import CSA_LAYER, HCA_LAYER, SWA_LAYER, ModelShape
from triptych.engine.api import Engine
from triptych.engine.device import with_defaults
from triptych.engine.load import LoadedEngine, build_loop
from triptych.model.weights import ModelWeights
from triptych.words import SamplingParams, TokenIds

Row = dict[str, Any]
KINDS = {"swa": SWA_LAYER, "csa": CSA_LAYER, "hca": HCA_LAYER}
TOKENS = 32


def main() -> None:
    """Print the table and append it to results/gpu_sessions.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--million", type=int, default=1_000_000)
    parser.add_argument("--kinds", nargs="*", choices=sorted(KINDS), default=[])
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--skip", nargs="*", default=[])
    given = parser.parse_args()
    shape = made.shape_of("flash", given.layers)
    if given.kinds:
        shape = replace(shape, ratios=tuple(KINDS[kind] for kind in given.kinds))
    weights = made.released_weights(shape, tiles=not given.deterministic)
    table = []
    if "resume" not in given.skip:
        table.append(resume(shape, weights))
        print(table[-1], flush=True)
    for name, hosted in (("million", False), ("returned", True)):
        if name not in given.skip:
            table.append(million(shape, weights, given.million, hosted=hosted, deterministic=given.deterministic))
            print(table[-1], flush=True)
    values = {"command": rows.command_of("gpu.sessions"), "table": table, "layers": shape.num_layers}
    values |= {"kinds": given.kinds, "deterministic": given.deterministic}
    rows.append("gpu_sessions", values, kv_bytes={"entry": 584}, threads=1)


def engine_of(shape: ModelShape, weights: ModelWeights, tokens: int, spare: int = 1 << 30, **options: Any) -> Engine:
    """An engine whose cache holds about `tokens` and `spare` bytes for snapshots, or as `options` say."""
    options.setdefault("max_context", shape.max_position)
    config = made.config_of(options.pop("max_context"), options.pop("batch", 4), **options)
    config = with_defaults(config, weights.embed.device)
    geometry = made.geometry_of(shape, config.cache)
    memory = int(tokens * geometry.token_bytes) + (config.max_running + 1) * geometry.slot_bytes + spare
    capacity = plan_capacity(geometry, memory, config.max_running)
    loop = build_loop(weights, config, geometry, capacity)
    return Engine(LoadedEngine("random", shape, config, None, loop, min(shape.max_position, capacity.tokens), ""))


def text(shape: ModelShape, seed: int, length: int) -> TokenIds:
    """`length` random tokens."""
    return np.random.default_rng(seed).integers(2, shape.vocab_size, length).astype(np.int32)


def answer(
    engine: Engine, prompt: TokenIds, count: int, *, ignore_eos: bool = True
) -> tuple[float, float, list[int], Any]:
    """Seconds to the first token and to the last, the tokens and their usage."""
    params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=ignore_eos)
    started = time.perf_counter()
    first, tokens, usage = 0.0, [], None
    for delta in engine.stream(prompt, params):
        first = first or time.perf_counter() - started
        tokens += delta.token_ids
        usage = delta.usage or usage
    return first, time.perf_counter() - started, tokens, usage


def resume(shape: ModelShape, weights: ModelWeights) -> Row:
    """Time to the first token of 64K + 256 tokens after the 64K ran; median of five continuations."""
    engine = engine_of(shape, weights, 8 * 65536, max_context=131072)
    base = text(shape, 1, 65536 - 256)
    answer(engine, text(shape, 2, 9000), 2)  # compiles what graphs did not
    cold = answer(engine, base, 2)
    warm = [answer(engine, np.concatenate([base, text(shape, 10 + i, 256)]), 2) for i in range(5)]
    engine.check_integrity()
    usage = warm[-1][3]
    engine.close()
    return {
        **{"card": torch.cuda.get_device_name(), "layers": shape.num_layers, "case": "64K cached to the last 256"},
        **{"cold_s": round(cold[0], 4), "ttft_s": round(statistics.median(w[0] for w in warm), 4)},
        **{"goal_s": 0.03, "vllm_s": 0.105, "cached": usage.cached_tokens, "resume": usage.resume},
    }


def million(shape: ModelShape, weights: ModelWeights, length: int, *, hosted: bool, deterministic: bool) -> Row:
    """Two requests of `length` tokens in turn, then the first again; `hosted`: the device holds one of them."""
    torch.cuda.empty_cache()
    options: Row = {"deterministic": deterministic, "host_memory": (8 << 30) * hosted}
    room = length + length // 4 if hosted else 2 * length + 65536
    engine = engine_of(shape, weights, room, spare=0 if hosted else 1 << 30, batch=2, **options)
    one, other = text(shape, 3, length), text(shape, 4, length)
    answer(engine, text(shape, 5, 20_000), 4)  # compiles what graphs did not
    first = answer(engine, one, TOKENS)
    print(f"    first {first[0]:.2f} s, decode {(first[1] - first[0]) / (TOKENS - 1) * 1e3:.2f} ms", flush=True)
    second = answer(engine, other, TOKENS)
    again = answer(engine, one, TOKENS)
    engine.check_integrity()
    usage, moved = again[3], engine._loop.stats().cache
    engine.close()
    same = sum(a == b for a, b in zip(first[2], again[2], strict=True))
    return {
        **{"card": torch.cuda.get_device_name(), "layers": shape.num_layers, "length": length, "hosted": hosted},
        **{"first_s": round(first[0], 3), "other_s": round(second[0], 3), "again_s": round(again[0], 4)},
        **{"decode_ms": round((again[1] - again[0]) / (TOKENS - 1) * 1e3, 3), "tokens": TOKENS, "same": same},
        **{"cached": usage.cached_tokens, "recomputed": usage.recomputed_tokens, "resume": usage.resume},
        **{"run_again": length - usage.cached_tokens, "host_bytes_out": moved.get("host_bytes_out", 0)},
        **{
            "rates": f"{length / first[0]:,.0f} tokens/s",
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        },
    }


if __name__ == "__main__":
    main()
