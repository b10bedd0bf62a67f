"""The same prompts on the processor and on the GPU, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from triptych.cache.geometry import CacheGeometry, plan_capacity
from triptych.checkpoint import random_tensors
from triptych.config import EngineConfig, ModelShape
from triptych.engine.api import Engine, Output
from triptych.engine.device import device_for
from triptych.engine.load import _DTYPES, LoadedEngine, arrange, build_loop
from triptych.model.weights import WeightStore
from triptych.words import SamplingParams, TokenIds

NEAR_TIE = 1e-3  # nats between likely tokens that float32 rounding in another order may turn over
NATIVE = 0.5
"""As NEAR_TIE, of native numerics: a value that float32 rounds otherwise may fall to the other side of a step of its
format. Where many tokens are as likely, processors differ by 0.3 nats among themselves, and from exact numerics."""
LIKELY = 5
"""Tokens that are compared then."""


@dataclass
class Total:
    """What was compared in the whole session."""

    tokens: int = 0
    ties: int = 0
    widest: float = 0.0


TOTAL = Total()


def random_engine(shape: ModelShape, *, seed: int = 0, **options: object) -> Engine:
    """An engine with random weights of `shape`, no tokenizer, on the device that `options` say."""
    config = EngineConfig.from_options(**options)
    device = device_for(config)
    store = WeightStore(shape, _DTYPES[config.weight_dtype], mtp=False, device=device)
    for name, tensor in random_tensors(shape, seed):
        if not name.startswith("mtp."):
            store.place(name, tensor)
    geometry = CacheGeometry.of(shape, config.cache.kv_format, config.cache.index_format)
    capacity = plan_capacity(geometry, config.cache.kv_memory or 1 << 30, config.max_running)
    arrange(store, config)
    loop = build_loop(store.weights, config, geometry, capacity)
    limit = min(shape.max_position, capacity.tokens)
    return Engine(LoadedEngine("random", shape, config, None, loop, limit, "", store))


def text(shape: ModelShape, seed: int, length: int) -> TokenIds:
    """`length` random tokens."""
    return np.random.default_rng(seed).integers(2, shape.vocab_size, length).astype(np.int32)


def same(got: Sequence[Output], want: Sequence[Output], near: float = NEAR_TIE) -> None:
    """Each answer has the processor's tokens up to a near-tie, after which it is another text.

    `want` has logprobs of as many of the likeliest tokens as may be nearly tied."""
    for one, truth in zip(got, want, strict=True):
        assert len(one.token_ids) == len(truth.token_ids)
        for at, (token, right) in enumerate(zip(one.token_ids, truth.token_ids, strict=True)):
            TOTAL.tokens += 1
            if token == right:
                continue
            likely = dict(truth.logprobs[at].top)
            gap = likely[right] - likely.get(token, -math.inf)
            assert gap < near, f"token {at}: {token} instead of {right}, {gap:.3g} nats less likely"
            TOTAL.ties += 1
            TOTAL.widest = max(TOTAL.widest, gap)
            break


def greedy(count: int, *, logprobs: int | None = None) -> SamplingParams:
    """`count` tokens, always the likeliest."""
    return SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, logprobs=logprobs)
