"""Requests that would compute the same at the same time: one does, the others wait for it and no longer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schedule_engine import Engine, text

from triptych.words import FinishReason, TokenIds

PAGE, LOOKBACK = 128, 4


def begun(steps: list[dict[str, tuple[int, int]]]) -> dict[str, int]:
    """Where each request began."""
    return {name: rows[0] for step in reversed(steps) for name, rows in step.items()}


def rows_of(steps: list[dict[str, tuple[int, int]]]) -> int:
    """Rows of all steps but those of decodes."""
    return sum(end - start for step in steps for start, end in step.values() if end - start > 1)


def asked(shared: TokenIds, number: int, own: int = 50) -> TokenIds:
    """A prompt that begins with `shared` and goes on by itself."""
    return np.concatenate([shared, text(own, seed=1000 + number)])


# ---- what it is for


@pytest.mark.parametrize("budget", [100, 256, 4096])
def test_requests_that_share_a_beginning_run_it_once(budget: int) -> None:
    engine = Engine(pages=64, running=8, budget=budget)
    shared = text(600)
    for number in range(6):
        engine.add(str(number), asked(shared, number))
    steps = [engine.step()]
    assert set(steps[0]) == {"0"}
    steps += engine.drain()
    assert begun(steps) == {"0": 0} | {str(number): 512 - LOOKBACK for number in range(1, 6)}
    assert rows_of(steps) == 650 + 5 * (650 - 508)
    stats, found = engine.cache.stats(), engine.scheduler.stats()
    assert (stats.requests_held, stats.held_tokens_saved, stats.pages_adopted) == (5, 5 * 508, 0)
    assert (found.cached_tokens, found.prompt_tokens) == (5 * 508, 6 * 650)


def test_samples_of_one_prompt_wait_for_it() -> None:
    engine = Engine(budget=100)
    for name in ("0", "1", "2"):
        engine.add(name, text(256))
    engine.add("other", text(10, seed=1))
    assert set(engine.step()) == {"0", "other"}
    found = begun(engine.drain())
    assert (found["1"], found["2"]) == (252, 252)


def test_who_shares_more_with_a_later_one_waits_for_that_too() -> None:
    engine = Engine(pages=64, running=8, budget=4096)
    root, trunk = text(300), asked(text(300), 1, 300)
    for name, prompt in (("a", asked(root, 2)), ("b", asked(trunk, 3)), ("c", asked(trunk, 4))):
        engine.add(name, prompt)
    assert [set(engine.step()) for _ in range(3)] == [{"a"}, {"a", "b"}, {"a", "b", "c"}]
    assert engine.cache.stats().held_tokens_saved == 252 + 508


def test_one_who_comes_while_it_runs_waits_for_the_rest() -> None:
    engine = Engine(pages=64, budget=200)
    engine.add("a", text(1500))
    assert engine.step() == {"a": (0, 200)}
    engine.add("b", asked(text(1200), 1))
    steps = engine.drain()
    assert begun(steps)["b"] == 1152 - LOOKBACK and engine.cache.stats().pages_adopted == 0


def test_windows_that_are_being_rebuilt_are_waited_for() -> None:
    """All pages are there, but no snapshot: the first one rebuilds the windows and leaves one."""
    engine = Engine(pages=64, running=8, budget=4096)
    engine.add("before", text(1408))
    engine.drain()
    for snapshot in list(engine.cache.memory.snapshots.values()):
        engine.cache.memory.drop_snapshot(snapshot)
    for number in range(4):
        engine.add(str(number), asked(text(1408), number))
    first = engine.step()
    assert set(first) == {"0"} and 0 < first["0"][0] < 1408 - PAGE
    then = engine.step()
    assert {then[name][0] for name in "123"} == {1408 - LOOKBACK}


# ---- when nobody waits


def test_a_beginning_shorter_than_a_page_holds_nobody_up() -> None:
    engine = Engine(budget=4096)
    for number in range(3):
        engine.add(str(number), asked(text(PAGE - 1), number))
    assert set(engine.step()) == {"0", "1", "2"}


def test_tenants_neither_share_nor_wait() -> None:
    engine = Engine(budget=4096)
    for salt in ("", "a", "b"):
        engine.add(f"of {salt}", text(600), salt=salt)
    assert len(engine.step()) == 3


def test_without_a_prefix_cache_nobody_waits() -> None:
    engine = Engine(budget=4096)
    engine.cache.prefix_cache = False
    for name in "ab":
        engine.add(name, text(600), max_tokens=3)
    assert set(engine.step()) == {"a", "b"}
    engine.drain()


def test_a_prompt_that_is_not_trusted_neither_waits_nor_is_waited_for() -> None:
    engine = Engine(budget=4096)
    engine.cache.distrust(text(256), "")
    for name in "ab":
        engine.add(name, text(600))
    assert engine.step() == {"a": (0, 600), "b": (0, 600)}


def test_nobody_waits_where_no_snapshot_is_allowed_and_pages_alone_save_nothing() -> None:
    engine = Engine(budget=4096, policy="none")
    for number in range(2):
        engine.add(str(number), asked(text(PAGE), number))
    assert set(engine.step()) == {"0", "1"}


def test_where_no_snapshot_is_allowed_pages_are_waited_for_that_save_something() -> None:
    engine = Engine(pages=64, budget=4096, policy="none")
    for number in range(2):
        engine.add(str(number), asked(text(1408), number))
    assert set(engine.step()) == {"0"}
    assert 0 < engine.step()["1"][0] < 1408 - PAGE
    assert engine.cache.stats().snapshots_cached == 0 and engine.cache.stats().trapezoid_resumes == 1


@pytest.mark.parametrize(("processed", "waits"), [(128, False), (1920, True)])
def test_a_leader_that_has_much_more_to_run_than_is_saved_is_not_waited_for(processed: int, waits: bool) -> None:
    """Somebody else has left 16 pages and a snapshot; only the 17th is still to come, from one who is far or near."""
    cache, prompt = Engine(pages=128).cache, text(17 * PAGE)
    for name, tokens, upto in (("slow", prompt, processed), ("ahead", prompt[: 16 * PAGE], 16 * PAGE)):
        plan = cache.admit(name, tokens, "", len(tokens))
        assert plan is not None and cache.grow(name, upto)
        cache.snapshot_writes(name, plan.start, upto)
        if upto > plan.start:
            cache.advance(name, tokens, upto)
    assert (cache.held("late", prompt, "") is not None) == waits


# ---- nobody waits for ever


@pytest.mark.parametrize(
    "happens",
    [
        lambda engine: engine.finish("a", FinishReason.ABORT),
        lambda engine: engine.finish("a", FinishReason.ERROR),
        lambda engine: engine.cache.reset(),
    ],
    ids=["aborted", "failed", "reset"],
)
def test_who_waits_goes_on_when_its_leader_is_gone(happens: Callable[[Engine], object]) -> None:
    engine = Engine(pages=64, running=4, budget=300)
    for name in "abc":
        engine.add(name, text(900))
    assert set(engine.step()) == {"a"}
    happens(engine)
    assert set(engine.step()) - {"a"} == {"b"}, "b leads now"
    assert begun(engine.drain())["c"] == 896 - LOOKBACK and not engine.scheduler.busy


def test_who_waits_for_a_preempted_one_comes_after_it_and_goes_on_alone_if_that_ends() -> None:
    engine = Engine(pages=64, running=4, budget=300)
    for name in "ab":
        engine.add(name, text(900))
    engine.step()
    engine.cache.renew(b"other weights")
    engine.scheduler.suspend_all()
    assert set(engine.step()) == {"a"}
    engine.scheduler.suspend_all()
    engine.finish("a", FinishReason.ABORT)
    assert set(engine.step()) == {"b"}


def test_a_request_that_is_gone_leaves_no_claim() -> None:
    engine = Engine(pages=64, running=2, budget=100)
    for name in "ab":
        engine.add(name, text(900))
    engine.add("other", text(50, seed=1))
    assert set(engine.step()) == {"a"}, "the other one would take the place of b"
    engine.finish("b", FinishReason.ABORT)
    assert set(engine.step()) == {"a", "other"}


def test_who_passes_leaves_a_place_for_those_who_wait() -> None:
    engine = Engine(pages=64, running=3, budget=400)
    for name, prompt in (("a", text(900)), ("b", text(900)), ("x", text(50, seed=1)), ("y", text(50, seed=2))):
        engine.add(name, prompt, max_tokens=100)
    assert set(engine.step()) == {"a", "x"}
    engine.step()
    engine.step()
    assert "b" in engine.step() and [one.request_id for one in engine.scheduler.sequences()][-1] == "y"


def test_who_passes_leaves_memory_for_those_who_wait() -> None:
    """Sixteen frames: the first one needs 7, the one who waits 4 more; so there is no room for 6."""
    engine = Engine(pages=16, running=4, budget=100)
    shared = text(800)
    engine.add("a", asked(shared, 1), max_tokens=2)
    engine.add("b", asked(shared, 2, 300), max_tokens=2)
    engine.add("large", text(700, seed=1), max_tokens=2)
    engine.add("small", text(60, seed=2), max_tokens=2)
    assert set(engine.step()) == {"a"}
    assert engine.scheduler.stats().waiting == 3
    steps = engine.drain()
    first = {name: next(index for index, step in enumerate(steps) if name in step) for name in ("b", "large")}
    assert first["b"] < first["large"]


# ---- two steps under way


@pytest.mark.parametrize(("budget", "place"), [(300, True), (700, False)])
def test_a_snapshot_is_asked_for_only_where_no_step_has_passed(budget: int, place: bool) -> None:
    """A step is under way when the follower comes: windows at 512 are still to come, or will have to be rebuilt."""
    engine = Engine(pages=64, budget=budget, depth=1)
    engine.add("a", text(1300), max_tokens=4)
    flying = engine.plan()
    engine.add("b", asked(text(600), 1), max_tokens=4)
    behind = engine.plan()
    assert (512 in engine.cache.holdings["a"].places) == place
    engine.apply(flying)
    engine.apply(behind)
    engine.drain()
    stats = engine.cache.stats()
    assert (stats.snapshot_resumes, stats.trapezoid_resumes) == (place, not place)
    assert stats.held_tokens_saved == 508 if place else 0 < stats.held_tokens_saved < 380


# ---- any tree of prompts


@st.composite
def forests(draw: st.DrawFn) -> list[TokenIds]:
    """Prompts of which each parts from an earlier one anywhere, or is new."""
    prompts: list[TokenIds] = []
    for number in range(draw(st.integers(1, 9))):
        own = text(draw(st.sampled_from([1, 60, 127, 128, 129, 300, 520])), seed=number)
        base = draw(st.sampled_from(prompts)) if prompts and draw(st.booleans()) else own[:0]
        prompts.append(np.concatenate([base[: draw(st.integers(0, len(base)))], own]))
    return prompts


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(forests(), st.sampled_from([16, 100, 128, 300, 5000]), st.sampled_from([1, 2, 3, 16]))
def test_with_room_no_page_is_ever_computed_twice(prompts: list[TokenIds], budget: int, running: int) -> None:
    engine = Engine(pages=400, running=running, budget=budget)
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, max_tokens=2)
    engine.drain()
    pages = {prompt[:end].tobytes() for prompt in prompts for end in range(PAGE, len(prompt) + 1, PAGE)}
    stats = engine.cache.stats()
    assert stats.pages_adopted == 0
    assert stats.pages_sealed >= len(pages)
    assert engine.scheduler.stats().waiting == 0 and not engine.scheduler.busy
