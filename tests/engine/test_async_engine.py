"""The engine behind a server: concurrency, cancellation, drain and failures."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from triptych.engine.api import AsyncEngine, Engine
from triptych.engine.load import LoadedEngine
from triptych.errors import ContextTooLong, RequestError, Unavailable
from triptych.words import Delta, FinishReason, SamplingParams, TokenIds

PROMPTS = [(np.arange(n, dtype=np.int32) * 7 + n) % 900 + 50 for n in (5, 130, 257, 600, 64, 300, 900, 33)]


def greedy(n: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True, **more)


def run(loaded: LoadedEngine, scenario: Any) -> None:
    """Run `scenario(engine)` with a started engine; afterwards nothing may be left."""

    async def main() -> None:
        engine = AsyncEngine(loaded)
        await engine.start()
        try:
            await scenario(engine)
        finally:
            assert await engine.drain(10.0)

    loaded.loop.cache.reset()
    asyncio.run(asyncio.wait_for(main(), 60))
    assert not loaded.loop.busy
    loaded.loop.cache.check_integrity()


async def collect(engine: AsyncEngine, prompt: TokenIds, params: SamplingParams, name: str) -> list[Delta]:
    return [delta async for delta in engine.stream(prompt, params, request_id=name)]


def ids(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def test_eight_at_once_with_one_cancelled_equal_each_alone(loaded: LoadedEngine) -> None:
    alone = [out.token_ids for p in PROMPTS for out in Engine(loaded).generate([p], greedy(20))]

    async def scenario(engine: AsyncEngine) -> None:
        async def leave_early() -> None:
            stream = engine.stream(PROMPTS[3], greedy(500), request_id="gone")
            async for _ in stream:
                break
            await stream.aclose()  # type: ignore[attr-defined]

        jobs: list[Coroutine[Any, Any, Any]] = [collect(engine, p, greedy(20), f"r{i}") for i, p in enumerate(PROMPTS)]
        *results, _ = await asyncio.gather(*jobs, leave_early())
        for deltas, expected in zip(results, alone, strict=True):
            assert tuple(ids(deltas)) == expected
            assert deltas[-1].finish_reason is FinishReason.LENGTH

    run(loaded, scenario)


def test_cancelling_the_task_aborts_the_request(loaded: LoadedEngine) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        task = asyncio.create_task(collect(engine, PROMPTS[6], greedy(5000), "long"))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(100):
            if not engine._loop.busy:
                break
            await asyncio.sleep(0.02)
        assert not engine._loop.busy

    run(loaded, scenario)


def test_samples_of_one_request_arrive_by_index(loaded: LoadedEngine) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        params = SamplingParams(max_tokens=6, n=3, seed=1, ignore_eos=True)
        deltas = await collect(engine, PROMPTS[2], params, "n")
        assert {d.index for d in deltas} == {0, 1, 2}
        ends = [d for d in deltas if d.finish_reason is not None]
        assert len(ends) == 3 and all(d.usage is not None and d.usage.completion_tokens == 6 for d in ends)

    run(loaded, scenario)


def test_prompts_may_be_lists_and_are_checked(loaded: LoadedEngine) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        want = ids(await collect(engine, PROMPTS[0], greedy(4), "array"))
        assert ids([d async for d in engine.stream(PROMPTS[0].tolist(), greedy(4), request_id="list")]) == want
        for wrong in ([1.5], [10**6], [True]):
            with pytest.raises(RequestError):
                await anext(engine.stream(wrong, greedy(4), request_id="wrong"))

    run(loaded, scenario)


def test_a_scored_prompt_comes_before_its_first_token(loaded: LoadedEngine) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        first, *others = await collect(engine, PROMPTS[1], replace(greedy(5, prompt_logprobs=1), n=2), "scored")
        assert first.prompt_logprobs is not None and (first.index, first.token_ids) == (0, ())
        assert [one.token_id for one in first.prompt_logprobs.entries()] == PROMPTS[1][1:].tolist()
        assert all(delta.prompt_logprobs is None for delta in others) and len(ids(others)) == 10

    run(loaded, scenario)


def test_stop_string_ends_the_request_and_counts_only_what_is_shown(loaded: LoadedEngine) -> None:
    [whole] = Engine(loaded).generate([PROMPTS[1]], greedy(40))
    stop = whole.text[len(whole.text) // 2 :][:3]

    async def scenario(engine: AsyncEngine) -> None:
        deltas = await collect(engine, PROMPTS[1], greedy(4000, stop=(stop,)), "s")
        assert "".join(d.text for d in deltas) == whole.text[: whole.text.index(stop)]
        assert deltas[-1].finish_reason is FinishReason.STOP
        assert deltas[-1].usage is not None and deltas[-1].usage.completion_tokens == len(ids(deltas)) <= 40

    run(loaded, scenario)


def test_a_prompt_that_cannot_fit_raises_before_the_first_delta(loaded: LoadedEngine) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        with pytest.raises(ContextTooLong):
            await collect(engine, np.zeros(engine.max_context + 5, np.int32), greedy(1), "big")
        assert len(ids(await collect(engine, PROMPTS[0], greedy(3), "ok"))) == 3

    run(loaded, scenario)


def test_a_broken_step_fails_its_requests_and_the_engine_goes_on(
    loaded: LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        def broken(batch: object, caches: object) -> object:
            raise ValueError("a kernel gave up")

        monkeypatch.setattr(loaded.loop.model, "run", broken)
        deltas = await collect(engine, PROMPTS[0], greedy(3), "bad")
        assert deltas[-1].finish_reason is FinishReason.ERROR and deltas[-1].error
        monkeypatch.undo()
        assert len(ids(await collect(engine, PROMPTS[0], greedy(3), "good"))) == 3

    run(loaded, scenario)


def test_a_draining_engine_finishes_what_runs_and_refuses_the_rest(loaded: LoadedEngine) -> None:
    async def main() -> None:
        engine = AsyncEngine(loaded)
        await engine.start()
        running = asyncio.create_task(collect(engine, PROMPTS[0], greedy(30), "first"))
        await asyncio.sleep(0.05)
        draining = asyncio.create_task(engine.drain(20.0))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            await collect(engine, PROMPTS[0], greedy(3), "late")
        assert await draining
        assert len(ids(await running)) == 30

    asyncio.run(asyncio.wait_for(main(), 60))


def test_stopping_ends_running_requests_with_abort(loaded: LoadedEngine) -> None:
    async def main() -> None:
        engine = AsyncEngine(loaded)
        await engine.start()
        running = asyncio.create_task(collect(engine, PROMPTS[0], greedy(100_000), "endless"))
        await asyncio.sleep(0.2)
        await engine.stop()
        assert (await running)[-1].finish_reason is FinishReason.ABORT

    asyncio.run(asyncio.wait_for(main(), 60))
    assert not loaded.loop.busy
    loaded.loop.cache.check_integrity()
