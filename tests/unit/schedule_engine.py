"""A scheduler and a cache manager whose model always says 7."""

from __future__ import annotations

import numpy as np

from triptych.cache import CacheCapacity, CacheGeometry, CacheManager
from triptych.cache.places import snapshot_policy_named
from triptych.cache.policies import Policies
from triptych.config import EngineConfig
from triptych.schedule import Scheduler
from triptych.words import FinishReason, Request, SampledToken, SamplingParams, StepPlan, StepResult, TokenIds, Usage

GEOMETRY = CacheGeometry(2, (0,), (1,), 8, 4, 4, "float32", "float32")


def text(length: int, seed: int = 0) -> TokenIds:
    return np.random.default_rng(seed).integers(0, 100, length).astype(np.int32)


class Engine:
    """A scheduler whose model always says 7."""

    def __init__(
        self,
        pages: int = 32,
        running: int = 4,
        budget: int = 256,
        context: int = 10**6,
        policy: str = "adaptive",
        depth: int = 0,
        **more: int,
    ) -> None:
        policies = Policies(snapshot_policy_named(policy))
        self.cache = CacheManager(GEOMETRY, CacheCapacity(pages, running), 2, policies=policies)
        config = EngineConfig(max_running=running, step_tokens=budget, **more)
        self.scheduler = Scheduler(self.cache, config, context, depth)

    def add(self, name: str, tokens: TokenIds, max_tokens: int | None = 4, **more: str) -> None:
        self.scheduler.add(Request(name, tokens, SamplingParams(max_tokens=max_tokens), **more))

    def plan(self) -> StepPlan:
        plan = self.scheduler.plan()
        self.cache.check_integrity()
        assert plan is not None
        return plan

    def apply(self, plan: StepPlan, failed: dict[str, str] | None = None) -> list[str]:
        failed = failed or {}
        names = [c.request_id for c in plan.chunks if c.samples and c.request_id not in failed]
        tokens = tuple(SampledToken(name, 7) for name in names)
        kept = self.scheduler.apply(plan, StepResult(plan.step, tokens, failed))
        self.cache.check_integrity()
        return [token.request_id for token in kept]

    def step(self) -> dict[str, tuple[int, int]]:
        """One step: the rows of each request. Whoever reached its limit is ended."""
        plan = self.plan()
        for name in self.apply(plan):
            if self.scheduler.usage(name).completion_tokens == self.scheduler.max_new_tokens(name):
                self.finish(name, FinishReason.LENGTH)
        return {c.request_id: (c.start, c.end) for c in plan.chunks}

    def finish(self, name: str, reason: FinishReason = FinishReason.STOP) -> Usage:
        usage = self.scheduler.finish(name, reason)
        self.cache.check_integrity()
        assert usage is not None
        return usage

    def drain(self) -> list[dict[str, tuple[int, int]]]:
        steps = []
        while self.scheduler.busy:
            steps.append(self.step())
        return steps
