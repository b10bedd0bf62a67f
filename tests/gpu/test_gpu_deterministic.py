"""Deterministic mode on a GPU: a row's logits are the same bits alone, in any company, in any chunks, and resumed."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from gpu_answers import greedy, random_engine, text
from test_gpu_engine import NARROW_FLASH
from torch import Tensor

from triptych.cache.geometry import CacheCapacity, CacheGeometry
from triptych.checkpoint import random_tensors
from triptych.config import PAGE, EngineConfig
from triptych.engine.device_sampler import Draw
from triptych.engine.load import _DTYPES
from triptych.engine.pools import Pools
from triptych.engine.runner import DeviceRunner, Runner
from triptych.engine.sampler import SamplerState
from triptych.model.weights import ModelWeights, WeightStore
from triptych.words import Chunk, StepPlan

NATIVE = {"numerics": "native", "weight_dtype": "released", "kv_format": "fp8"}
FORMATS: dict[str, dict[str, Any]] = {"native": NATIVE, "exact": {}, "bfloat16": {"kv_format": "bfloat16"}}
LONG = 2300  # 575 entries, of which the indexer takes 512
PAGES = 20


@cache
def weights_of(dtype: str) -> ModelWeights:
    store = WeightStore(NARROW_FLASH, _DTYPES[dtype], mtp=False, device="cuda")
    for name, tensor in random_tensors(NARROW_FLASH, seed=0):
        store.place(name, tensor)
    return store.weights


def runner_of(options: dict[str, Any], slots: int = 4, *, graphs: bool = False) -> Runner:
    config = EngineConfig.from_options(
        **{"device": "cuda", "deterministic": True, "max_running": slots, "max_context": PAGES * PAGE, **options}
    )
    geometry = CacheGeometry.of(NARROW_FLASH, config.cache.kv_format, config.cache.index_format)
    pools = Pools(NARROW_FLASH, geometry, CacheCapacity(slots * PAGES, slots), torch.device("cuda"), spare=1)
    for value in vars(pools).values():  # what was there before must not matter
        if isinstance(value, Tensor):
            value.fill_(0)
    weights = weights_of(config.weight_dtype)
    return DeviceRunner(weights, config, pools, capture=True) if graphs else Runner(weights, config, pools)


def chunk(slot: int, tokens: np.ndarray, start: int, end: int) -> Chunk:
    pages = (np.arange(-(-end // PAGE)) + slot * PAGES).astype(np.int32)
    return Chunk(f"r{slot}", slot, start, end, tokens[start:end], pages, start, samples=True)


def in_pieces(runner: Runner, tokens: np.ndarray, cuts: list[int], mates: list[tuple[np.ndarray, int]]) -> Tensor:
    """Logits of every row of `tokens`, run up to each of `cuts`; mates, a text and a chunk size, run along."""
    out, at = [], [0] * len(mates)
    for begin, end in zip([0, *cuts[:-1]], cuts, strict=True):
        chunks = [chunk(0, tokens, begin, end)]
        for n, (other, step) in enumerate(mates):
            stop = min(len(other), at[n] + step)
            if stop > at[n]:
                chunks.append(chunk(n + 1, other, at[n], stop))
                at[n] = stop
        out.append(runner.all_logits(StepPlan(0, tuple(chunks)))[: end - begin].clone())
    return torch.cat(out)


@pytest.mark.parametrize("name", FORMATS)
def test_chunks_and_company_change_no_bit(name: str) -> None:
    tokens = text(NARROW_FLASH, 1, LONG + 12)
    want = in_pieces(runner_of(FORMATS[name]), tokens, [LONG + 12], [])
    assert torch.isfinite(want).all()
    mates = [(text(NARROW_FLASH, 2, 600), 97), (text(NARROW_FLASH, 3, 2500), 700), (text(NARROW_FLASH, 4, 40), 1)]
    # the last tokens one by one, as decode steps have them
    cuts = [1, 4, 131, 512, 1024, 1999, *range(LONG, LONG + 13)]
    for company in ([], mates):
        got = in_pieces(runner_of(FORMATS[name]), tokens, cuts, company)
        wrong = (got != want).any(1).nonzero().flatten().tolist()
        assert not wrong, (len(wrong), wrong[:5], float((got - want).abs().max()))


def caches(runner: Runner) -> list[Tensor]:
    """All that requests can own; padding rows write into what is spare."""
    pools, slots = runner.pools, runner.pools.spare_slot
    rings = (pools._csa, pools._index, pools._hca)
    per_slot = (pools.csa_stride, pools.csa_stride, pools.hca_stride)
    kept = [ring[: slots * stride] for ring, stride in zip(rings, per_slot, strict=True)]
    return [pools.frames[: pools.spare_frame], pools.window[:slots], *kept]


@pytest.mark.parametrize("name", FORMATS)
def test_graphs_change_no_bit(name: str) -> None:
    """Rows of 1, 3 and 16 sequences in graphs of 1, 4 and 16, beside chunks of which small ones have graphs, too."""
    lengths = [LONG, 1, 126, 511, 40, 2040, *range(250, 260)]
    texts = [text(NARROW_FLASH, n, length + 60) for n, length in enumerate(lengths)]
    plain, graphs = (runner_of(FORMATS[name], 16, graphs=captured) for captured in (False, True))
    assert isinstance(graphs, DeviceRunner)
    at = list(lengths)
    for runner in (plain, graphs):
        runner.logits(StepPlan(0, tuple(chunk(n, texts[n], 0, end) for n, end in enumerate(at))))
    steps = [(1, ()), (3, ()), (16, ()), (1, ()), (3, (4,)), (16, ()), (2, (5, 6)), (2, (5, 6)), (2, (5, 6)), (16, ())]
    for rows, longer in steps:
        spans = [(n, 1) for n in range(rows)] + [(n, 9) for n in longer]
        chunks = tuple(chunk(n, texts[n], at[n], at[n] + span) for n, span in spans)
        draws = [Draw(SamplerState(f"r{n}", greedy(1), NARROW_FLASH.vocab_size), n, 0) for n, _ in spans]
        want = plain.logits(StepPlan(0, chunks))
        got = graphs.start(StepPlan(0, chunks), draws)
        got.finish()
        assert got.logits is not None and torch.isfinite(want).all()
        assert torch.equal(got.logits, want), (rows, longer, float((got.logits - want).abs().max()))
        for n, span in spans:
            at[n] += span
    assert graphs.steps.captured == 4
    assert all(torch.equal(a, b) for a, b in zip(caches(graphs), caches(plain), strict=True))


@pytest.mark.parametrize("policy", ["adaptive", "none"])
def test_resumed_answers_have_the_same_logprobs(policy: str) -> None:
    options: dict[str, Any] = {
        **{"device": "cuda", "max_running": 4, "step_tokens": 256, "kv_memory": 256 << 20, "policy": policy},
        **{"deterministic": True, **NATIVE},
    }
    prompts = [text(NARROW_FLASH, i, n) for i, n in enumerate((2300, 129, 700, 5, 1600))]
    engine = random_engine(NARROW_FLASH, **options)
    alone = [engine.generate([prompt], greedy(12, logprobs=2))[0] for prompt in prompts]
    again = engine.generate(prompts, greedy(12, logprobs=2))  # together, and resumed
    assert again[0].usage.resume != "cold"
    longer = np.concatenate([prompts[0], np.asarray(alone[0].token_ids, np.int32), prompts[1]])
    [warm] = engine.generate([longer], greedy(12, logprobs=2))  # decode steps wrote a part of what it reads
    engine.reset_cache()
    [cold] = engine.generate([longer], greedy(12, logprobs=2))
    for one, other in zip([*again, warm], [*alone, cold], strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs
