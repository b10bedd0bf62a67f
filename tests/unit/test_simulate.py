"""The replay with a clock, the fit that searches with it, and what is said of two contenders."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from triptych.cache.geometry import CacheGeometry, plan_capacity
from triptych.cache.rates import Rates
from triptych.cli.main import main
from triptych.config import EngineConfig, ModelShape
from triptych.errors import ConfigError
from triptych.planner import catalogue, model_named
from triptych.planner.layout import layout_for
from triptych.planner.models import TINY_CONFIG
from triptych.planner.roofline import REACHED, decode_step
from triptych.planner.steps import PlannedSteps
from triptych.words import Chunk, StepPlan
from triptych.workload.clients import Counts
from triptych.workload.fit import Traffic, fit
from triptych.workload.load import Timing, scaled
from triptych.workload.load_report import Slo
from triptych.workload.named import retimed, workload
from triptych.workload.objectives import objective_for, objective_named
from triptych.workload.sessions import Part, SessionRequest
from triptych.workload.simulate import MachineCosts, Simulation, StepCosts, World, amounts, fitted
from triptych.workload.verdicts import gain, geometric, objective_lines

GEOMETRY = CacheGeometry.of(ModelShape.from_file(TINY_CONFIG))
COSTS = StepCosts(step=0.01, decode=0.001, prompts=0.02, prompt=0.0, prefill=0.0005, context=0.02)


def world(memory: int = 64 << 20, costs: StepCosts = COSTS) -> World:
    return World(GEOMETRY, memory, costs.seconds, costs.rates())


def requests(name: str, count: int, scale: float, users: int, seed: int = 0) -> list[SessionRequest]:
    return scaled(retimed(workload(name, count, seed).requests, f"closed:{users}", seed), scale)


def run(config: EngineConfig, users: int = 4, name: str = "chat") -> list[Timing]:
    return Simulation(world(), config, users, 1e6).run(requests(name, 24, 0.05, users)).timings


def chunk(start: int, end: int, samples: bool = False, replay_to: int = 0) -> Chunk:
    tokens, pages = np.zeros(end - start, np.int32), np.zeros(-(-end // 128), np.int32)
    return Chunk("r", 0, start, end, tokens, pages, 0, samples=samples, replay_to=replay_to)


def test_every_request_is_answered_at_its_length_and_time_adds_up() -> None:
    asked = requests("coding-agent", 30, 0.02, 3)
    found = Simulation(world(), EngineConfig(max_running=4, step_tokens=256), 3, 1e6).run(asked)
    assert len(found.timings) == 30 and not any(one.error for one in found.timings)
    wanted = sorted((one.session, one.output.tokens) for one in asked)
    assert sorted((one.session, one.counts.output) for one in found.timings) == wanted
    for one in found.timings:
        counts = one.counts
        assert one.intended <= one.arrivals[0][0] <= one.arrivals[-1][0] == one.end
        assert len(one.arrivals) == counts.output and counts.cached + counts.recomputed <= counts.prompt
    assert sum(one.counts.cached for one in found.timings) > 0, "sessions find what they left"
    least = sum(one.counts.prompt - one.counts.cached - one.counts.recomputed for one in found.timings) * COSTS.prefill
    assert max(one.end for one in found.timings) > least


def test_agents_run_no_more_at_once_than_one_after_the_other() -> None:
    """What they share is new to all of them; whoever comes while one runs it waits for that one."""
    asked = requests("coding-agent", 40, 0.03, 12)
    ran = []
    for running in (1, 4, 12):
        found = Simulation(world(256 << 20), EngineConfig(max_running=running, step_tokens=1024), 12, 1e6).run(asked)
        ran.append(sum(one.counts.prompt - one.counts.cached for one in found.timings))
    assert ran[0] == ran[1] == ran[2]


def test_a_smaller_budget_waits_longer_for_first_tokens_and_shorter_between_them() -> None:
    small = run(EngineConfig(max_running=8, step_tokens=64))
    large = run(EngineConfig(max_running=8, step_tokens=1024))
    assert np.mean([one.first for one in small]) > 1.2 * np.mean([one.first for one in large])
    stalls = [max(b - a for (a, _), (b, _) in zip(one.arrivals, one.arrivals[1:], strict=False)) for one in large]
    calm = [max(b - a for (a, _), (b, _) in zip(one.arrivals, one.arrivals[1:], strict=False)) for one in small]
    assert max(calm) < 0.5 * max(stalls)


def test_a_closed_loop_and_an_open_one_keep_their_times() -> None:
    asked = [
        SessionRequest(3.0, "a", "", workload("chat", 1).requests[0].prompt, workload("chat", 1).requests[0].output)
    ]
    [open_loop] = Simulation(world(), EngineConfig(step_tokens=512), 0, 2.0).run(scaled(asked, 0.05)).timings
    assert open_loop.intended == pytest.approx(1.5) and open_loop.first > 0
    many = run(EngineConfig(max_running=16, step_tokens=512), users=2)
    ends = sorted(one.end for one in many)
    assert sum(one.intended < ends[0] for one in many) <= 2, "only so many sessions run at once"


def test_what_does_not_fit_fails_as_it_would_in_the_engine() -> None:
    asked = requests("research-agent", 6, 1.0, 2)
    found = Simulation(world(4 << 20), EngineConfig(max_running=4, step_tokens=512), 2, 1e6).run(asked)
    assert any("needs room" in str(one.error) for one in found.timings)


def test_an_answer_ends_where_the_cache_does() -> None:
    """A prompt that leaves less room than its answer wants gets a shorter one, as in the engine, and not for ever."""
    config = EngineConfig(max_running=2, step_tokens=256)
    tokens = plan_capacity(GEOMETRY, 4 << 20, config.max_running).tokens
    asked = [SessionRequest(0.0, "one", "", (Part("text", tokens - 5),), Part("answer", 50))]
    (timing,) = Simulation(world(4 << 20), config, 1, 1e6).run(asked).timings
    assert not timing.error and timing.counts.output == 5


def test_costs_are_found_again_in_the_times_they_made() -> None:
    rng = np.random.default_rng(3)
    plans = []
    for number in range(120):
        chunks = [chunk(at, at + 1, samples=True) for at in rng.integers(1, 3000, rng.integers(0, 9)).tolist()]
        chunks += [
            chunk(at, at + int(rng.integers(2, 400))) for at in rng.integers(0, 4000, rng.integers(0, 4)).tolist()
        ]
        if chunks:
            plans.append(StepPlan(number, tuple(chunks)))
    found = fitted([(amounts(plan), COSTS.seconds(plan)) for plan in plans])
    assert found.weights == pytest.approx(COSTS.weights, rel=1e-3, abs=1e-6)
    noisy = fitted([(amounts(plan), COSTS.seconds(plan) * float(rng.uniform(0.8, 1.2))) for plan in plans])
    assert min(noisy.weights) >= 0.0
    for plan in plans:
        assert noisy.seconds(plan) == pytest.approx(COSTS.seconds(plan), rel=0.35)


def test_rows_that_rebuild_windows_count_half() -> None:
    whole, again = (StepPlan(1, (chunk(0, 256, replay_to=upto),)) for upto in (0, 256))
    assert amounts(whole)[4] == 256 and amounts(again)[4] == 128


def test_planned_steps_are_the_planners_floors_by_the_share_that_is_reached() -> None:
    model = model_named("flash")
    node = catalogue().node("hgx-h200")
    layout = layout_for(model, node.count)
    steps = PlannedSteps(model, node.device, layout)
    plan = StepPlan(1, tuple(chunk(32_767, 32_768, samples=True) for _ in range(16)))
    floor = decode_step(model, node.device, layout, 16, 32_768)
    assert steps.seconds(plan) == pytest.approx(floor.memory_seconds / REACHED["decode"], rel=0.02)
    big, small = (steps.seconds(StepPlan(1, (chunk(0, rows),))) for rows in (16_384, 8_192))
    assert big == pytest.approx(2 * small, rel=0.2), "prefill is bound by arithmetic"


def test_a_fit_marks_its_front_and_prefers_a_shipped_profile_that_is_as_good() -> None:
    seen = [requests("rl-rollout", 48, 0.003, 48)]
    traffic = Traffic(seen, 0, 1.0, objective_for("rl-rollout"), Slo(), hourly=3.6)
    told: list[str] = []
    shipped = {"few": {"max_running": 2, "step_tokens": 512}, "many": {"max_running": 64, "step_tokens": 2048}}
    found = fit(traffic, lambda config: world(96 << 20), shipped, {}, told.append)
    assert found.profile.name == "many" and found.recommended.name == "many"
    by_name = {one.name: one for one in found.outcomes}
    assert set(told) >= {"few", "many", "run 1, step 128"} and len(told) == len(set(told))
    many, few = by_name["many"].figures, by_name["few"].figures
    assert many["objective"] > few["objective"] and many["usd_per_session"] < few["usd_per_session"]
    assert many["peak_bytes"] > few["peak_bytes"]
    front = [one for one in found.outcomes if one.front]
    assert front and not any(
        other.figures["ttft_p95_s"] < one.figures["ttft_p95_s"]
        and other.figures["requests_per_s"] > one.figures["requests_per_s"]
        and other.figures["peak_bytes"] < one.figures["peak_bytes"]
        for one in front
        for other in found.outcomes
        if not other.refused
    )


def test_a_fit_refuses_what_cannot_start_and_says_so_when_nothing_can() -> None:
    traffic = Traffic([requests("chat", 4, 0.05, 2)], 2, 1e6, objective_for("chat"), Slo())
    found = fit(traffic, lambda config: world(8 << 20), {"large": {"max_running": 32}}, {})
    [large] = [one for one in found.outcomes if one.name == "large"]
    assert "cannot hold 32 window slots" in large.refused and "figures" not in large.to_dict()
    with pytest.raises(ConfigError, match="No settings can run this traffic"):
        fit(traffic, lambda config: world(1 << 20), {"large": {"max_running": 32}}, {})


def test_a_mode_that_was_not_measured_is_no_candidate() -> None:
    traffic = Traffic([requests("chat", 4, 0.05, 2)], 2, 1e6, objective_for("chat"), Slo())
    slow = StepCosts(*(10 * weight for weight in COSTS.weights))
    profiles = {"same bits": {"deterministic": True}, "usual": {}}
    found = {}
    for costs in (MachineCosts(COSTS), MachineCosts(COSTS, slow)):
        outcomes = fit(traffic, lambda config, m=costs: m.world(config, GEOMETRY, 64 << 20), profiles, {}).outcomes
        found[costs] = {one.name: one for one in outcomes}
    unknown, known = found.values()
    assert "not measured" in unknown["same bits"].refused
    assert known["same bits"].figures["objective"] > 5 * known["usual"].figures["objective"]


def timing(session: str, first: float, total: float, output: int = 11, prompt: int = 100) -> Timing:
    arrivals = [(first, 1), (total, output - 1)]
    return Timing(session, 0.0, 0.0, arrivals, total, Counts(prompt, 0, 0, output))


def test_objectives_are_what_they_say() -> None:
    slo = Slo(ttft=2.0, tpot=0.1)
    slow_start, slow_words = timing("a", 4.0, 4.5), timing("b", 1.0, 6.0, prompt=300)
    assert objective_for("chat").of([slow_start], slo) == pytest.approx(2.0)
    assert objective_for("chat").of([slow_words], slo) == pytest.approx(5.0)
    assert objective_for("coding-agent").of([slow_start, timing("a", 1.0, 2.0), slow_words], slo) == pytest.approx(6.25)
    assert objective_for("research-agent").of([slow_start, slow_words], slo) == pytest.approx(6.0)
    assert objective_for("rl-rollout").of([slow_start, slow_words], slo) == pytest.approx(2 / 6.0)
    assert objective_for("mixed").of([slow_start, slow_words], slo) == pytest.approx(5.25)
    failed = Timing("c", 0.0, error="no")
    assert objective_for("chat").of([slow_start, failed], slo) == math.inf
    assert objective_for("rl-rollout").of([slow_start, failed], slo) == 0.0
    assert objective_for("some/trace.jsonl").key == objective_named("mixed").key
    with pytest.raises(ConfigError, match="no objective 'chta'. Did you mean 'chat'".replace(".", r"\.")):
        objective_named("chta")


def test_gains_are_paired_by_round_and_know_when_they_do_not_know() -> None:
    lower, higher = objective_for("chat"), objective_for("rl-rollout")
    drift = np.array([1.0, 2.0, 4.0, 3.0])  # the machine slows down and recovers
    sure = gain(lower, drift.tolist(), (1.2 * drift * [1.0, 1.01, 0.99, 1.0]).tolist())
    assert sure.ratio == pytest.approx(1.2, rel=0.01) and sure.verdict == "better" and sure.low > 1.15
    assert gain(lower, (1.2 * drift).tolist(), (drift * [1, 1.01, 0.99, 1]).tolist()).verdict == "worse"
    assert gain(higher, drift.tolist(), (1.2 * drift * [1, 1.01, 0.99, 1]).tolist()).verdict == "worse"
    unsure = gain(lower, [1.0, 2.0, 4.0], [1.3, 1.5, 4.4])
    assert unsure.verdict == "equal" and unsure.low < 1 < unsure.high
    once = gain(lower, [1.0], [2.0])
    assert once.verdict == "equal" and once.to_dict()["gain_95"] is None
    assert gain(lower, [1.0, 2.0], [math.inf, 2.0]).verdict == "better"
    assert gain(higher, [0.0, 2.0], [1.0, 2.0]).verdict == "worse"
    assert geometric([1.0, 4.0]) == pytest.approx(2.0) and geometric([1.0, math.inf]) == math.inf
    told = objective_lines(lower, {"mine": [1.0, 2.0], "theirs": [math.inf, 2.0]}, "mine")
    assert "theirs" in told and "requests failed in 1 of 2 rounds" in told and "inf" not in told


def test_the_command_recommends_without_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = tmp_path / "steps.json"
    names = ("step", "decode", "prompts", "prompt", "prefill", "context")
    steps.write_text(json.dumps({"seconds": dict(zip(names, COSTS.weights, strict=True))}))
    small = ("--requests", "6", "--scale", "0.02", "--arrivals", "closed:3", "--speed", "1e6")
    where = ("--model", "tiny", "--steps", str(steps), "--memory", "64MiB")
    assert main(["profile", "fit", "chat", *small, *where, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["objective"] == "slo_stretch_p95" and found["profile"]["shipped"]
    assert any(one["front"] for one in found["candidates"])
    assert main(["profile", "fit", "chat", *small, *where, "--set", "max_running=2"]) == 0
    text = capsys.readouterr().out
    assert "Recommended: " in text and "Pareto front" in text
    assert main(["profile", "fit", "chat", *small, "--model", "tiny", "--steps", str(steps)]) == 2
    assert "Add --memory" in capsys.readouterr().err


def test_starting_rates_of_a_world_are_usable() -> None:
    rates: Rates = COSTS.rates()
    assert rates.prefill_seconds(0, 1000) == pytest.approx(0.5, rel=0.1)
