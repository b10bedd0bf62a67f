"""How long prefill takes per token, for whoever must choose before anything was measured."""

from __future__ import annotations

from triptych.planner.hardware import Device
from triptych.planner.layout import layout_for
from triptych.planner.models import PlannedModel
from triptych.planner.roofline import REACHED, prefill_step

_NEAR, _FAR, _ROWS = 0, 262_144, 1024


def prefill_rates(model: PlannedModel, device: Device) -> tuple[float, float]:
    """(t, c): a token behind p others takes about t + c * p seconds on one device, at the share of its rate reached."""
    layout = layout_for(model, 1)
    near, far = (
        prefill_step(model, device, layout, at, at + _ROWS).compute_seconds / _ROWS / REACHED["prefill"]
        for at in (_NEAR, _FAR)
    )
    slope = max(0.0, far - near) / (_FAR - _NEAR)
    return near - slope * (_NEAR + _ROWS / 2), slope


def context_share(model: PlannedModel) -> float:
    """c / t of `prefill_rates` on a device that has one rate for everything: a property of the model alone."""
    one = Device("one", "one rate", 1.0, 1.0, {"fp32": 1.0}, 1.0, 1.0, None, None, "")
    token, context = prefill_rates(model, one)
    return context / token
