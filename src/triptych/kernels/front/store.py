"""Triton: rounding a vector to FP8 or FP4 and writing it as a row of a cache, dense or packed.

Bit for bit what kernels/quant/ref.py and formats.py do: scales come from the exponent bits of the maximum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triptych.kernels.quant.e4m3 import e4m3_bytes, e4m3_values
from triptych.kernels.quant.triton_rows import e8m0_of

DENSE, ENTRY, FP8, MXFP4 = 0, 1, 2, 3
"""How rows lie in a cache, as kernels are told: numbers, or one of the kinds of kernels/quant/formats.py."""


@triton.jit
def power_of_two(code):
    """2^(code - 127) in float32, NaN for 255; 0 < code."""
    return tl.where(code == 255, float("nan"), (code << 23).to(tl.float32, bitcast=True))


@triton.jit
def to_fp8(x, FLOOR: tl.constexpr):
    """x [groups, size] -> e4m3 bytes and the code of each group's scale."""
    code = e8m0_of(tl.maximum(tl.max(tl.abs(x), 1), FLOOR), 0x600000, 8)
    inverse = power_of_two(254 - code)
    inverse = tl.where(code == 255, float("nan"), inverse)
    return e4m3_bytes(x * inverse[:, None]), code


@triton.jit
def round_fp4(x):
    """x [groups, size] on the grid of e2m1 before its scale, and the code of each group's scale."""
    code = e8m0_of(tl.maximum(tl.max(tl.abs(x), 1), 7.052966104933725e-38), 0x400000, 2)  # 6 * 2^-126
    x = x * tl.where(code == 255, float("nan"), power_of_two(254 - code))[:, None]
    size = tl.abs(x)
    step = tl.where(size < 2.0, 0.5, tl.where(size < 4.0, 1.0, 2.0))
    size = (size / step + 12582912.0 - 12582912.0) * step  # adding 1.5 * 2^23 leaves no fraction: to the nearest even
    sign = x.to(tl.int32, bitcast=True) & -2147483648  # minus is 0 - x in Triton, which makes +0 of 0
    return (size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True), code


@triton.jit
def _bf16(x):
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def put_entry(x, d, dim, rope, values_ptr, scales_ptr, KIND: tl.constexpr, NATIVE: tl.constexpr, DIM: tl.constexpr):
    """Write a window row or entry x [DIM] to a cache row: leading dims in FP8 where numerics or cache ask for it."""
    nope = dim - rope
    if NATIVE:
        x = _bf16(x)
    if NATIVE or KIND == 1:
        groups = tl.reshape(tl.where(d < nope, x, 0.0), [DIM // 64, 64])
        narrow, code = to_fp8(groups, 1e-4)
        if KIND == 1:
            tl.store(values_ptr + d, tl.reshape(narrow, [DIM]), mask=d < nope)
            tail = (values_ptr + nope).to(tl.pointer_type(tl.bfloat16))
            tl.store(tail + d - nope, x.to(tl.bfloat16), mask=(d >= nope) & (d < dim))
            g = tl.arange(0, DIM // 64)
            padded = ((nope + 511) // 512) * 8
            tl.store(scales_ptr + g, tl.where(g * 64 < nope, code, 0).to(tl.uint8), mask=g < padded)
            more = DIM // 64 + tl.arange(0, 8)  # few dims have fewer groups than the eight bytes
            tl.store(scales_ptr + more, tl.zeros([8], tl.uint8), mask=more < padded)
        else:
            rounded = tl.reshape(e4m3_values(narrow) * power_of_two(code)[:, None], [DIM])
            x = tl.where((d < nope) & (x == x), rounded, x)
    if KIND == 0:
        tl.store(values_ptr + d, x.to(values_ptr.dtype.element_ty), mask=d < dim)


@triton.jit
def hadamard(x, DIM: tl.constexpr, STEPS: tl.constexpr, ROOT: tl.constexpr):
    """x [DIM] times the Walsh-Hadamard matrix / sqrt(DIM). A step turns the index by a bit, all of them once around."""
    for _ in tl.static_range(STEPS):
        a, b = tl.split(tl.reshape(x, [DIM // 2, 2]))
        x = tl.reshape(tl.trans(tl.join(a + b, a - b)), [DIM])
    return tl.div_rn(x, tl.full([DIM], ROOT, tl.float32))


@triton.jit
def put_key(
    x,
    d,
    values_ptr,
    scales_ptr,
    KIND: tl.constexpr,
    NATIVE: tl.constexpr,
    DIM: tl.constexpr,
    STEPS: tl.constexpr,
    ROOT: tl.constexpr,
):
    """Write an index key x [DIM], DIM a power of two, as one row of `KIND`; native numerics turn and round it first."""
    if NATIVE:
        x = _bf16(hadamard(_bf16(x), DIM, STEPS, ROOT))
    if NATIVE or KIND == 3:
        GROUP: tl.constexpr = 32 if DIM >= 32 else DIM
        grid, code = round_fp4(tl.reshape(x, [DIM // GROUP, GROUP]))
        if KIND == 3:
            grid = tl.where(grid == grid, grid, 0.0)
            size = tl.abs(grid)
            bits = tl.where(size < 2.0, 2.0 * size, tl.where(size < 4.0, size + 2.0, size * 0.5 + 4.0)).to(tl.int32)
            sign = tl.reshape(x, [DIM // GROUP, GROUP]).to(tl.int32, bitcast=True) >> 31
            bits = bits | (sign & 8)
            low, high = tl.split(tl.reshape(bits, [DIM // 2, 2]))
            tl.store(values_ptr + tl.arange(0, DIM // 2), (low | (high << 4)).to(tl.uint8))
            tl.store(scales_ptr + tl.arange(0, DIM // GROUP), code.to(tl.uint8))
        x = tl.reshape(grid * power_of_two(code)[:, None], [DIM])
    if KIND == 2:
        narrow, code = to_fp8(tl.reshape(x, [1, DIM]), 1e-4)
        tl.store(values_ptr + d, tl.reshape(narrow, [DIM]))
        tl.store(scales_ptr.to(tl.pointer_type(tl.float32)) + tl.arange(0, 1), power_of_two(code))
    if KIND == 0:
        tl.store(values_ptr + d, x.to(values_ptr.dtype.element_ty))
