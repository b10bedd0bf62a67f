"""Triton's interpreter cuts bf16 off, half-rounds FP8 and multiplies bf16 numbers' bits; with this it does neither."""

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
    """Replace the interpreter's conversions of floating-point types by torch's, and products of bf16 by float32's."""
    interpreter._convert_float = _convert
    interpreter.InterpreterBuilder.create_dot = _dot


_BITS_DOT = interpreter.InterpreterBuilder.create_dot


def _dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _BITS_DOT(builder, _widened(a), _widened(b), *rest)


def _widened(x: Any) -> Any:
    """A handle's bf16 numbers, of which it keeps the bits, as float32."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    return interpreter.TensorHandle(_convert(x.data, tl.bfloat16, tl.float32, None), tl.float32)


def _convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    (given, _), (wanted, kept) = _TORCH[source], _TORCH[target]
    raw = torch.from_numpy(np.ascontiguousarray(data).view(np.uint8).copy())
    x = raw.view(given).float()
    if wanted == torch.float8_e4m3fn:
        x = x.clamp(-448, 448)  # the hardware's conversion saturates
    out = x.to(wanted).view(torch.uint8).numpy().view(kept)
    return out.reshape(np.shape(data))
