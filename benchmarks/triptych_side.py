"""Triptych running the same checkpoint through its whole engine: scheduler, caches, model and sampler in every step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from benchmarks.rows import Timed
from triptych.cache.geometry import CacheGeometry
from triptych.config import PAGE, CacheConfig, EngineConfig
from triptych.engine.load import load
from triptych.words import FinishReason, Request, SamplingParams, TokenIds


class TriptychSide:
    """One engine; prompts share what they have in common through the prefix cache, as in service."""

    def __init__(self, directory: Path, *, threads: int, chunk: int, kv_memory: int, max_running: int) -> None:
        config = EngineConfig(
            threads=threads, step_tokens=chunk, max_running=max_running, cache=CacheConfig(kv_memory=kv_memory)
        )
        self._loaded = load(directory, config)
        self._loop = self._loaded.loop
        self._count = 0
        self.live: dict[str, int] = {}

    def add(self, tokens: Tensor) -> str:
        """Queue a prompt [n] for greedy decoding without end; `step` then runs its prefill."""
        self._count += 1
        request_id = f"b{self._count}"
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=10**6)
        self._loop.add(Request(request_id, _ids(tokens), params))
        self.live[request_id] = 0
        return request_id

    def step(self, timed: Timed) -> list[int]:
        """One engine step; the tokens that came out."""
        with timed:
            events = self._loop.step()
        for event in events:
            assert event.error is None and event.reason is None, event
            self.live[event.request_id] += 1
        return [event.token_id for event in events if event.token_id is not None]

    def finish(self, request_id: str) -> int:
        """End a request; returns how many of its prompt tokens were not computed again."""
        usage = self._loop.finish(request_id, FinishReason.ABORT)
        assert usage is not None
        del self.live[request_id]
        return usage.cached_tokens

    def kv_bytes(self, tokens: int) -> int:
        """Bytes that `tokens` tokens of one running request occupy: pages and the window slot."""
        geometry = CacheGeometry.of(self._loaded.shape, self._loaded.config.cache.kv_format)
        return -(-tokens // PAGE) * geometry.page_bytes + geometry.slot_bytes


def _ids(tokens: Tensor) -> TokenIds:
    return tokens.numpy().astype(np.int32)
