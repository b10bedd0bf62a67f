"""Many samples of one prompt: it runs once, its pages are shared, and in deterministic mode nothing else matters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from triptych.engine.api import Engine, Output
from triptych.words import SamplingParams

PAGE, LOOKBACK = 128, 4
N = 8
PROMPTS = [(np.arange(n, dtype=np.int32) * 7 + n) % 900 + 50 for n in (700, 131, 384, 40)]
DRAWS = SamplingParams(max_tokens=24, temperature=0.9, top_p=0.95, n=N, seed=11, logprobs=1, ignore_eos=True)
FEW = replace(DRAWS, n=3, max_tokens=8)


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine.load("tiny", kv_memory=64 << 20, max_running=N, step_tokens=256)
    yield engine
    engine.check_integrity()
    engine.close()


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_a_prompt_runs_once_and_its_pages_are_held_once(engine: Engine, prompt: np.ndarray) -> None:
    length, whole = len(prompt), len(prompt) // PAGE
    seen = []
    for delta in engine.stream(prompt, DRAWS):
        if delta.finish_reason is None:
            seen.append(engine.stats())
    # beyond its last boundary a fork runs the tokens itself, and the look-back before it
    tail = length - max(0, whole * PAGE - LOOKBACK)
    assert engine.stats().prefill_rows == length + (N - 1) * tail
    cache = seen[-1].cache
    assert cache["pages_sealed"] == whole and cache["pages_adopted"] == 0
    busiest = max(seen, key=lambda stats: stats.running)
    assert busiest.running == N
    own = max(stats.cache["pages_held"] for stats in seen)
    assert own <= whole + N * (1 + (length % PAGE + 24 > PAGE)), "a fork holds pages of its own where it need not"
    if whole:
        assert cache["snapshot_resumes"] == N - 1


def told(outputs: list[Output]) -> list[tuple[Any, ...]]:
    return [(out.token_ids, [(one.logprob, one.top) for one in out.logprobs]) for out in outputs]


@pytest.fixture(scope="module")
def alone() -> list[list[tuple[Any, ...]]]:
    """What each prompt gives by itself, one sample at a time, without any cache, in one chunk."""
    engine = Engine.load("tiny", deterministic=True, kv_memory=64 << 20, max_running=1, prefix_cache=False)
    found = [told(engine.generate([prompt], FEW)) for prompt in PROMPTS]
    engine.close()
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"max_running": 16, "step_tokens": 67},
        {"max_running": 3, "policy": "none"},
        {"max_running": 5, "kv_memory": 6 << 20},
    ],
    ids=str,
)
def test_samples_do_not_depend_on_company_chunks_or_cache(
    alone: list[list[tuple[Any, ...]]], options: dict[str, Any]
) -> None:
    """All of them together, then again from the cache, to the last bit of each log-probability."""
    engine = Engine.load("tiny", **({"deterministic": True, "kv_memory": 64 << 20} | options))
    wanted = [one for some in alone for one in some]
    assert len({tokens for tokens, _ in wanted}) > len(wanted) // 2, "these samples hardly differ"
    for _ in range(2):
        assert told(engine.generate(PROMPTS, FEW)) == wanted
    found = engine.stats()
    assert found.cached_tokens + found.recomputed_tokens > 0
    engine.close()
