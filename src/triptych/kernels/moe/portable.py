"""Experts of MXFP4 weights in plain Triton: any NVIDIA GPU, and Triton's interpreter.

An e2m1 value times its power of two is exact in bfloat16, and so is a rounded input: packed weights are unpacked in
registers and meet rounded rows in the bfloat16 tensor cores, with float32 sums. A pair's sum is one program's, in the
order of the columns; with tiles of one size (`tile`) its bits do not depend on the other pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.linear.portable import INTERPRETED, rounded
from triptych.kernels.moe.pairs import add_up, sorted_pairs, tile_of
from triptych.kernels.moe.ref import Experts
from triptych.kernels.quant.matrices import Mxfp4Matrix


def experts(x: Tensor, ids: Tensor, weights: Tensor, moe: Experts, tile: int | None = None) -> Tensor:
    """See ref.experts, in native numerics: inputs and hidden values are rounded here. Does not synchronise."""
    w13, w2 = moe.w13, moe.w2
    assert isinstance(w13, Mxfp4Matrix) and isinstance(w2, Mxfp4Matrix)
    assert w13.tops is None and w2.tops is None, "these read MXFP4 as released, not in tiles"
    rows, k = ids.shape
    count, dim, inner = w2.shape
    if not rows:
        return torch.empty_like(x)
    tile = tile or (16 if rows * k <= 16 * count else 64)
    pairs = sorted_pairs(ids, count, tile)
    hidden = torch.empty(rows * k, inner, device=x.device)
    shape = dict(PAIRS=tile, WIDE=INTERPRETED, EXPERTS=triton.next_power_of_2(count), num_warps=4, num_stages=3)
    _up[(pairs.tiles, triton.cdiv(inner, 64))](
        *(rounded(x), w13.values, w13.scales, weights.contiguous(), hidden, *pairs[:3]),
        *(count, k, dim, inner, moe.limit),
        **shape,
    )
    each = torch.empty(rows * k, dim, device=x.device)
    _down[(pairs.tiles, triton.cdiv(dim, 64))](
        *(rounded(hidden), w2.values, w2.scales, each, *pairs[:3], count, inner, dim), **shape
    )
    return add_up(each, rows, x.dtype)


@triton.jit
def _halves(both, scale):
    """The e2m1 values of bytes `both`, those of the lower four bits and those of the upper, times `scale`, in bfloat16.

    Their bits, at the top of bfloat16's mantissa and the foot of its exponent, lack 2^126. A product of two bfloat16
    alone is Hopper's; minus zero added to it changes nothing. Of four bytes at a time.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c, d, e, f, m, s, t, z;
        mov.b32 m, 0x7e807e80;
        mov.b32 z, 0x80008000;
        mov.b32 s, $5;
        mov.b32 t, $6;
        prmt.b32 a, $4, 0, 0x1404;
        prmt.b32 b, $4, 0, 0x3424;
        shr.u32 c, a, 2;
        shr.u32 d, b, 2;
        and.b32 c, c, 0x01c001c0;
        and.b32 d, d, 0x01c001c0;
        shl.b32 e, a, 4;
        shl.b32 f, b, 4;
        lop3.b32 c, e, 0x80008000, c, 0xea;
        lop3.b32 d, f, 0x80008000, d, 0xea;
        fma.rn.bf16x2 c, c, m, z;
        fma.rn.bf16x2 d, d, m, z;
        fma.rn.bf16x2 $0, c, s, z;
        fma.rn.bf16x2 $1, d, t, z;
        shr.u32 c, a, 6;
        shr.u32 d, b, 6;
        and.b32 c, c, 0x01c001c0;
        and.b32 d, d, 0x01c001c0;
        lop3.b32 c, a, 0x80008000, c, 0xea;
        lop3.b32 d, b, 0x80008000, d, 0xea;
        fma.rn.bf16x2 c, c, m, z;
        fma.rn.bf16x2 d, d, m, z;
        fma.rn.bf16x2 $2, c, s, z;
        fma.rn.bf16x2 $3, d, t, z;
        }""",
        "=r,=r,=r,=r,r,r,r",
        [both, scale],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _unpacked(w_ptr, s_ptr, row, here, at, depth, kind: tl.constexpr):
    """Columns [at, at + 64) of rows `row` [64] of a packed matrix as `kind` [64, 64], 0 where `here` is not."""
    half = at // 2 + tl.arange(0, 32)
    both = tl.load(
        w_ptr + row[:, None] * (depth // 2) + half[None, :], mask=here[:, None] & (half < depth // 2)[None, :], other=0
    )
    n = at // 32 + tl.arange(0, 2)
    code = tl.load(
        s_ptr + row[:, None] * (depth // 32) + n[None, :], mask=here[:, None] & (n < depth // 32)[None, :], other=1
    ).to(tl.int32)
    if kind == tl.bfloat16:
        bits = tl.where(code == 0, 1 << 6, tl.where(code == 255, 0x7FC0, code << 7))
        scale = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)[:, :, None]
        low, high = _halves(tl.reshape(both, [64, 2, 16]), tl.broadcast_to(scale, [64, 2, 16]))
        return tl.reshape(tl.join(low, high), [64, 64])
    else:
        codes = tl.reshape(tl.join(both & 15, both >> 4), [64, 2, 32]).to(tl.int32)
        # the bits of a magnitude, at the top of float32's mantissa and the foot of its exponent, lack 2^126
        size = (((codes & 7) << 22) | ((codes & 8) << 28)).to(tl.float32, bitcast=True) * 8.507059173023462e37
        bits = tl.where(code == 0, 1 << 22, tl.where(code == 255, 0x7FC00000, code << 23))
        return tl.reshape(size * bits.to(tl.float32, bitcast=True)[:, :, None], [64, 64]).to(kind)


@triton.jit
def _up(
    x_ptr,
    w_ptr,
    s_ptr,
    weights_ptr,
    hidden_ptr,
    order_ptr,
    ends_ptr,
    tile_ends_ptr,
    count,
    k,
    dim,
    inner,
    limit,
    EXPERTS: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """64 hidden columns of a tile of pairs: W13, SwiGLU and the pair's weight."""
    kind: tl.constexpr = tl.float32 if WIDE else tl.bfloat16
    expert, place, valid = tile_of(ends_ptr, tile_ends_ptr, count, PAIRS, EXPERTS)
    if expert < count:
        pair = tl.load(order_ptr + place, mask=valid, other=0)
        n = tl.program_id(1) * 64 + tl.arange(0, 64)
        d = tl.arange(0, 64)
        rows_ptr = x_ptr + (pair // k)[:, None] * dim + d[None, :]
        row = expert * 2 * inner + n
        gate = tl.zeros([PAIRS, 64], tl.float32)
        up = tl.zeros([PAIRS, 64], tl.float32)
        for at in range(0, dim, 64):
            x = tl.load(rows_ptr + at, mask=valid[:, None] & (at + d < dim)[None, :], other=0.0).to(kind)
            w = _unpacked(w_ptr, s_ptr, row, n < inner, at, dim, kind)
            gate = tl.dot(x, tl.trans(w), gate, input_precision="ieee")
            w = _unpacked(w_ptr, s_ptr, row + inner, n < inner, at, dim, kind)
            up = tl.dot(x, tl.trans(w), up, input_precision="ieee")
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        y = gate * tl.sigmoid(gate) * up * tl.load(weights_ptr + pair, mask=valid, other=0.0)[:, None]
        tl.store(hidden_ptr + pair[:, None] * inner + n[None, :], y, mask=valid[:, None] & (n < inner)[None, :])


@triton.jit
def _down(
    hidden_ptr,
    w_ptr,
    s_ptr,
    out_ptr,
    order_ptr,
    ends_ptr,
    tile_ends_ptr,
    count,
    inner,
    dim,
    EXPERTS: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """64 output columns of a tile of pairs."""
    kind: tl.constexpr = tl.float32 if WIDE else tl.bfloat16
    expert, place, valid = tile_of(ends_ptr, tile_ends_ptr, count, PAIRS, EXPERTS)
    if expert < count:
        pair = tl.load(order_ptr + place, mask=valid, other=0)
        n = tl.program_id(1) * 64 + tl.arange(0, 64)
        d = tl.arange(0, 64)
        rows_ptr = hidden_ptr + pair[:, None] * inner + d[None, :]
        y = tl.zeros([PAIRS, 64], tl.float32)
        for at in range(0, inner, 64):
            h = tl.load(rows_ptr + at, mask=valid[:, None] & (at + d < inner)[None, :], other=0.0).to(kind)
            w = _unpacked(w_ptr, s_ptr, expert * dim + n, n < dim, at, inner, kind)
            y = tl.dot(h, tl.trans(w), y, input_precision="ieee")
        tl.store(out_ptr + pair[:, None] * dim + n[None, :], y, mask=valid[:, None] & (n < dim)[None, :])
