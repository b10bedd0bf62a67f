"""What one step of a scheduler takes on planned hardware: the floor, by the shares of it that engines reach.

A mixed step reads its weights once for all rows. Memory time and arithmetic time are taken by the shares that were
measured for steps bound by each (roofline.REACHED), and the longer one counts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from triptych.planner.hardware import Device
from triptych.planner.layout import Layout
from triptych.planner.models import PlannedModel
from triptych.planner.roofline import REACHED, decode_step
from triptych.words import StepPlan

_CONTEXTS = (0, 64, 128, 512, 1 << 10, 1 << 11, 1 << 13, 1 << 15, 1 << 17, 1 << 18, 1 << 19, 1 << 20)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1 << 10, 1 << 12, 1 << 14, 1 << 16)


class PlannedSteps:
    """Seconds of steps of one group of devices."""

    def __init__(self, model: PlannedModel, device: Device, layout: Layout) -> None:
        at = [decode_step(model, device, layout, 1, context) for context in _CONTEXTS]
        # a row's own work and bytes grow with its context; what does not is the batch's
        self._read = _table(_CONTEXTS, [step.cache_bytes / device.bandwidth for step in at])
        self._extra = _table(_CONTEXTS, [step.compute_seconds - at[0].compute_seconds for step in at])
        batches = [decode_step(model, device, layout, batch, 0) for batch in _BATCHES]
        self._weights = _table(_BATCHES, [step.weight_bytes / device.bandwidth for step in batches])
        self._work = _table(_BATCHES, [step.compute_seconds for step in batches])
        self._link = _table(_BATCHES, [step.link_seconds for step in batches])

    def seconds(self, plan: StepPlan) -> float:
        """What `plan` takes. Rows that only rebuild windows run in half of the layers on average."""
        rows = work = read = 0.0
        for chunk in plan.chunks:
            again = max(0, min(chunk.end, chunk.replay_to) - chunk.start)
            run = chunk.rows - again / 2
            rows += run
            work += run * self._extra((chunk.start + chunk.end) / 2)
            read += self._read(chunk.end)
        memory = (self._weights(rows) + read) / REACHED["decode"]
        compute = (self._work(rows) + work) / REACHED["prefill"]
        return max(memory, compute, self._link(rows))


def _table(points: tuple[int, ...], values: list[float]) -> Callable[[float], float]:
    """Straight lines between points, and on beyond the last one."""
    xs, ys = np.array(points, float), np.array(values)
    slope = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])

    def at(x: float) -> float:
        return float(ys[-1] + slope * (x - xs[-1])) if x > xs[-1] else float(np.interp(x, xs, ys))

    return at
