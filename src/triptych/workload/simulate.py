"""A replay with a clock: the scheduler and the cache manager that serve, on a model whose steps only take time.

    due --> queue --> plan a step --> the clock moves by what the step costs --> tokens arrive, requests end --> ...

`workload.replay` asks what would be found in the cache; this also asks how long everybody waits, so it needs a cost of
steps: the planner's, or one that was measured (`StepCosts`). Outputs are those of the trace. What it leaves out: work
of the host beside the steps that a cost does not hold, and copies between tiers, which take no time.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from triptych.cache.geometry import CacheGeometry, plan_capacity
from triptych.cache.manager import CacheManager
from triptych.cache.places import snapshot_policy_named
from triptych.cache.policies import Policies
from triptych.cache.rates import Rates
from triptych.cache.retention import retention_named
from triptych.config import EngineConfig
from triptych.errors import ConfigError, TriptychError
from triptych.schedule.scheduler import Scheduler
from triptych.words import (
    CacheHints,
    FinishReason,
    Request,
    SampledToken,
    SamplingParams,
    StepPlan,
    StepResult,
    TokenIds,
)
from triptych.workload.clients import Counts
from triptych.workload.load import Timing
from triptych.workload.sessions import SessionRequest

StepSeconds = Callable[[StepPlan], float]


@dataclass(frozen=True, slots=True)
class World:
    """What does not depend on settings: sizes of cached objects, what steps cost, how fast prefill is thought to be."""

    geometry: CacheGeometry
    memory: int
    seconds: StepSeconds
    rates: Rates
    max_position: int = 1 << 20


@dataclass(slots=True)
class Simulated:
    """What came out: timings as the load driver has them, steps and preemptions, peak bytes of the caches."""

    timings: list[Timing]
    steps: int = 0
    preemptions: int = 0
    peak_bytes: int = 0


@dataclass(slots=True)
class _Live:
    timing: Timing
    output: TokenIds
    session: str
    got: int = 0


@dataclass(order=True, slots=True)
class _Due:
    time: float
    serial: int
    session: str = field(compare=False)


class Simulation:
    """One run of one list of requests through one scheduler. ConfigError if the memory is too small."""

    def __init__(self, world: World, config: EngineConfig, closed: int = 0, speed: float = 1.0) -> None:
        capacity = plan_capacity(world.geometry, world.memory, config.max_running)
        cache = config.cache
        policies = Policies(
            snapshot_policy_named(cache.policy),
            retention_named(cache.retention),
            Rates(world.rates.token, world.rates.context),
            ttl=cache.ttl,
        )
        self._now = 0.0
        self.cache = CacheManager(
            world.geometry, capacity, world.geometry.layers, policies=policies, clock=lambda: self._now
        )
        self.scheduler = Scheduler(self.cache, config, world.max_position)
        self._seconds = world.seconds
        self._closed, self._speed = closed, speed
        self._live: dict[str, _Live] = {}
        self._due: list[_Due] = []
        self._idle_sessions: list[str] = []
        self._left: dict[str, list[SessionRequest]] = {}
        self._before: dict[str, float] = {}
        self._serial = 0
        self._done: list[Timing] = []

    def run(self, requests: Sequence[SessionRequest], on_done: Callable[[], None] = lambda: None) -> Simulated:
        """Go through all requests; `on_done` is called as each ends."""
        for request in requests:
            self._left.setdefault(f"{request.tenant}/{request.session}", []).append(request)
        self._idle_sessions = list(reversed(self._left))
        for _ in range(min(self._closed or len(self._left), len(self._left))):
            self._open(self._idle_sessions.pop())
        while self._due or self._live:
            while self._due and self._due[0].time <= self._now:
                self._send(heapq.heappop(self._due), on_done)
            plan = self.scheduler.plan()
            if plan is None:
                self.scheduler.take_saves()
                if self._due:
                    self._now = max(self._now, self._due[0].time)
                continue
            self._now += self._seconds(plan)
            self._apply(plan, on_done)
        stats = self.cache.stats()
        found = self.scheduler.stats()
        timings = sorted(self._done, key=lambda timing: timing.intended)
        return Simulated(timings, found.steps, found.preemptions, stats.peak_bytes)

    def _open(self, session: str) -> None:
        first = self._left[session][0]
        self._before[session] = first.time
        self._queue(session, self._now if self._closed else first.time / self._speed)

    def _queue(self, session: str, time: float) -> None:
        self._serial += 1
        heapq.heappush(self._due, _Due(time, self._serial, session))

    def _send(self, due: _Due, on_done: Callable[[], None]) -> None:
        request = self._left[due.session].pop(0)
        trace = request.to_trace()
        self._serial += 1
        name = str(self._serial)
        output = trace.output if len(trace.output) else np.zeros(1, np.int32)
        timing = Timing(request.session, due.time, sent=self._now)
        params = SamplingParams(max_tokens=len(output), temperature=0.0, ignore_eos=True)
        hints = CacheHints(marks=trace.marks, session=request.session)
        self._live[name] = _Live(timing, output, due.session)
        self._before[due.session] = request.time
        try:
            self.scheduler.add(Request(name, trace.prompt, params, salt=request.tenant, hints=hints))
        except TriptychError as error:
            timing.error = str(error)
            self._left[due.session].clear()  # as a client would: the rest hangs on an answer that never comes
            self._ended(name, on_done)

    def _apply(self, plan: StepPlan, on_done: Callable[[], None]) -> None:
        tokens = []
        for chunk in plan.chunks:
            if chunk.samples:
                live = self._live[chunk.request_id]
                tokens.append(SampledToken(chunk.request_id, int(live.output[live.got])))
        for token in self.scheduler.apply(plan, StepResult(plan.step, tuple(tokens))):
            live = self._live[token.request_id]
            live.got += 1
            live.timing.arrivals.append((self._now, 1))
            # as in the engine: the context, or a cache that is smaller than it, ends an answer too
            if live.got >= min(len(live.output), self.scheduler.max_new_tokens(token.request_id)):
                usage = self.scheduler.finish(token.request_id, FinishReason.LENGTH)
                assert usage is not None
                live.timing.counts = Counts(
                    usage.prompt_tokens, usage.cached_tokens, usage.recomputed_tokens, usage.completion_tokens
                )
                self._ended(token.request_id, on_done)

    def _ended(self, name: str, on_done: Callable[[], None]) -> None:
        live = self._live.pop(name)
        live.timing.end = self._now
        self._done.append(live.timing)
        on_done()
        left = self._left[live.session]
        if left:
            pause = (left[0].time - self._before[live.session]) / self._speed
            planned = self._now + pause if self._closed else left[0].time / self._speed
            self._queue(live.session, max(planned, self._now))
        elif self._idle_sessions:
            self._open(self._idle_sessions.pop())


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Measured cost of a step in seconds: so much for a step, a decoded row, a step with prompts in it, each prompt in
    it, a prompt's row, and for a thousand rows times the thousands of tokens before them.
    """

    step: float
    decode: float
    prompts: float
    prompt: float
    prefill: float
    context: float

    def seconds(self, plan: StepPlan) -> float:
        """What `plan` takes."""
        return math.fsum(weight * amount for weight, amount in zip(self.weights, amounts(plan), strict=True))

    @property
    def weights(self) -> tuple[float, ...]:
        """In the order of `amounts`."""
        return self.step, self.decode, self.prompts, self.prompt, self.prefill, self.context

    def rates(self) -> Rates:
        """How fast prefill is thought to be at the start."""
        return Rates(self.prefill, max(self.context * 1e-6, 1e-12))


@dataclass(frozen=True, slots=True)
class MachineCosts:
    """Costs of a machine's steps, and those of its deterministic mode if it has one that was measured."""

    usual: StepCosts
    deterministic: StepCosts | None = None

    def world(self, config: EngineConfig, geometry: CacheGeometry, memory: int, max_position: int = 1 << 20) -> World:
        """Where `config` runs on this machine. ConfigError if its mode was not measured."""
        costs = self.deterministic if config.deterministic else self.usual
        if costs is None:
            raise ConfigError("Steps of the deterministic mode were not measured.", "Run `triptych profile measure`.")
        return World(geometry, memory, costs.seconds, costs.rates(), max_position)


def amounts(plan: StepPlan) -> tuple[float, ...]:
    """A step consists of: 1, decoded rows, 1 if there are prompts, prompts, their rows, 1e-6 x rows x tokens before.

    Rows that only rebuild windows run in half of the layers on average.
    """
    decode = prompts = prefill = context = 0.0
    for chunk in plan.chunks:
        if chunk.rows == 1 and chunk.samples:
            decode += 1
        else:
            again = max(0, min(chunk.end, chunk.replay_to) - chunk.start)
            prefill += chunk.rows - again / 2
            prompts += 1
        context += chunk.rows * (chunk.start + chunk.end) / 2
    return 1.0, decode, float(prompts > 0), prompts, prefill, context * 1e-6


def fitted(steps: Sequence[tuple[tuple[float, ...], float]]) -> StepCosts:
    """Least squares through (amounts, seconds), with no weight below zero; a step that took long weighs no more."""
    rows = np.array([amount for amount, _ in steps])
    seconds = np.array([max(one, 1e-9) for _, one in steps])
    scaled, left = rows / seconds[:, None], list(range(rows.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(scaled[:, left], np.ones(len(seconds)), rcond=None)
        worst = int(np.argmin(found))
        if found[worst] >= 0:
            break
        del left[worst]
    weights = dict(zip(left, found.tolist(), strict=True))
    return StepCosts(*(weights.get(index, 0.0) for index in range(rows.shape[1])))
