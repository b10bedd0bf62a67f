"""Triton's interpreter cuts bf16 off and half-rounds FP8; with this it converts as the hardware does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {
    tl.float32: (torch.float32, np.float32),
    tl.bfloat16: (torch.bfloat16, np.uint16),
    tl.float16: (torch.float16, np.float16),
    tl.float8e4nv: (torch.float8_e4m3fn, np.uint8),
}


def round_as_hardware() -> None:
    """Replace the interpreter's conversions between floating-point types by torch's."""
    interpreter._convert_float = _convert


def _convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    (given, _), (wanted, kept) = _TORCH[source], _TORCH[target]
    raw = torch.from_numpy(np.ascontiguousarray(data).view(np.uint8).copy())
    x = raw.view(given).float()
    if wanted == torch.float8_e4m3fn:
        x = x.clamp(-448, 448)  # the hardware's conversion saturates
    out = x.to(wanted).view(torch.uint8).numpy().view(kept)
    return out.reshape(np.shape(data))
