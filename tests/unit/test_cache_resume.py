"""Resume plans: which is chosen, and the arithmetic of each at every kind of boundary."""

from __future__ import annotations

import pytest

from triptych.cache.geometry import trapezoid_start
from triptych.cache.rates import Rates, TierRate
from triptych.cache.resume import Planner, ResumePlan, snapshot_is_exact, trapezoid_equivalents

EDGES = (1, 3, 4, 5, 127, 128, 129, 255, 256, 257, 511, 512)


def cheapest(length: int, chain_end: int, layers: int, snapshot: int = 0, replay: str = "trapezoid") -> ResumePlan:
    return Planner(layers, Rates(), replay).cheapest(length, chain_end, snapshot)


def counts(plan: ResumePlan) -> tuple[int, int, int]:
    return plan.cached_tokens, plan.recomputed_tokens, plan.computed_tokens


@pytest.mark.parametrize("length", EDGES)
def test_nothing_cached_is_a_cold_start(length: int) -> None:
    plan = cheapest(length, 0, 43)
    assert (plan.kind, plan.start, plan.read_from, plan.write_from) == ("cold", 0, 0, 0)
    assert counts(plan) == (0, 0, length)


@pytest.mark.parametrize("length", [n for n in EDGES if n >= 128])
@pytest.mark.parametrize("behind", [0, 1, 2])
def test_a_snapshot_starts_four_tokens_before_its_boundary(length: int, behind: int) -> None:
    end = length // 128 * 128
    c = end - 128 * behind
    if c <= 0:
        return
    plan = cheapest(length, end, 43, c)
    assert (plan.kind, plan.start, plan.write_from) == ("snapshot", c - 4, end)
    assert plan.read_from == plan.exact_from == max(0, c - 132)
    assert counts(plan) == (c - 4, end - c + 4, length - end)
    assert plan.equivalents == plan.recomputed_tokens


@pytest.mark.parametrize("layers", [1, 2, 4, 5, 43, 61, 127, 128, 129])
def test_a_trapezoid_rebuilds_the_windows_before_the_boundary(layers: int) -> None:
    boundary = 128 * 400
    plan = cheapest(boundary + 44, boundary, layers)
    reach = 132 + 127 * (layers - 1)
    assert (plan.kind, plan.start, plan.read_from) == ("trapezoid", boundary - reach, boundary - reach)
    assert plan.replay_to == plan.write_from == boundary
    assert counts(plan) == (boundary - reach, reach, 44)
    # the boundary itself can be stored, and nothing before it
    assert snapshot_is_exact(boundary, plan.exact_from)
    assert not snapshot_is_exact(boundary - 128, plan.exact_from)
    assert plan.equivalents == pytest.approx((132 + reach) / 2)


def test_flash_and_pro_trapezoids() -> None:
    assert [round(trapezoid_equivalents(1 << 20, layers)) for layers in (43, 61)] == [2799, 3942]


def test_a_chain_too_short_to_spare_anything_is_read_from_the_start() -> None:
    plan = cheapest(1000, 128, 3)
    assert (plan.kind, plan.start, plan.read_from, plan.write_from) == ("cold", 0, 0, 128)
    assert counts(plan) == (0, 128, 872)


def test_a_short_chain_still_spares_the_deep_layers() -> None:
    plan = cheapest(1000, 384, 43)
    assert (plan.kind, plan.start, plan.write_from) == ("trapezoid", 0, 384)
    assert plan.equivalents < 384


def test_the_cheapest_plan_takes_the_least_time() -> None:
    assert cheapest(10_000, 9984, 43, 1024).kind == "trapezoid"
    assert cheapest(10_000, 9984, 43, 8192).kind == "snapshot"
    assert cheapest(10_000, 9984, 2, 9984 - 512).kind == "trapezoid"
    assert cheapest(10_000, 9984, 2, 9984 - 128).kind == "snapshot"


def test_a_bounded_replay_runs_one_window_and_says_what_it_is() -> None:
    plan = cheapest(10_000, 9984, 43, replay="bounded")
    assert (plan.kind, plan.start, plan.read_from) == ("bounded", 9984 - 132, 9984 - 132)
    assert not plan.replay_to


def test_a_prompt_that_is_cached_whole_still_runs_its_last_token() -> None:
    assert counts(cheapest(512, 512, 43, 512)) == (508, 4, 0)
    plan = cheapest(12_800, 12_800, 43)
    assert plan.kind == "trapezoid" and plan.computed_tokens == 0
    assert trapezoid_start(12_800, 43, 42) < 12_800


def test_a_cold_run_may_snapshot_everywhere() -> None:
    plan = cheapest(512, 0, 43)
    assert all(snapshot_is_exact(boundary, plan.exact_from) for boundary in (128, 256, 512))


def test_rates_follow_what_is_measured() -> None:
    rates = Rates(token=1e-3, context=0.0, tiers={"disk": TierRate(1e-3, 1e9)})
    for _ in range(200):
        rates.observe_prefill(0, 1000, 0.25)
        rates.tiers["disk"].observe(100 << 20, 1e-3 + (100 << 20) / 3e9)
    assert rates.prefill_seconds(0, 1000) == pytest.approx(0.25, rel=0.05)
    assert rates.fetch_seconds("disk", 300 << 20) == pytest.approx(1e-3 + (300 << 20) / 3e9, rel=0.05)


def test_context_makes_tokens_dearer() -> None:
    rates = Rates()
    assert rates.prefill_seconds(100_000, 101_000) > 1.5 * rates.prefill_seconds(0, 1000)
