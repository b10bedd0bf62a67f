"""What people are told of conversations: where each lies, where it resumes, how long it stays."""

from __future__ import annotations

import time

import numpy as np
from test_cache_tiers import GEOMETRY, end, manager, settle, text

from triptych.cache import CacheManager
from triptych.cache.geometry import CacheCapacity
from triptych.cache.policies import Policies
from triptych.cache.retention import retention_named
from triptych.cache.sessions import Sessions
from triptych.words import CacheHints, SessionFacts, TokenIds


def serve(cache: CacheManager, name: str, tokens: TokenIds, hints: CacheHints | None = None, salt: str = "") -> None:
    plan = cache.admit(name, tokens, salt, len(tokens) + 128, hints or CacheHints())
    assert plan is not None
    assert cache.grow(name, len(tokens))
    cache.snapshot_writes(name, plan.start, len(tokens))
    cache.advance(name, tokens, len(tokens))
    end(cache, name)


def look(cache: CacheManager, **more: float) -> tuple[SessionFacts, ...]:
    return cache.sessions.look(cache, lambda name: name[:8], **more)


def test_a_conversation_that_is_continued_is_one() -> None:
    cache = manager(frames=200)
    first, other = text(600), text(700, seed=2)
    serve(cache, "a", first)
    serve(cache, "other", other)
    title = look(cache)[1].session
    longer = np.concatenate([first, text(400, seed=1)])
    serve(cache, "b", longer)
    newest, oldest = look(cache)
    assert (newest.tokens, newest.turns, newest.session) == (896, 2, title)
    assert oldest.tokens == 640 and oldest.turns == 1 and len(cache.sessions) == 2
    assert newest.by_tier == {"device": 896} and newest.resumes_from == "device" and newest.resumes_at == 896
    assert newest.rebuild == 0 and newest.tenant == "" and newest.ttl is newest.pin is None


def test_a_name_keeps_what_was_edited_together_and_tenants_apart() -> None:
    cache = manager(frames=200)
    named = CacheHints(session="conversation 7")
    serve(cache, "a", text(600), named)
    serve(cache, "b", text(500, seed=5), named)
    serve(cache, "c", text(500, seed=6), named, salt="someone")
    assert [(one.tenant, one.tokens) for one in look(cache)] == [("someone", 384), ("", 384)]


def test_what_was_evicted_is_told_by_tier() -> None:
    cache = manager(frames=24, host=12)
    for at in range(4):
        serve(cache, f"r{at}", text(10 * 128, seed=at))
        settle(cache)
        cache.check_integrity()
    newest, *older = look(cache)
    assert newest.by_tier == {"device": 1280}
    assert any("host" in one.by_tier for one in older)
    memory, host = cache.memory.tree.nodes, cache.tiers.host
    assert host is not None
    for session, facts in zip(reversed(cache.sessions._sessions), (newest, *older), strict=True):
        whole = 0
        for key in session.keys:
            if key not in memory and ("page", key) not in host:
                break
            whole += 128
        assert sum(facts.by_tier.values()) == whole
        assert facts.resumes_at <= whole and (facts.resumes_from != "") == (facts.resumes_at > 0)


def test_without_a_snapshot_it_says_what_is_rebuilt() -> None:
    cache = manager(frames=200)
    serve(cache, "a", text(1280))
    for snapshot in tuple(cache.memory.snapshots.values()):
        cache.memory.drop_snapshot(snapshot)
    [one] = look(cache)
    assert (one.resumes_at, one.resumes_from) == (0, "")
    assert one.rebuild == int(cache.planner.rebuild_tokens(1280))


def test_time_to_live_and_pin_run_down() -> None:
    now = 100.0
    cache = manager(frames=200)
    cache.clock = lambda: now
    serve(cache, "a", text(600), CacheHints(ttl=60.0, pin=30.0))
    now = 110.0
    [one] = look(cache)
    assert (one.idle, one.ttl, one.pin, one.expired) == (10.0, 50.0, 20.0, False)
    now = 200.0
    cache.leases.expire(now)
    [one] = look(cache)
    assert one.expired and one.ttl == 0.0 and one.pin is None


def test_the_default_time_to_live_is_for_who_names_none() -> None:
    policies = Policies(retention=retention_named("lru"), ttl=20.0)
    cache = CacheManager(GEOMETRY, CacheCapacity(200, 4), 2, policies=policies, clock=lambda: 100.0)
    serve(cache, "a", text(600))
    serve(cache, "b", text(600, seed=1), CacheHints(ttl=60.0))
    assert [one.ttl for one in look(cache)] == [60.0, 20.0]
    cache.leases.expire(130.0)
    assert [one.expired for one in look(cache)] == [False, True]


def test_what_is_remembered_is_bounded_and_forgotten_by_a_reset() -> None:
    cache = manager(frames=200)
    cache.sessions = Sessions(limit=3, pages=16)
    for at in range(5):
        serve(cache, f"r{at}", text(4 * 128, seed=at))
    assert len(cache.sessions) == 3
    serve(cache, "long", text(14 * 128, seed=9))
    assert len(cache.sessions) == 1, "many pages push out the older ones"
    assert cache.sessions._room == 2 and len(cache.sessions._index) <= 2
    cache.reset()
    assert look(cache) == () and cache.sessions._room == 16


def test_a_look_takes_its_budget_and_goes_on_next_time() -> None:
    cache = manager(frames=200)
    for at in range(8):
        serve(cache, f"r{at}", text(4 * 128, seed=at))
    told = [len(look(cache, budget=0.0)) for _ in range(9)]
    assert told == [1, 2, 3, 4, 5, 6, 7, 8, 8], "one at a time if there is no time at all"


def test_a_look_at_long_conversations_takes_microseconds_each() -> None:
    cache = manager(frames=9000)
    serve(cache, "long", text(8192 * 128))
    seconds = []
    for _ in range(5):
        begin = time.thread_time()
        [one] = look(cache)
        seconds.append(time.thread_time() - begin)
    assert one.tokens == 8192 * 128
    assert min(seconds) < 0.005  # about 30 microseconds here
