"""The scheduler's promises one by one; their interplay is proven in test_schedule_machine.py."""

from __future__ import annotations

import numpy as np
import pytest
from schedule_engine import Engine, text

from triptych.errors import ContextTooLong, QueueFull, RequestError
from triptych.words import FinishReason, StepPlan, StepResult, Usage


def in_flight_of(engine: Engine) -> StepPlan:
    """The plan in flight."""
    plan = engine.scheduler._flights[-1].plan
    assert plan is not None
    return plan


def test_nothing_to_do_is_no_plan() -> None:
    assert Engine().scheduler.plan() is None


def test_decodes_come_first_and_leave_the_rest_to_prefills() -> None:
    engine = Engine(budget=100)
    engine.add("short", text(50), max_tokens=50)
    assert engine.step() == {"short": (0, 50)}
    engine.add("long", text(500, seed=1))
    plan = engine.plan()
    assert [(c.request_id, c.start, c.end) for c in plan.chunks] == [("short", 50, 51), ("long", 0, 99)]
    assert [c.samples for c in plan.chunks] == [True, False]
    engine.apply(plan)
    assert engine.step() == {"short": (51, 52), "long": (99, 198)}


def test_a_short_prompt_passes_a_long_one_and_the_long_one_goes_on() -> None:
    engine = Engine(budget=100)
    engine.add("long", text(1000), max_tokens=1)
    assert engine.step() == {"long": (0, 100)}
    engine.add("short", text(20, seed=1), max_tokens=1)
    assert engine.step() == {"long": (100, 180), "short": (0, 20)}


def test_chunks_say_what_the_resume_plan_says() -> None:
    engine = Engine(budget=150)
    engine.add("a", text(600), max_tokens=1)
    engine.drain()
    engine.add("b", np.concatenate([text(600), text(300, seed=1)]), max_tokens=2)
    first = engine.plan().chunks[0]
    assert (first.start, first.end, first.write_from, first.read_from) == (508, 658, 512, 380)
    assert first.restore is not None and len(first.pages) == 6
    engine.apply(in_flight_of(engine))
    second = engine.plan().chunks[0]
    assert (second.start, second.end, second.write_from, second.restore) == (658, 808, 658, None)
    assert not second.samples


def test_usage_adds_up() -> None:
    engine = Engine()
    engine.add("a", text(600), max_tokens=3)
    engine.drain()
    engine.add("b", text(600), max_tokens=3)
    engine.step()
    usage = engine.finish("b")
    assert usage == Usage(600, 508, 4, 1, resume="snapshot", completion_by_weights={0: 1})
    assert usage.computed_tokens == 88
    stats = engine.scheduler.stats()
    assert (stats.prompt_tokens, stats.cached_tokens, stats.recomputed_tokens) == (1200, 508, 4)
    assert (stats.generated_tokens, stats.running, stats.waiting) == (4, 0, 0)


def test_the_next_turn_resumes_at_the_end_of_the_output() -> None:
    engine = Engine()
    engine.add("a", text(250), max_tokens=20)
    engine.drain()
    turn = np.concatenate([text(250), np.full(20, 7, np.int32), text(30, seed=1)])
    engine.add("b", turn)
    plan = engine.plan()
    assert plan.chunks[0].start == 252 and plan.chunks[0].restore is not None
    save = plan.saves[0]
    assert (save.position, save.frames) == (256, plan.chunks[0].restore)


def test_saves_wait_for_the_next_plan_with_rows() -> None:
    engine = Engine()
    engine.add("a", text(250), max_tokens=20)
    engine.drain()
    assert engine.scheduler.plan() is None
    engine.add("b", text(5, seed=1))
    assert [save.position for save in engine.plan().saves] == [256]


def test_admission_is_first_come_first_served() -> None:
    engine = Engine(pages=8, budget=64)
    engine.add("first", text(400))
    engine.add("big", text(600, seed=1))
    engine.add("small", text(10, seed=2))
    assert set(engine.step()) == {"first"}
    assert engine.scheduler.stats().waiting == 2


def test_the_newest_is_preempted_and_loses_nothing() -> None:
    engine = Engine(pages=6, budget=256)
    engine.add("old", text(250), max_tokens=300)
    engine.add("new", text(250, seed=1), max_tokens=140)
    ends: dict[str, Usage] = {}
    preempted_at = 0
    while engine.scheduler.busy:
        plan = engine.plan()
        if engine.scheduler.stats().preemptions and not preempted_at:
            preempted_at = plan.step
            assert [c.request_id for c in plan.chunks] == ["old"]
        for name in engine.apply(plan):
            if engine.scheduler.usage(name).completion_tokens == engine.scheduler.max_new_tokens(name):
                ends[name] = engine.finish(name, FinishReason.LENGTH)
    assert preempted_at
    assert list(ends) == ["old", "new"]
    assert (ends["old"].completion_tokens, ends["new"].completion_tokens) == (300, 140)
    assert ends["new"] == Usage(250, 0, 0, 140, completion_by_weights={0: 140})
    stats = engine.scheduler.stats()
    assert stats.rerun_tokens > 0 and stats.prompt_tokens == 500
    assert stats.generated_tokens == 440


def test_a_preempted_request_finds_its_pages_again() -> None:
    """There is no room for a snapshot when memory has run out; its pages stay, and windows are rebuilt from them."""
    engine = Engine(pages=6, budget=256)
    engine.add("old", text(250), max_tokens=300)
    engine.add("new", text(250, seed=1), max_tokens=140)
    while not engine.scheduler.stats().preemptions:
        engine.apply(engine.plan())
    engine.finish("old")
    again = engine.plan().chunks[0]
    assert again.request_id == "new" and again.write_from >= 256


def test_nobody_passes_a_preempted_request() -> None:
    engine = Engine(pages=6, running=2, budget=600)
    engine.add("old", text(250), max_tokens=300)
    engine.add("new", text(250, seed=1), max_tokens=140)
    engine.add("small", text(10, seed=2), max_tokens=2)
    begun = [name for step in engine.drain() for name, (start, end) in step.items() if end - start > 1]
    assert begun == ["old", "new", "new", "small"]
    assert engine.scheduler.stats().preemptions == 1


def test_every_limit_is_kept() -> None:
    engine = Engine(pages=4, context=10**6)
    assert engine.scheduler.max_tokens == 512
    engine.add("a", text(500), max_tokens=None)
    assert engine.scheduler.max_new_tokens("a") == 12
    assert sum(len(step) for step in engine.drain()) == 2 + 11
    engine.add("b", text(511, seed=1), max_tokens=50)
    assert engine.scheduler.max_new_tokens("b") == 1
    engine.drain()
    short = Engine(context=300, max_context=200)
    short.add("c", text(150))
    assert short.scheduler.max_new_tokens("c") == 4
    short.add("d", text(150), max_tokens=None)
    assert short.scheduler.max_new_tokens("d") == 50


def test_what_can_never_fit_is_refused_with_numbers() -> None:
    with pytest.raises(ContextTooLong, match=r"512 tokens .* the cache holds 512 in all.*--kv-memory"):
        Engine(pages=4).add("a", text(512))
    with pytest.raises(ContextTooLong, match=r"300 tokens .* a request may have 200 in all.*--max-context"):
        Engine(max_context=200).add("a", text(300))


def test_malformed_requests_are_refused() -> None:
    engine = Engine()
    with pytest.raises(RequestError, match="empty"):
        engine.add("a", text(0))
    engine.add("a", text(5))
    with pytest.raises(RequestError, match="already running"):
        engine.add("a", text(5))


def test_a_full_queue_says_so() -> None:
    engine = Engine(max_waiting=2)
    engine.add("a", text(5))
    engine.add("b", text(5))
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        engine.add("c", text(5))
    engine.step()
    engine.add("c", text(5))


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("in_flight", [False, True])
def test_an_abort_at_any_moment_leaves_nothing_behind(steps: int, in_flight: bool) -> None:
    engine = Engine(budget=128)
    engine.add("a", text(300), max_tokens=10)
    for _ in range(steps):
        engine.step()
    plan = engine.plan() if in_flight else None
    assert engine.scheduler.abort("a") and not engine.scheduler.abort("a")
    if plan is not None:
        assert engine.apply(plan) == []
    assert not engine.scheduler.busy
    stats = engine.cache.stats()
    assert (stats.pages_held, stats.slots_free) == (0, 4)


def test_an_aborted_request_leaves_its_work_to_the_next() -> None:
    engine = Engine(budget=300)
    engine.add("a", text(300), max_tokens=100)
    for _ in range(90):
        engine.step()
    engine.finish("a", FinishReason.ABORT)
    engine.add("b", np.concatenate([text(300), np.full(88, 7, np.int32), text(9)]))
    assert engine.plan().chunks[0].start == 380


def test_a_slot_whose_rows_are_in_the_air_is_not_saved() -> None:
    engine = Engine(budget=300)
    engine.add("a", text(900), max_tokens=10)
    engine.step()
    engine.plan()
    engine.finish("a", FinishReason.ABORT)
    engine.apply(in_flight_of(engine))
    engine.add("b", text(5))
    assert engine.plan().saves == ()


def test_a_failed_row_ends_its_request_and_is_not_kept() -> None:
    engine = Engine(budget=580)
    engine.add("a", text(900), max_tokens=10)
    engine.step()
    plan = engine.plan()
    assert engine.apply(plan, failed={"a": "not a number"}) == []
    engine.finish("a", FinishReason.ERROR)
    assert engine.cache.stats().pages_cached == 0
    engine.add("b", text(900))
    plan = engine.plan()
    assert plan.saves == () and plan.chunks[0].write_from == 0


def test_steps_come_one_at_a_time() -> None:
    engine = Engine()
    engine.add("a", text(10))
    plan = engine.plan()
    with pytest.raises(RuntimeError, match="still running"):
        engine.scheduler.plan()
    with pytest.raises(RuntimeError, match="not the one in flight"):
        engine.scheduler.apply(plan, StepResult(99, ()))


def test_after_a_step_that_died_nothing_cached_is_trusted() -> None:
    engine = Engine()
    engine.add("before", text(300), max_tokens=2)
    engine.drain()
    engine.add("a", text(300), max_tokens=2)
    engine.plan()
    engine.finish("a", FinishReason.ERROR)
    engine.add("b", text(300), max_tokens=2)
    assert engine.plan().chunks[0].start == 0


def test_plans_are_values() -> None:
    engine = Engine(budget=128)
    engine.add("a", text(200), max_tokens=5)
    plan = engine.plan()
    before = (plan.chunks[0].tokens.tolist(), plan.chunks[0].pages.tolist())
    engine.apply(plan)
    engine.drain()
    assert (plan.chunks[0].tokens.tolist(), plan.chunks[0].pages.tolist()) == before
    with pytest.raises(ValueError, match="read-only"):
        plan.chunks[0].tokens[0] = 1
