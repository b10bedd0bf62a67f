"""Packed rows in Triton kernels: one row in registers written to a pool, and whole batches of rows written or copied.

The bytes are those of `pages.py`, bit for bit.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.quant.e4m3 import e4m3_bytes
from triptych.kernels.quant.formats import Index, PackedRows

ENTRY, FP8, MXFP4 = 0, 1, 2
KINDS = {"entry": ENTRY, "fp8": FP8, "mxfp4": MXFP4}


def place_of(pool: PackedRows) -> tuple[Any, ...]:
    """Values, strides of page and row, scales and theirs: how kernels get a pool."""
    return (pool.values, *pool.values.stride()[:2], pool.scales, *pool.scales.stride()[:2])


def store_rows(pool: PackedRows, index: Index, rows: Tensor) -> None:
    """formats.write_rows for packed pools on a GPU, in one launch; rows [N, dim] with any row stride."""
    flat = not isinstance(index, tuple)
    page, offset = index if isinstance(index, tuple) else (index, index)
    if not len(rows):
        return
    form = pool.format
    _store_rows[(len(rows),)](
        *(rows, rows.stride(0), page.contiguous(), offset.contiguous(), pool.stretch, *place_of(pool), form.dim),
        FLAT=flat,
        KIND=KINDS[form.kind],
        ROPE=form.rope,
        DIM=max(64, triton.next_power_of_2(form.dim)),
        num_warps=1,
    )


@triton.jit
def put_rounded(x, r, dim, values_ptr, scales_ptr, DIM: tl.constexpr):
    """Row r, x [DIM], rounded as quant.matrices.quantize_rows does; `dim` is a multiple of 128."""
    d = tl.arange(0, DIM)
    g = tl.arange(0, DIM // 128)
    x = tl.reshape(tl.where(d < dim, x.to(tl.float32), 0.0), [DIM // 128, 128])
    bits = tl.maximum(tl.max(tl.abs(x), 1), 1e-4).to(tl.int32, bitcast=True)
    exponent = ((bits + 0x1FFFFF) >> 23) - 8  # the smallest power of two that 448 times reaches the largest
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    values = tl.reshape((x * inverse[:, None]).to(tl.float8e4nv), [DIM])
    tl.store(values_ptr + r * dim + d, values, mask=d < dim)
    tl.store(scales_ptr + r * (dim // 128) + g, (exponent << 23).to(tl.float32, bitcast=True), mask=g * 128 < dim)


@triton.jit
def e8m0_of(amax, top_bits: tl.constexpr, top_power: tl.constexpr):
    """e8m0 codes of the smallest powers of two s >= 2^-126 with amax <= top * s; 255 for what is not finite.

    top = 1.m * 2^top_power, whose mantissa's bits are top_bits.
    """
    bits = amax.to(tl.int32, bitcast=True)
    code = (bits >> 23) - top_power + ((bits & 0x7FFFFF) > top_bits).to(tl.int32)
    return tl.where(bits >= 0x7F800000, 255, tl.maximum(code, 1))


@triton.jit
def store_entry(values, scales, x, dim, ROPE: tl.constexpr, DIM: tl.constexpr):
    """An entry x [DIM] in float32 to the row at `values` and `scales` (uint8 pointers): 64 e4m3 a scale, rope bf16."""
    d = tl.arange(0, DIM)
    nope = dim - ROPE
    size = tl.where(d < nope, tl.where(x == x, tl.abs(x), float("inf")), 0.0)
    amax = tl.max(tl.reshape(size, [DIM // 64, 64]), 1)
    code = e8m0_of(tl.maximum(amax, 1e-4), 0x600000, 8)
    inverse = ((254 - code) << 23).to(tl.float32, bitcast=True)
    y = tl.reshape(tl.reshape(x, [DIM // 64, 64]) * inverse[:, None], [DIM])
    y = e4m3_bytes(tl.minimum(tl.maximum(y, -448.0), 448.0))
    tl.store(values + d, y, mask=d < nope)
    tail = (values + nope).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    tl.store(tail + (d - nope), x.to(tl.bfloat16), mask=(d >= nope) & (d < dim))
    g = tl.arange(0, DIM // 64)
    groups = (nope + 63) // 64
    padded = (groups + 7) // 8 * 8
    tl.store(scales + g, tl.where(g < groups, code, 0).to(tl.uint8), mask=g < padded)
    if DIM < 512:  # fewer than the 8 scale bytes that every entry has
        rest = tl.arange(0, 8)
        tl.store(scales + rest, tl.full([8], 0, tl.uint8), mask=rest >= DIM // 64)


@triton.jit
def store_fp8_key(values, scales, x, dim, DIM: tl.constexpr):
    """An index key x [DIM] in float32 as e4m3 with one float32 scale."""
    d = tl.arange(0, DIM)
    size = tl.where(d < dim, tl.where(x == x, tl.abs(x), float("inf")), 0.0)
    code = e8m0_of(tl.maximum(tl.max(size, 0), 1e-4), 0x600000, 8)
    y = x * ((254 - code) << 23).to(tl.float32, bitcast=True)
    y = e4m3_bytes(tl.minimum(tl.maximum(y, -448.0), 448.0))
    tl.store(values + d, y, mask=d < dim)
    scale = tl.where(code == 255, 0x7FC00000, code << 23)
    tl.store(scales.to(tl.pointer_type(tl.int32), bitcast=True), scale)


@triton.jit
def store_mxfp4_key(values, scales, x, dim, DIM: tl.constexpr):
    """An index key x [DIM] in float32 as two e2m1 a byte with an e8m0 scale per 32."""
    d = tl.arange(0, DIM)
    x = tl.where(d < dim, x, 0.0)
    grouped = tl.reshape(x, [DIM // 32, 32])
    size = tl.where(grouped == grouped, tl.abs(grouped), float("inf"))
    code = e8m0_of(tl.max(size, 1), 0x400000, 2)
    y = tl.abs(grouped) * ((254 - code) << 23).to(tl.float32, bitcast=True)[:, None]
    y = tl.minimum(tl.where(y == y, y, 0.0), 6.0)
    step = tl.where(y < 2.0, 0.5, tl.where(y < 4.0, 1.0, 2.0))
    y = ((y / step + 12582912.0) - 12582912.0) * step  # to the nearest, ties to even
    nibble = tl.where(y < 2.0, 2.0 * y, tl.where(y < 4.0, y + 2.0, y / 2.0 + 4.0)).to(tl.int32)
    sign = (grouped.to(tl.int32, bitcast=True) >> 28) & 8
    low, high = tl.split(tl.reshape(nibble | sign, [DIM // 2, 2]))
    half = tl.arange(0, DIM // 2)
    tl.store(values + half, (low | (high << 4)).to(tl.uint8), mask=half < dim // 2)
    g = tl.arange(0, DIM // 32)
    tl.store(scales + g, code.to(tl.uint8), mask=g < dim // 32)


@triton.jit
def store_row(values, scales, x, dim, KIND: tl.constexpr, ROPE: tl.constexpr, DIM: tl.constexpr):
    """Row x [DIM] in float32, of which `dim` count, in the packed format KIND (ENTRY, FP8, MXFP4)."""
    if KIND == 0:
        store_entry(values, scales, x, dim, ROPE, DIM)
    if KIND == 1:
        store_fp8_key(values, scales, x, dim, DIM)
    if KIND == 2:
        store_mxfp4_key(values, scales, x, dim, DIM)


@triton.jit
def _store_rows(
    rows_ptr,
    rows_row,
    page_ptr,
    offset_ptr,
    stretch,
    values_ptr,
    values_page,
    values_row,
    scales_ptr,
    scales_page,
    scales_row,
    dim,
    FLAT: tl.constexpr,
    KIND: tl.constexpr,
    ROPE: tl.constexpr,
    DIM: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DIM)
    x = tl.load(rows_ptr + n * rows_row + d, mask=d < dim, other=0.0).to(tl.float32)
    page = tl.load(page_ptr + n).to(tl.int64)
    if FLAT:
        row = page % stretch
        page = page // stretch
    else:
        row = tl.load(offset_ptr + n).to(tl.int64)
    values = values_ptr + page * values_page + row * values_row
    store_row(values, scales_ptr + page * scales_page + row * scales_row, x, dim, KIND, ROPE, DIM)
