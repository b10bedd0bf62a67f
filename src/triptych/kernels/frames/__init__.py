"""Frames that come up from the host's memory: `bringer` chooses who brings them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from triptych.kernels.frames import ref

BringUp = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def bringer(memory: Tensor, device: torch.device) -> BringUp:
    """Who brings frames from `memory` to `device`: the copy engines if the driver can be asked for many copies at once,
    else a kernel that reads the host's memory; `ref.bring_up` where neither can, since both take pinned memory."""
    if device.type != "cuda" or not memory.is_pinned() or importlib.util.find_spec("triton") is None:
        return ref.bring_up
    from triptych.kernels.frames import engines, triton

    return engines.bring_up if engines.works(device) else triton.bring_up
