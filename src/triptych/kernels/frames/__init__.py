"""Frames that come up from the host's memory: `bringer` chooses who brings them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from triptych.kernels.frames import ref

BringUp = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def bringer(memory: Tensor, device: torch.device) -> BringUp:
    """`ref.bring_up`, or the kernel that does the same from `memory` to `device`: it reads only what is pinned."""
    if device.type != "cuda" or not memory.is_pinned() or importlib.util.find_spec("triton") is None:
        return ref.bring_up
    from triptych.kernels.frames.triton import bring_up

    return bring_up
