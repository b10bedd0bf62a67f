"""The manager driven by a trace: what is found and counted, against slow counts of the same thing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_traces import mooncake_rows

from triptych.cache.geometry import LOOKBACK, CacheGeometry, plan_capacity
from triptych.cache.prefix import page_keys, root_key
from triptych.cache.store.protocol import ObjectKey
from triptych.config import PAGE, SHAPES
from triptych.errors import ConfigError
from triptych.words import TokenIds
from triptych.workload.agents import AgentTraffic, agent_trace
from triptych.workload.mooncake import MooncakeTrace
from triptych.workload.oracle import Future
from triptych.workload.replay import (
    POLICIES,
    Replay,
    ReplayResult,
    ReplaySettings,
    SimulatedDisk,
    replay,
    timed,
)
from triptych.workload.sessions import Part, SessionRequest, SessionTrace
from triptych.workload.traces import Trace

FLASH = CacheGeometry.of(SHAPES["flash"], "fp8")
ENDLESS = 8 << 30  # more than any trace here fills
TIGHT = 256 << 20  # 32K tokens and four requests at once
IN_FLIGHT = 4

LITERAL = MooncakeTrace("literal", mooncake_rows())
SESSION = MooncakeTrace("session", mooncake_rows(), "session")
AGENTS = agent_trace(100, 1, AgentTraffic(users=12))
FEW_FIT = 3 << 29  # of AGENTS


def run(trace: Trace, memory: int = ENDLESS, policy: str = "adaptive", **more: int) -> ReplayResult:
    return replay(trace, ReplaySettings(FLASH, memory, policy, in_flight=IN_FLIGHT, **more))


def run_open(trace: Trace, memory: int, policy: str = "adaptive", **more: int) -> Replay:
    """The same, and the manager can be looked at afterwards; not for belady."""
    one = Replay(ReplaySettings(FLASH, memory, policy, in_flight=IN_FLIGHT, **more))
    one.run(trace)
    one.manager.check_integrity()
    return one


def untimed(result: ReplayResult) -> dict[str, Any]:
    """Without what a clock measured."""
    times = ("manager_seconds", "match_us_p50", "match_us_p99")
    return {name: value for name, value in result.to_dict().items() if name not in times}


def known_pages(trace: Trace) -> list[tuple[int, int]]:
    """(whole pages of each prompt that an earlier prompt and output began with, its length), by comparing tokens."""
    before: list[tuple[str, TokenIds]] = []
    found = []
    for request in trace:
        most = 0
        for tenant, text in before:
            size = min(len(text), len(request.prompt))
            differ = np.flatnonzero(text[:size] != request.prompt[:size])
            if tenant == request.tenant:
                most = max(most, (int(differ[0]) if len(differ) else size) // PAGE)
        found.append((most, len(request.prompt)))
        before.append((request.tenant, np.concatenate([request.prompt, request.output])))
    return found


def conversation(*lengths: tuple[int, int], tenant: str = "", start: float = 0.0) -> SessionTrace:
    """One session of turns (tokens added, tokens answered), ten seconds apart."""
    parts: list[Part] = []
    out = []
    for number, (added, answered) in enumerate(lengths):
        parts.append(Part(f"i{number}", added, "user"))
        output = Part(f"o{number}", answered)
        out.append(SessionRequest(start + 10.0 * number, "s", tenant, tuple(parts), output))
        parts.append(output)
    return SessionTrace("conversation", out)


# ---- what is found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("trace", [LITERAL, SESSION], ids=["literal", "session"])
def test_endless_memory_finds_every_page_that_came_before(trace: Trace, policy: str) -> None:
    result = run(trace, policy=policy)
    reference = known_pages(trace)
    assert result.cached_tokens + result.recomputed_tokens == sum(PAGE * pages for pages, _ in reference)
    ideal = sum(min(PAGE * pages, length - 1) for pages, length in reference)
    assert result.ideal_hit_rate == pytest.approx(ideal / result.prompt_tokens)
    again = result.recomputed_tokens / result.prompt_tokens
    assert result.hit_rate == pytest.approx(result.page_hit_rate - again)
    assert (result.evictions, result.unservable) == (0, 0)


@pytest.mark.parametrize("memory", [TIGHT, ENDLESS])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_token_is_cached_recomputed_or_computed(policy: str, memory: int) -> None:
    result = run(SESSION, memory, policy)
    assert result.policy == policy
    assert result.requests == len(SESSION) == sum(result.resumes.values())
    assert result.prompt_tokens == sum(len(request.prompt) for request in SESSION)
    assert result.cached_tokens + result.recomputed_tokens + result.computed_tokens == result.prompt_tokens
    assert result.hit_rate == result.cached_tokens / result.prompt_tokens
    left = result.computed_tokens + result.recomputed_token_equivalents
    assert result.computed_share == pytest.approx(left / result.prompt_tokens)
    assert 0 <= result.recomputed_token_equivalents <= result.recomputed_tokens
    assert 0 <= result.hit_rate <= result.page_hit_rate
    assert result.evictions == result.pages_evicted + result.snapshots_evicted
    assert (result.evictions > 0) is (memory == TIGHT)


def test_without_snapshots_windows_are_always_rebuilt() -> None:
    one = run_open(SESSION, ENDLESS, "none")
    assert set(one.result.resumes) == {"cold", "trapezoid"}
    assert one.manager.counters.snapshots_written == 0
    assert one.result.bytes_by_kind["snapshots"] == 0
    assert 0 < one.result.recomputed_token_equivalents < one.result.recomputed_tokens


def test_with_a_snapshot_at_every_boundary_only_the_lookback_runs_again() -> None:
    """Outputs are never asked for again in a literal trace, so every chain ends at a boundary of a prompt."""
    result = run(LITERAL, policy="full")
    resumed = sum(pages > 0 for pages, _ in known_pages(LITERAL))
    assert result.resumes == {"cold": len(LITERAL) - resumed, "snapshot": resumed}
    assert result.recomputed_tokens == result.recomputed_token_equivalents == LOOKBACK * resumed


def test_bounded_runs_one_window_where_there_is_no_snapshot() -> None:
    result = run(SESSION, TIGHT, "bounded")
    assert result.resumes["bounded"] > 0 and "trapezoid" not in result.resumes
    assert result.recomputed_token_equivalents == result.recomputed_tokens


def test_a_turn_resumes_at_the_last_boundary_of_the_output_before_it() -> None:
    """300 + 341 tokens are five pages and one token."""
    one = run_open(conversation((300, 341), (100, 5)), ENDLESS)
    assert one.result.resumes == {"cold": 1, "snapshot": 1}
    assert (one.result.cached_tokens, one.result.recomputed_tokens) == (5 * PAGE - LOOKBACK, LOOKBACK)
    assert one.result.computed_tokens == 300 + 1 + 100


def test_a_turn_has_ended_before_the_next_one_of_its_session_comes() -> None:
    """However many may be in flight: the next prompt holds its output, whose end has its snapshot by then."""
    first, second = conversation((300, 341), (100, 5)).requests
    alien = replace(first, time=5.0, tenant="b")
    elsewhere = replace(second, session="another")
    assert run(SessionTrace("one", [first, second])).cached_tokens == 5 * PAGE - LOOKBACK
    for others in ([elsewhere], [alien, elsewhere]):
        assert run(SessionTrace("other", [first, *others])).cached_tokens < 300


def test_the_ends_of_parts_are_resumable_when_nobody_has_parted_there_yet() -> None:
    """The second user resumes behind the system prompt, because the trace says where that ends."""
    tools, system = Part("tools", 6000, "tools"), Part("system", 2000, "system")
    every = [
        SessionRequest(float(n), f"s{n}", "", (tools, system, Part(f"q{n}", 20_000, "user")), Part(f"o{n}", 9))
        for n in range(2)
    ]
    result = run(SessionTrace("two", every))
    assert result.resumes == {"cold": 1, "snapshot": 1}
    assert result.cached_tokens == 8000 // PAGE * PAGE - LOOKBACK


def test_tenants_share_nothing() -> None:
    one, other = conversation((1000, 10), tenant="a"), conversation((1000, 10), tenant="b", start=20.0)
    assert run(SessionTrace("two", [*one.requests, *other.requests])).cached_tokens == 0
    again = conversation((1000, 10), tenant="a", start=20.0)
    assert run(SessionTrace("two", [*one.requests, *again.requests])).cached_tokens > 0


@pytest.mark.parametrize("trace", [LITERAL, SESSION], ids=["literal", "session"])
def test_who_knows_the_future_finds_more_pages_than_who_knows_the_past(trace: Trace) -> None:
    """On these traces; it is no bound, as snapshots cost pages and belady ranks both alike."""
    best, lru = run(trace, TIGHT, "belady"), run(trace, TIGHT, "lru")
    assert lru.page_hit_rate < best.page_hit_rate < best.ideal_hit_rate
    assert best.computed_share < lru.computed_share


def test_more_memory_finds_more_and_evicts_less() -> None:
    found = [run(SESSION, memory, "lru") for memory in (TIGHT, 3 * TIGHT // 2, ENDLESS)]
    for less, more in pairwise(found):
        assert less.page_hit_rate < more.page_hit_rate
        assert less.evictions > more.evictions


# ---- limits


def test_a_request_longer_than_the_memory_is_counted_and_the_others_are_served() -> None:
    capacity = plan_capacity(FLASH, TIGHT, IN_FLIGHT).tokens
    fits, too_long = conversation((capacity - 10, 10)), conversation((capacity - 10, 11), start=10.0)
    after = conversation((1000, 10), tenant="after", start=20.0)
    trace = SessionTrace("long", [*fits.requests, *too_long.requests, *after.requests])
    for policy in POLICIES:
        result = run(trace, TIGHT, policy)
        assert (result.requests, result.unservable) == (3, 1), policy
        assert sum(result.resumes.values()) == 2
        assert result.computed_tokens == result.prompt_tokens == 2 * (capacity - 10) + 1000


def test_where_nothing_can_be_served_every_number_is_one() -> None:
    """NaN is no JSON."""
    result = run(conversation((200_000, 1)), TIGHT)
    assert (result.requests, result.unservable) == (1, 1)
    numbers = [value for value in result.to_dict().values() if isinstance(value, float)]
    assert len(numbers) > 5 and all(map(math.isfinite, numbers))


def test_requests_end_early_when_memory_does_not_suffice_for_those_in_flight() -> None:
    """Four of them would need four times the memory."""
    capacity = plan_capacity(FLASH, TIGHT, IN_FLIGHT).tokens
    every = [conversation((capacity - 600, 600), tenant=str(n), start=n).requests[0] for n in range(6)]
    one = run_open(SessionTrace("large", every), TIGHT)
    assert (one.result.unservable, one.result.resumes) == (0, {"cold": 6})


def test_too_little_memory_and_an_unknown_policy_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot hold 4 window slots"):
        run(LITERAL, 1 << 20)
    with pytest.raises(ConfigError, match="Did you mean 'adaptive'"):
        run(LITERAL, policy="adaptve")


def test_the_least_memory_that_is_accepted_is_enough_to_run() -> None:
    least = IN_FLIGHT * FLASH.slot_bytes + (2 + FLASH.snapshot_frames) * FLASH.page_bytes
    one = run_open(conversation((200, 100), (100, 300), (2000, 1)), least)
    assert (one.result.requests, one.result.unservable) == (3, 1)
    with pytest.raises(ConfigError):
        run(LITERAL, least - 1)


# ---- bytes


@pytest.mark.parametrize("policy", POLICIES)
def test_bytes_stay_within_the_memory_and_say_what_they_are(policy: str) -> None:
    result = run(SESSION, TIGHT, policy)
    kinds = result.bytes_by_kind
    assert set(kinds) == {"pages", "snapshots", "slots"}
    assert sum(kinds.values()) <= result.peak_bytes <= TIGHT
    assert kinds["slots"] == IN_FLIGHT * FLASH.slot_bytes
    assert kinds["pages"] > 0 and kinds["pages"] % FLASH.page_bytes == 0
    assert kinds["snapshots"] % FLASH.snapshot_bytes == 0
    assert 0.9 < result.useful_bytes_share <= 1.0
    assert result.bytes_moved_by_tier == result.cached_by_tier == {} and result.write_amplification is None


def test_lower_tiers_bring_back_what_the_device_gave_up() -> None:
    alone = run(SESSION, TIGHT, "lru")
    one = run_open(SESSION, TIGHT, "lru", host_memory=TIGHT // 4, disk=4 * TIGHT)
    result, moved = one.result, one.result.bytes_moved_by_tier
    assert result.page_hit_rate > alone.page_hit_rate
    assert set(result.cached_by_tier) == {"host", "disk"} == set(moved)
    assert sum(result.cached_by_tier.values()) <= result.cached_tokens
    for tier, tokens in result.cached_by_tier.items():
        assert tokens > 0
        # what was cached came up, and nothing leaves the host that did not come to it
        assert moved[tier]["out"] >= -(-tokens // PAGE) * FLASH.page_bytes
    assert 0 < moved["host"]["out"] <= moved["host"]["in"]
    disk = one.manager.tiers.stores["disk"].stats()
    assert moved["disk"]["in"] == disk.bytes_written >= disk.bytes_used > 0
    assert not one.manager.tiers.busy


@pytest.mark.parametrize("tier", ["host_memory", "disk"])
def test_one_lower_tier_is_enough(tier: str) -> None:
    one = run_open(SESSION, TIGHT, "lru", **{tier: ENDLESS})
    name = tier.removesuffix("_memory")
    assert set(one.result.bytes_moved_by_tier) == {name}
    assert one.result.cached_by_tier[name] > 0


def test_an_endless_disk_loses_nothing() -> None:
    """Also where room for what it holds is only made by ending those in flight."""
    one = run_open(AGENTS, FEW_FIT, disk=64 << 30)
    reference = sum(PAGE * pages for pages, _ in known_pages(AGENTS))
    assert one.result.cached_tokens + one.result.recomputed_tokens == reference
    assert one.manager.tiers.moved.missed_saves == 0
    assert one.result.evictions > 0


def test_agent_traffic_writes_little_more_to_disk_than_its_pages() -> None:
    one = run_open(agent_trace(300, 1, AgentTraffic(users=12)), 2 * FEW_FIT, host_memory=1 << 29, disk=64 << 30)
    assert one.result.write_amplification is not None
    sealed = one.manager.counters.pages_sealed * FLASH.page_bytes
    assert one.result.write_amplification == one.result.bytes_moved_by_tier["disk"]["in"] / sealed
    assert 1.0 < one.result.write_amplification <= 1.3
    assert one.result.cached_by_tier["disk"] > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_two_runs_are_equal_but_for_their_times(policy: str) -> None:
    tiers = {"host_memory": TIGHT // 4, "disk": TIGHT}
    assert untimed(run(SESSION, TIGHT, policy, **tiers)) == untimed(run(SESSION, TIGHT, policy, **tiers))


def test_chunks_change_nothing_that_is_found_in_endless_memory() -> None:
    found = {chunk: untimed(run(SESSION, policy="full", chunk=chunk)) for chunk in (1000, 8192)}
    assert found[1000] == found[8192]


def test_times_are_measured_and_each_request_is_reported() -> None:
    seen: list[int] = []
    result = replay(SESSION, ReplaySettings(FLASH, ENDLESS), lambda: seen.append(1))
    assert len(seen) == len(SESSION)
    assert result.manager_seconds > 0
    assert 0 < result.match_us_p50 <= result.match_us_p99


# ---- any trace


lengths = st.one_of(st.integers(1, 1500), st.sampled_from([127, 128, 129, 256, 512, 513]))


@st.composite
def session_traces(draw: st.DrawFn) -> SessionTrace:
    """Requests that take over parts of each other, of two tenants, at any times."""
    ids = st.integers(0, 5)
    sizes = [draw(lengths) for _ in range(6)]
    out = []
    for _ in range(draw(st.integers(1, 14))):
        chosen = draw(st.lists(ids, min_size=1, max_size=6))
        parts = tuple(Part(f"p{n}", sizes[n], "user") for n in chosen)
        answer = Part(f"p{(n := draw(ids))}", sizes[n] if draw(st.booleans()) else 0)
        out.append(SessionRequest(draw(st.floats(0, 100)), "s", draw(st.sampled_from("ab")), parts, answer))
    return SessionTrace("any", out)


@settings(max_examples=60)
@given(
    session_traces(),
    st.sampled_from([policy for policy in POLICIES if policy != "belady"]),
    st.integers(9, 60),
    st.integers(1, 3),
    st.sampled_from([1, 100, 128, 1000]),
    st.sampled_from([(0, 0), (10, 0), (0, 20), (10, 1), (12, 500)]),
)
def test_any_trace_is_served_and_counted(
    trace: SessionTrace, policy: str, frames: int, in_flight: int, chunk: int, below: tuple[int, int]
) -> None:
    """However tight memory is, and whatever lies below it."""
    memory = in_flight * FLASH.slot_bytes + frames * FLASH.page_bytes
    host, disk = (count * FLASH.page_bytes for count in below)
    one = Replay(ReplaySettings(FLASH, memory, policy, host, disk, in_flight, chunk))
    result = one.run(trace)
    one.manager.check_integrity()
    assert not one.manager.holdings and not one.manager.tiers.busy
    assert result.requests == len(trace) == result.unservable + sum(result.resumes.values())
    assert result.cached_tokens + result.recomputed_tokens + result.computed_tokens == result.prompt_tokens
    assert result.peak_bytes <= memory
    served = [len(r.prompt) + len(r.output) <= frames * PAGE for r in trace]
    assert result.unservable == served.count(False)
    possible = sum(PAGE * pages for pages, _ in known_pages(trace))
    assert result.cached_tokens + result.recomputed_tokens <= possible


# ---- the parts


def test_times_rise_though_those_of_the_trace_may_not() -> None:
    one = conversation((10, 1), (10, 1), (10, 1)).requests
    trace = SessionTrace("back", [one[2], one[0], one[0], one[1]])
    times = [time for time, _ in timed(trace)]
    assert all(before < after for before, after in pairwise(times))
    assert times == pytest.approx([20, 20, 20, 20], abs=1e-3)


def test_the_future_is_what_the_trace_says() -> None:
    root = root_key(b"", "")
    every = list(timed(LITERAL))
    future = Future(every, lambda tenant: root)
    uses: dict[bytes, list[float]] = {}
    for time, request in every:
        for key in page_keys(root, request.prompt):
            uses.setdefault(key, []).append(time)
    for key, times in uses.items():
        for now in (0.0, *times):
            assert future.next_use(key, now) == min((time for time in times if time > now), default=math.inf)
    assert future.next_use(b"never", 0.0) == math.inf


def keys(names: Iterable[str]) -> list[ObjectKey]:
    return [ObjectKey("page", name.encode()) for name in names]


def test_the_simulated_disk_gives_up_what_was_used_longest_ago() -> None:
    disk = SimulatedDisk(300, lambda key: 100)
    a, b, c, d = keys("abcd")
    assert disk.put(a, ()) and disk.put(b, ()) and disk.put(c, ())
    assert disk.get(a, ())
    assert disk.put(d, ())
    assert [key in disk for key in (a, b, c, d)] == [True, False, True, True]
    assert not disk.get(b, ())
    assert disk.stats()[:3] == (300, 3, 400)
    disk.discard(a)
    disk.discard(a)
    assert disk.stats()[:3] == (200, 2, 400)


def test_the_simulated_disk_keeps_nothing_twice_and_nothing_larger_than_itself() -> None:
    disk = SimulatedDisk(250, lambda key: 300 if key.name == b"b" else 100)
    a, b = keys("ab")
    assert disk.put(a, ()) and disk.put(a, ())
    assert disk.stats()[:3] == (100, 1, 100)
    assert not disk.put(b, ())
    assert a in disk and b not in disk
