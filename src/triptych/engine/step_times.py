"""How long steps take, by what was in them: for those who simulate this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from triptych.words import StepPlan

if TYPE_CHECKING:
    from triptych.engine.loop import EngineLoop, TokenEvent


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step: its plan, and the seconds that planning, running and landing it took."""

    plan: StepPlan
    seconds: float


@contextmanager
def timed_steps(loop: EngineLoop, clock: Callable[[], float] = time.perf_counter) -> Iterator[list[StepTime]]:
    """The steps that `loop` runs while this is open. With a clock of processor time other processes do not count."""
    found: list[StepTime] = []
    plans: list[StepPlan | None] = []
    plan, step = loop.scheduler.plan, loop.step

    def planned() -> StepPlan | None:
        plans.append(plan())
        return plans[-1]

    def stepped() -> list[TokenEvent]:
        plans.clear()
        began = clock()
        events = step()
        seconds = clock() - began
        found.extend(StepTime(one, seconds) for one in plans if one is not None)
        return events

    vars(loop.scheduler)["plan"], vars(loop)["step"] = planned, stepped
    try:
        yield found
    finally:
        del vars(loop.scheduler)["plan"], vars(loop)["step"]
