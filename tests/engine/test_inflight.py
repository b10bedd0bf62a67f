"""Agents that come at once with one new prompt to begin with: it runs once, and nobody's answer changes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
from test_async_engine import collect, greedy, ids, run

from triptych.engine.api import AsyncEngine, Engine
from triptych.engine.load import LoadedEngine
from triptych.words import RequestFacts

PAGE, LOOKBACK = 128, 4
SHARED = (np.arange(1400, dtype=np.int32) * 13 + 5) % 900 + 50
WHOLE = len(SHARED) // PAGE * PAGE
AGENTS = [
    np.concatenate([SHARED, (np.arange(20 + 9 * number, dtype=np.int32) * 7 + number) % 900 + 50])
    for number in range(8)
]


@pytest.fixture(scope="module")
def alone() -> Iterator[list[tuple[int, ...]]]:
    """What each gives by itself, without any cache."""
    engine = Engine.load("tiny", kv_memory=64 << 20, max_running=1, prefix_cache=False)
    yield [out.token_ids for agent in AGENTS for out in engine.generate([agent], greedy(16))]
    engine.close()


@pytest.mark.parametrize("policy", ["adaptive", "none"])
@pytest.mark.parametrize("step_tokens", [200, 4096])
def test_what_agents_share_runs_once(alone: list[tuple[int, ...]], policy: str, step_tokens: int) -> None:
    engine = Engine.load("tiny", kv_memory=64 << 20, max_running=8, step_tokens=step_tokens, policy=policy)
    outs = engine.generate(AGENTS, greedy(16))
    engine.check_integrity()
    assert [out.token_ids for out in outs] == alone
    stats = engine.stats()
    assert stats.cache["requests_held"] == 7 and stats.cache["pages_adopted"] == 0
    assert sorted(out.usage.cached_tokens > 0 for out in outs) == [False] + [True] * 7
    assert stats.cache["held_tokens_saved"] == stats.cached_tokens == sum(out.usage.cached_tokens for out in outs)
    assert stats.prefill_rows == sum(map(len, AGENTS)) - stats.cached_tokens
    if policy == "adaptive":
        assert stats.cached_tokens == 7 * (WHOLE - LOOKBACK) and stats.cache["snapshot_resumes"] == 7
    engine.close()


def test_who_waits_for_one_that_goes_away_is_answered_all_the_same(
    loaded: LoadedEngine, alone: list[tuple[int, ...]]
) -> None:
    """The one that runs what all share is cancelled in the middle of it; people who watch see who is held."""

    async def scenario(engine: AsyncEngine) -> None:
        first = asyncio.create_task(collect(engine, AGENTS[0], greedy(16), "first"))
        others = [
            asyncio.create_task(collect(engine, agent, greedy(16), f"r{number}"))
            for number, agent in enumerate(AGENTS[1:])
        ]
        seen: list[RequestFacts] = []
        while not any(one.state == "held" for one in seen):
            assert not first.done()
            seen = list((await engine.facts()).requests)
        assert [one.request_id for one in seen if one.state == "prefill"] == ["first.0"]
        first.cancel()
        answers = await asyncio.gather(*others)
        assert [tuple(ids(answer)) for answer in answers] == alone[1:]

    run(loaded, scenario)
