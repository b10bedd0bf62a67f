"""Invariant 1 below the device: what went to the host, a disk or a server and came back gives the same bits.

Every prompt ends at a position where something changes and is continued by 44 tokens, as in test_edges.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import small_engine
from small_engine import SmallEngine, accounted, agree, text
from test_edges import EDGES, pages_for
from tiered import QUESTION, Ground, boundary_of, come_back, engine_over, leave, resumed_from, server_or_skip

from triptych.cache import tiers as tiers_module
from triptych.cache.geometry import LOOKBACK
from triptych.cache.jobs import Jobs

from store_faults import FaultyStore  # isort: skip  (tiered.py makes it importable)

BELOW = ["host", "disk", "remote"]


@pytest.fixture(scope="module", autouse=True)
def remembered_truth() -> Iterator[None]:
    """The same texts come back from every tier: work out once what each gives alone."""
    patch = pytest.MonkeyPatch()
    patch.setattr(small_engine, "alone", functools.cache(small_engine.alone))
    yield
    patch.undo()


@pytest.fixture
def ground(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ground]:
    """A directory, and a server if the test's parameter names it."""
    ground = Ground(tmp_path / "disk")
    if request.node.callspec.params.get("tier") == "remote":
        for ground.server in server_or_skip(tmp_path):
            yield ground
    else:
        yield ground


@pytest.mark.parametrize("length", EDGES)
@pytest.mark.parametrize("tier", BELOW)
def test_resumed_after_everything_left_the_device(ground: Ground, tier: str, length: int) -> None:
    with ground.engine(tier, pages=pages_for(length) + 4) as engine:
        leave(engine, length)
        resumed_from(come_back(engine, length), tier, length)


@pytest.mark.parametrize("length", EDGES)
@pytest.mark.parametrize("tier", ["disk", "remote"])
def test_resumed_after_a_restart(ground: Ground, tier: str, length: int) -> None:
    with ground.engine(tier, pages=pages_for(length) + 4) as engine:
        engine.ask(text(1, length), 1)
    with ground.engine(tier, pages=pages_for(length) + 4) as engine:
        resumed_from(come_back(engine, length), tier, length)


@pytest.mark.parametrize("tier", BELOW)
def test_without_a_snapshot_below_windows_are_rebuilt(ground: Ground, tier: str) -> None:
    """The policy keeps none: pages alone come back, and a trapezoid is run on them."""
    with ground.engine(tier, policy="none") as engine:
        leave(engine, 1000)
        usage = come_back(engine, 1000)
        assert usage.resume == "trapezoid" and usage.cached_by_tier == {tier: usage.cached_tokens}


@pytest.mark.parametrize("tier", BELOW)
def test_a_conversation_that_leaves_after_each_turn(ground: Ground, tier: str) -> None:
    with ground.engine(tier) as engine:
        history = text(1, 300)
        for turn in range(4):
            answer = engine.ask(history, 150)
            agree(answer)
            ran = len(history) - len(text(3, 9)) - 1 if turn else 0  # the last token of an answer never ran
            assert accounted(answer).cached_by_tier == ({tier: boundary_of(ran) - LOOKBACK} if turn else {})
            history = (*answer.prompt, *answer.tokens, *text(3, 9))
            assert engine.loop.settle(30.0)
            engine.spoil_device()


def test_the_fastest_tier_that_has_a_page_is_named(tmp_path: Path) -> None:
    """The disk has all of them, the host only what fits: what each gives adds up."""
    with Ground(tmp_path).engine("host", "disk", host_pages=5) as engine:
        leave(engine, 1200)
        usage = come_back(engine, 1200)
        assert set(usage.cached_by_tier) == {"host", "disk"}
        assert sum(usage.cached_by_tier.values()) == usage.cached_tokens == 1152 - LOOKBACK


def test_what_was_fetched_counts_as_on_the_device_the_next_time(tmp_path: Path) -> None:
    with Ground(tmp_path).engine("disk") as engine:
        leave(engine, 512)
        resumed_from(come_back(engine, 512), "disk", 512)
        usage = come_back(engine, 512)
        assert usage.cached_tokens == 512 - LOOKBACK and not usage.cached_by_tier


def test_an_object_is_on_the_device_or_on_the_host_and_once_on_the_disk(tmp_path: Path) -> None:
    with Ground(tmp_path).engine("host", "disk") as engine:
        host, disk = engine.cache.tiers.host, engine.cache.tiers.stores["disk"]
        assert host is not None
        leave(engine, 512)
        assert sum(key.kind == "page" for key in host.objects) == 4
        stored = disk.stats()
        come_back(engine, 512, tokens=1)
        assert not any(key.kind == "page" for key in host.objects), "they have moved up"
        leave(engine, 512)
        assert sum(key.kind == "page" for key in host.objects) == 4
        assert disk.stats().bytes_written == stored.bytes_written and disk.stats().objects == stored.objects


def test_a_full_host_keeps_what_ranks_higher(tmp_path: Path) -> None:
    """Two sessions and room for half of them: nothing is kept that ranks below what was given up."""
    with Ground(tmp_path).engine("host", host_pages=7, policy="none") as engine:
        host, ranks = engine.cache.tiers.host, {}
        assert host is not None
        for seed in (5, 6):
            engine.ask(text(seed, 1000), 1)
            ranks |= {key: engine.cache.memory.rank(node) for key, node in engine.cache.memory.tree.nodes.items()}
            engine.spoil_device()
        kept = {key.name for key in host.objects}
        assert len(kept) == 7 and host.evicted + host.refused == 7
        assert min(ranks[name] for name in kept) >= max(rank for name, rank in ranks.items() if name not in kept)
        for seed in (5, 6):
            agree(engine.ask((*text(seed, 1000), *QUESTION), 3))


def test_tenants_share_nothing_below_either(tmp_path: Path) -> None:
    with Ground(tmp_path).engine("host", "disk") as engine:
        leave(engine, 512, salt="a")
        assert come_back(engine, 512, salt="b").resume == "cold"
        assert come_back(engine, 512).resume == "cold"
        assert come_back(engine, 512, salt="a").cached_by_tier == {"host": 508}


# ---- in the background


@contextmanager
def slow_disk(directory: Path, operation: str, seconds: float, **options: object) -> Iterator[SmallEngine]:
    """An engine over a disk whose gets or puts take `seconds` each."""
    [disk] = Ground(directory).stores("disk")
    slow = FaultyStore(disk, lambda asked, key: "delay" if asked == operation else "ok", delay_s=seconds)
    with engine_over([slow], **options) as engine:
        yield engine


def test_a_slow_fetch_holds_up_nobody_who_runs(tmp_path: Path) -> None:
    """One request decodes while another's pages come from a slow disk, before that one has a slot."""
    with Ground(tmp_path).engine("disk") as engine:
        leave(engine, 1000)
    with slow_disk(tmp_path, "get", 0.02) as engine:
        first = engine.live[engine.add(text(9, 20), 60)]
        engine.step()
        engine.add((*text(1, 1000), *QUESTION), 5)
        answers, during = [], []
        while engine.loop.busy:
            answers += engine.step()
            engine.cache.check_integrity()
            if engine.cache.tiers.fetching:
                during.append(len(first.tokens))
        assert len(during) > 1 and during[-1] > during[0], "the first one got tokens meanwhile"
        for answer in answers:
            agree(answer)
        assert sorted(accounted(answer).resume for answer in answers) == ["cold", "snapshot"]


def test_queued_requests_are_fetched_for_before_they_have_a_slot(tmp_path: Path) -> None:
    prompts = [text(30 + i, 300) for i in range(3)]
    with Ground(tmp_path).engine("disk") as engine:
        for prompt in prompts:
            engine.ask(prompt, 1)
    with Ground(tmp_path).engine("disk", slots=1) as engine:
        engine.add(text(9, 40), 30)
        engine.step()
        for prompt in prompts:
            engine.add((*prompt, *QUESTION), 3)
        while engine.loop.scheduler.stats().running and engine.cache.stats().pages_cached < 6:
            engine.step()
        assert engine.loop.scheduler.stats().running, "pages of those who wait arrived while the first one ran"
        answers = engine.drain()
        assert len(answers) == 4
        for answer in answers:
            agree(answer)
        assert sum(bool(accounted(answer).cached_by_tier) for answer in answers) == 3


def test_two_requests_for_one_prefix_fetch_it_once(tmp_path: Path) -> None:
    with Ground(tmp_path).engine("disk") as engine:
        leave(engine, 1000)
        before = engine.cache.tiers.moved.bytes_out["disk"]
        for question in (10, 11):
            engine.add((*text(1, 1000), *text(question, 4)), 6)
        for answer in engine.drain():
            agree(answer)
        moved = engine.cache.tiers.moved.bytes_out["disk"] - before
        assert moved == 7 * engine.cache.geometry.page_bytes + engine.cache.geometry.snapshot_bytes


def test_an_aborted_request_leaves_what_was_fetched_for_it(tmp_path: Path) -> None:
    with Ground(tmp_path).engine("disk") as engine:
        leave(engine, 1000)
    with slow_disk(tmp_path, "get", 0.05) as engine:
        name = engine.add((*text(1, 1000), *QUESTION), 5)
        engine.step()
        assert engine.cache.tiers.fetching
        engine.abort(name)
        engine.cache.check_integrity()
        assert engine.loop.settle(30.0)
        assert engine.cache.stats().pages_cached == 7
        resumed_from(come_back(engine, 1000), "disk", 1000)


def test_what_is_being_saved_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving protects what it reads from eviction, so only so much may be on its way at once."""
    with slow_disk(tmp_path, "put", 0.005, pages=40) as engine:
        limit = 3 * engine.cache.geometry.page_bytes
        monkeypatch.setattr(tiers_module, "SAVING_BYTES", limit)
        largest, mover = 0, engine.loop._mover
        begin = mover.run

        def run(jobs: Jobs) -> None:
            nonlocal largest
            largest = max(largest, sum(saving.size for saving in engine.cache.tiers.saving.values()))
            begin(jobs)

        monkeypatch.setattr(mover, "run", run)
        engine.ask(text(1, 3000), 1)
        engine.cache.check_integrity()
        assert 0 < largest < limit + engine.cache.geometry.snapshot_bytes
        assert engine.cache.tiers.stores["disk"].stats().objects > 3000 // 128, "all pages and a snapshot"
