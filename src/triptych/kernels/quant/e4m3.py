"""Triton: the scales of e4m3, and its bytes without a type of eight bits, which GPUs before capability 8.9 lack."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq


@triton.jit
def scale_of(largest):
    """The power of two by which native numerics scale a group of this largest magnitude, and its inverse: float32.

    It is the smallest s with max(largest, 1e-4) <= 448 s: ref.scale_codes, of groups without NaN or Inf. Gluon kernels
    call it too. Source: reference section 2.9.
    """
    bits = tl.maximum(largest, 1e-4).to(tl.int32, bitcast=True)
    exponent = ((bits + 0x1FFFFF) >> 23) - 8  # one more where the mantissa is above that of 448
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    return scale, ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_values(codes):
    """float32 values of e4m3 bytes: sign, exponent and mantissa moved into place lack 2^120, the biases' difference.

    The two bytes that mean NaN read as 480: for weights and for keys, whose scale says where something is not finite.
    """
    b = codes.to(tl.int32)
    return (((b & 127) << 20) | ((b & 128) << 24)).to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def on_e4m3(x):
    """x, at most 448 in size, at the nearest value of e4m3, ties to the even one; NaN stays."""
    bits = x.to(tl.int32, bitcast=True)
    near = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    # below 2^-6 the grid is of equal steps, 2^-9, which is what float32 keeps of 1.5 * 2^14
    y = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, near)
    return tl.where(x == x, y, x)


@triton.jit
def e4m3_bytes(x):
    """The bytes of x, float32 and at most 448 in size, as e4m3; 127 for NaN."""
    if cuda_capability_geq(8, 9):
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        size = tl.abs(on_e4m3(x))
        small = (size * 512.0).to(tl.int32)
        code = tl.where(size < 0.015625, small, (size.to(tl.int32, bitcast=True) >> 20) - 960)
        code = tl.where(x == x, code, 127)
        return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 128)).to(tl.uint8)
