"""Facts about a running engine: who runs, how far, what could be resumed; and that looking disturbs nobody."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_async_engine import collect, greedy, run

from triptych.config import EngineConfig
from triptych.engine.api import AsyncEngine
from triptych.engine.facts import Watch
from triptych.engine.load import LoadedEngine, load
from triptych.server import panels as by
from triptych.words import CacheHints, Facts, RequestFacts

SECRET = "the name of a patient"


def test_an_engine_that_does_not_run_has_no_facts(loaded: LoadedEngine) -> None:
    assert asyncio.run(AsyncEngine(loaded).facts()) == Facts()


def test_a_long_prefill_is_seen_on_its_way(loaded: LoadedEngine) -> None:
    prompt = np.arange(3000, dtype=np.int32) % 900 + 50

    async def scenario(engine: AsyncEngine) -> None:
        task = asyncio.create_task(collect(engine, prompt, greedy(40), "long"))
        seen: list[RequestFacts] = []
        while not task.done():
            seen += (await engine.facts()).requests
        prefill = [one for one in seen if one.state == "prefill"]
        rows = [one.processed for one in prefill]
        assert len(set(rows)) > 3 and rows == sorted(rows) and rows[-1] < 3000
        decode = [one.generated for one in seen if one.state == "decode"]
        assert decode == sorted(decode) and max(decode) <= 40
        assert {one.prompt_tokens for one in seen} == {3000} and {one.limit for one in seen} == {3040}
        assert all(one.seconds is not None and 0 <= one.seconds < 60 for one in seen)
        facts = await engine.facts()
        assert facts.requests == () and facts.running == 0
        [session] = facts.sessions
        assert session.tokens == 3039 // 128 * 128 and session.by_tier == {"device": session.tokens}
        assert session.resumes_at == session.tokens and session.turns == 1
        assert engine.stats().prefill_rows - before >= 3000

    before = loaded.loop.stats().prefill_rows
    run(loaded, scenario)


def test_names_of_callers_leave_as_labels(loaded: LoadedEngine) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        prompt = np.arange(300, dtype=np.int32) + 50
        hints = CacheHints(session=SECRET, ttl=60.0)
        told = ""
        stream = engine.stream(prompt, greedy(5), request_id="r", salt=SECRET, hints=hints)
        async for _ in stream:
            told += repr(await engine.facts())
        told += repr(last := await engine.facts())
        assert SECRET not in told and last.sessions[0].ttl is not None
        assert len(last.sessions[0].session) == len(last.sessions[0].tenant) == 8
        assert last.sessions[0].session in told.partition("sessions")[0], "a running request says whose session it is"

    run(loaded, scenario)


def test_those_who_ask_at_once_share_one_look(loaded: LoadedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    gather = Watch.gather

    def counting(self: Watch) -> Facts:
        nonlocal looks
        looks += 1
        return gather(self)

    monkeypatch.setattr(Watch, "gather", counting)

    async def scenario(engine: AsyncEngine) -> None:
        told = await asyncio.gather(*(engine.facts() for _ in range(50)))
        assert looks == 1 and len({id(facts) for facts in told}) == 1
        impatient = asyncio.create_task(engine.facts())
        await asyncio.sleep(0)
        impatient.cancel()
        assert (await engine.facts()).seconds < 1.0, "one who goes away takes nothing from the others"

    run(loaded, scenario)


def test_a_look_that_fails_ends_no_request(loaded: LoadedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Watch) -> Facts:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Watch, "_gather", broken)

    async def scenario(engine: AsyncEngine) -> None:
        task = asyncio.create_task(collect(engine, np.arange(300, dtype=np.int32) + 50, greedy(10), "r"))
        while not task.done():
            assert await engine.facts() == Facts()
        assert task.result()[-1].error is None

    run(loaded, scenario)


def test_stop_answers_who_still_asks(loaded: LoadedEngine) -> None:
    async def main() -> None:
        engine = AsyncEngine(loaded)
        await engine.start()
        asked = [asyncio.create_task(engine.facts()) for _ in range(3)]
        await asyncio.sleep(0)
        await engine.stop()
        await asyncio.wait_for(asyncio.gather(*asked), 5)

    asyncio.run(main())


def test_an_engine_that_starts_again_tells_facts_again(loaded: LoadedEngine) -> None:
    engine = AsyncEngine(loaded)

    async def once() -> None:
        await engine.start()
        left = asyncio.create_task(engine.facts())  # nobody waits for it
        await asyncio.sleep(0)
        await engine.stop()
        left.cancel()

    async def again() -> None:
        await engine.start()
        assert (await asyncio.wait_for(engine.facts(), 5)).requests == ()
        await engine.stop()

    asyncio.run(once())
    asyncio.run(again())


def test_panels_are_the_sizes_of_the_geometry(loaded: LoadedEngine) -> None:
    engine, cache = AsyncEngine(loaded), loaded.loop.cache
    panels = engine.panels
    assert sum(panels.page.values()) == cache.geometry.page_bytes
    assert panels.room == {"device": cache.capacity.bytes(cache.geometry)}
    fields: dict[str, Any] = dataclasses.asdict(panels)
    assert fields["snapshot"] == cache.geometry.snapshot_bytes


def test_memory_by_kind_is_what_lies_in_the_frames(tmp_path: Path) -> None:
    """More conversations than the device holds: what is told by tier and kind equals what is there."""
    options = {"kv_memory": 6 << 20, "host_memory": 1 << 20, "disk": str(tmp_path), "disk_memory": 1 << 30}
    loaded = load("tiny", EngineConfig.from_options(**options, max_running=4, threads=1))
    cache = loaded.loop.cache
    geometry, host = cache.geometry, cache.tiers.host
    assert host is not None

    async def scenario(engine: AsyncEngine) -> None:
        random = np.random.default_rng(0)
        prompts = [random.integers(50, 900, n).astype(np.int32) for n in (600, 2500, 1200, 2000, 1500, 300, 2200)]
        for at in range(0, len(prompts), 2):
            both = [collect(engine, p, greedy(8), f"r{at}-{i}") for i, p in enumerate(prompts[at : at + 2])]
            await asyncio.gather(*both)
        await collect(engine, prompts[0], greedy(8), "again")
        while loaded.loop.busy:
            await asyncio.sleep(0.02)
        facts, stats, panels = await engine.facts(), engine.stats(), engine.panels
        told = by.memory(stats, panels)
        pages, snapshots = len(cache.memory.tree.nodes), len(cache.memory.snapshots)
        slack = geometry.snapshot_frames * geometry.page_bytes - geometry.snapshot_bytes
        assert told["device"]["csa"] == pages * panels.page["csa"] and snapshots
        assert told["device"]["snapshot"] == snapshots * geometry.snapshot_bytes
        assert told["device"]["padding"] == pages * panels.page["padding"] + snapshots * slack
        below = [key.kind for key in host.objects]
        assert told["host"]["hca"] == below.count("page") * panels.page["hca"] and below
        assert told["host"]["snapshot"] == below.count("snapshot") * geometry.snapshot_bytes
        for tier in ("device", "host"):
            assert sum(told[tier].values()) == panels.room[tier]
        assert told["disk"]["object"] > 0 and sum(told["disk"].values()) == 1 << 30
        sources = by.sources(stats)
        assert sum(sources.values()) == sum(len(p) for p in prompts) + len(prompts[0])
        assert all(count >= 0 for count in sources.values())
        assert sum(by.plans(stats).values()) == len(prompts) + 1
        assert {len(one.by_tier) for one in facts.sessions} >= {1}
        assert all(sum(one.by_tier.values()) == one.tokens for one in facts.sessions), "the disk has all of it"

    run(loaded, scenario)
