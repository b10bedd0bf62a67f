"""The canary: resumed requests are computed again in idle time, and a cache that lies is found out and dropped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_engine import SmallEngine, accounted, agree, text
from tiered import QUESTION, Ground, engine_over, warnings

from triptych.cache.store import Store
from triptych.config import EngineConfig
from triptych.engine.canary import PREFIX, Canary
from triptych.engine.facts import panels
from triptych.server.metrics import Metrics

TOLERANCE = 1e-3
DOCUMENT = text(1, 512)


@contextmanager
def watched(share: float = 1.0, stores: tuple[Store, ...] = (), **options: object) -> Iterator[SmallEngine]:
    """An engine whose canary checks `share` of what is resumed."""
    with engine_over(stores, canary=Canary(share, TOLERANCE), **options) as engine:
        yield engine


def counts(engine: SmallEngine) -> tuple[float, float]:
    """Checks made, checks failed."""
    cache = engine.loop.stats().cache
    return cache["canary_checked"], cache["canary_failed"]


def spoil_snapshot(engine: SmallEngine, at: int) -> None:
    """Other window rows at boundary `at`."""
    assert engine.loop.settle(30.0), "rows of the last boundary are copied after the request's end"
    [snapshot] = [s for s in engine.cache.memory.snapshots.values() if s.node.end == at]
    scribble(engine, snapshot.frames)


def spoil_page(engine: SmallEngine, at: int) -> None:
    """Other entries in the page that ends at `at`."""
    [node] = [node for node in engine.cache.memory.tree.nodes.values() if node.end == at]
    scribble(engine, (node.page,))


def scribble(engine: SmallEngine, frames: tuple[int, ...]) -> None:
    memory = engine.loop._runner.pools.frames
    for frame in frames:
        memory[frame] = torch.linspace(-2, 2, memory.shape[1])


SPOIL = {"snapshot": lambda engine: spoil_snapshot(engine, 512), "page": lambda engine: spoil_page(engine, 256)}


def test_a_healthy_cache_passes_every_check() -> None:
    with watched() as engine:
        history = text(2, 200)
        for turn in range(4):
            answer = engine.ask(history, 100)
            agree(answer)
            assert counts(engine) == (turn, 0), "what was not resumed needs no check"
            history = (*answer.prompt, *answer.tokens, *text(3, 9))


def test_after_a_trapezoid_too() -> None:
    with watched(policy="none") as engine:
        for question in (2, 3):
            agree(engine.ask((*text(1, 1000), *text(question, 5)), 44))
        assert counts(engine) == (1, 0)


def test_what_came_from_below_is_checked_too(tmp_path: Path) -> None:
    with watched(stores=tuple(Ground(tmp_path).stores("disk")), host_pages=100) as engine:
        for _ in range(3):
            agree(engine.ask((*DOCUMENT, *QUESTION), 20))
            assert engine.loop.settle(30.0)
            engine.spoil_device()
        assert counts(engine) == (2, 0)


@pytest.mark.parametrize("what", SPOIL)
def test_a_wrong_object_is_found_and_not_used_again(what: str, caplog: pytest.LogCaptureFixture) -> None:
    with watched() as engine:
        engine.ask(DOCUMENT, 1)
        SPOIL[what](engine)
        engine.ask(DOCUMENT, 1, salt="somebody else")
        engine.ask((*DOCUMENT, *QUESTION), 30)
        assert counts(engine) == (1, 1)
        [line] = warnings(caplog)
        assert line.startswith("canary: 546 tokens resumed at 512 give logits that differ by")
        engine.cache.check_integrity()
        for _ in range(2):
            answer = engine.ask((*DOCUMENT, *QUESTION), 30)
            agree(answer)
            assert accounted(answer).resume == "cold"
        answer = engine.ask((*DOCUMENT, *QUESTION), 30, salt="somebody else")
        agree(answer)
        assert accounted(answer).resume == "snapshot"
        assert counts(engine) == (2, 1) and len(warnings(caplog)) == 1


def test_a_failed_check_shows_in_the_metrics() -> None:
    with watched() as engine:
        engine.ask(DOCUMENT, 1)
        config = EngineConfig()
        facts = panels(engine.loop.cache, config.cache)
        metrics = Metrics(SimpleNamespace(stats=engine.loop.stats, panels=facts, config=config))
        assert b"triptych_cache_canary_failed 0.0" in metrics.text()
        spoil_snapshot(engine, 512)
        engine.ask((*DOCUMENT, *QUESTION), 30)
        assert b"triptych_cache_canary_failed 1.0" in metrics.text()
        assert b"triptych_cache_canary_checked 1.0" in metrics.text()


def test_what_followed_from_a_wrong_object_is_gone_after_a_restart(tmp_path: Path) -> None:
    """A request that resumed from a wrong snapshot filled pages of its own, and these are on the disk by now."""
    with watched(stores=tuple(Ground(tmp_path).stores("disk"))) as engine:
        engine.ask(DOCUMENT, 1)
        spoil_snapshot(engine, 512)
        wrong = engine.ask((*DOCUMENT, *QUESTION), 140)
        assert counts(engine) == (1, 1)
        assert engine.loop.settle(30.0)
    with watched(stores=tuple(Ground(tmp_path).stores("disk"))) as engine:
        agree(engine.ask(DOCUMENT, 1))  # the pages before the wrong ones are there again
        agree(engine.ask((*wrong.prompt, *wrong.tokens, *text(3, 4)), 20))
        assert counts(engine)[1] == 0


def test_a_check_gives_way_to_work_and_is_made_up_for() -> None:
    with watched(step_tokens=64) as engine:
        for _ in range(2):
            engine.add((*DOCUMENT, *QUESTION), 20)
            while engine.live:
                engine.step()
        canary = engine.loop._canary
        assert canary is not None and canary.waiting and canary.running is None
        for _ in range(3):
            engine.step()
        assert canary.running is not None and counts(engine) == (0, 0)
        before = engine.cache.stats().frames_free
        engine.add(text(7, 100), 20)
        engine.step()
        assert canary.running is None and canary.waiting, "it has ended, and will be tried again"
        assert engine.cache.stats().frames_free >= before, "and left no page behind"
        for answer in engine.drain():
            agree(answer)
        assert counts(engine) == (1, 0)


def test_a_check_leaves_nothing_behind() -> None:
    with watched() as engine:
        for _ in range(2):
            engine.add((*DOCUMENT, *QUESTION), 20)
            while engine.live:
                engine.step()
        before = engine.cache.stats()
        assert engine.drain() == [], "nobody hears of it"
        after = engine.cache.stats()
        assert counts(engine) == (1, 0)
        assert (after.frames_free, after.slots_free) == (before.frames_free, before.slots_free)


def test_a_check_is_nobodys_request_in_the_totals() -> None:
    with watched() as engine:
        for _ in range(2):
            engine.add((*DOCUMENT, *QUESTION), 20)
            while engine.live:
                engine.step()
        before = engine.loop.stats()
        engine.drain()
        after = engine.loop.stats()
        assert counts(engine) == (1, 0)
        assert (after.prompt_tokens, after.generated_tokens) == (before.prompt_tokens, before.generated_tokens)


def test_half_of_them() -> None:
    with watched(share=0.5) as engine:
        engine.ask(DOCUMENT, 1)
        for question in range(10):
            engine.ask((*DOCUMENT, *text(10 + question, 5)), 2)
        assert counts(engine) == (5, 0)
        assert not engine.loop._canary._passed, "it remembers only who runs"  # type: ignore[union-attr]


def test_only_some_wait_for_idle_time() -> None:
    """A server that is never idle does not collect checks without end."""
    canary = Canary(1.0, TOLERANCE)
    for number in range(100):
        canary.saw(f"r{number}", "", DOCUMENT, 128, torch.zeros(3))  # type: ignore[arg-type]
        canary.ended(f"r{number}")
    assert len(canary._waiting) == 8 and not canary._watched


def test_a_check_that_breaks_a_step_is_not_tried_again() -> None:
    canary = Canary(1.0, TOLERANCE)
    for name in ("a", "b"):
        canary.saw(name, "", DOCUMENT, 128, torch.zeros(3))  # type: ignore[arg-type]
        canary.ended(name)
    first = canary.next()
    assert first.request_id.startswith(PREFIX) and not canary.waiting
    canary.ended(first.request_id)
    assert canary.running is None and canary.waiting
    canary.next()
    assert canary.judge(torch.zeros(3)) is None and not canary.waiting
