"""What prefill is expected to cost until it was measured: the planner's figure for this model on this device."""

from __future__ import annotations

import torch

from triptych.cache.rates import Rates
from triptych.config import EngineConfig, ModelShape
from triptych.engine.device import kind_of
from triptych.planner.hardware import catalogue
from triptych.planner.models import of_shape
from triptych.planner.rates import context_share, prefill_rates


def starting_rates(shape: ModelShape, config: EngineConfig, device: torch.device) -> Rates:
    """Rates of a device that the catalogue knows. Of another the default per token, with the model's share of context.

    Measurements move both terms by one factor, so that the share, which is the model's, has to be right from the start.
    """
    model = of_shape("", shape, config.cache.kv_format, None, config.weight_dtype)
    known = catalogue().reported_as(torch.cuda.get_device_name(device)) if kind_of(device) == "cuda" else None
    if known is not None:
        token, context = prefill_rates(model, known)
        return Rates(token, context)
    token = Rates().token
    return Rates(token, token * context_share(model))
