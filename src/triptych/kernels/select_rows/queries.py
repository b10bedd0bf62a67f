"""Index queries of a row as e4m3, for Hopper: rotated, by Hadamard too, and rounded to e2m1, all in registers.

A dim's number has seven bits. A thread has a quarter of a head's dims: two bits of the number are its place among the
four threads that share the head, the other five count its registers. Hadamard's transform goes over four of the bits
by products with a matrix of 16 x 16 signs, whose operands and results lie in the same registers, and over the other
three by sums and differences. Eight warps have 8 heads each.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from triptych.kernels.select_rows.ref import IndexQueries

_MAGIC: Any = gl.constexpr(22 << 23)
_AS_BF16: Any = gl.constexpr(
    """
{
.reg .b32 t;
cvt.rn.bf16x2.f32 t, $3, $2;
shl.b32 $0, t, 16;
and.b32 $1, t, 0xffff0000;
}
"""
)
"""Two float32 rounded to bfloat16 at once; one by one takes a unit that is an eighth as fast."""


def rounded_queries(queries: IndexQueries, kind: int) -> tuple[Tensor, Tensor]:
    """Queries rotated and rounded to e4m3 [R, heads, 128], as bytes, and the power of two int32 [R, heads] that they
    lack.

    Their dims are as they come for FP8 keys (`kind` 1), and in the order of mxfp4.py for MXFP4 keys (2).
    """
    rows, heads, device = len(queries.heads), queries.count, queries.heads.device
    raw = queries.heads[:, -heads * queries.dim :]
    q = torch.empty(rows, heads, queries.dim, dtype=torch.uint8, device=device)
    power = torch.empty(rows, heads, dtype=torch.int32, device=device)
    each = 8 if rows > 1024 else 1
    _prepare[(triton.cdiv(rows, each),)](
        *(raw, raw.stride(0), *queries.angles, q, power, rows, heads),
        ROUNDS=queries.rounds,
        ROWS=each,
        ROPE=2 * queries.angles[0].shape[1],
        KIND=kind,
        num_warps=8,
    )
    return q, power


@gluon.constexpr_function
def query_layout():
    """[64 heads, 128 dims]: eight neighbours, and those 32, 64 and 96 further, in a thread; eight heads in a warp."""
    deep = [[0, 1], [0, 2], [0, 4], [0, 32], [0, 64]]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(deep, lanes, [[8, 0], [16, 0], [32, 0]], [], [64, 128])


@gluon.jit
def _turned(x, turns):
    """x [64, 128] with its last dims rotated in pairs."""
    even, odd = gl.split(gl.reshape(x, [64, 64, 2]))
    cos, sin = turns[0][None, :], turns[1][None, :]
    return gl.reshape(gl.join(even * cos - odd * sin, odd * cos + even * sin), [64, 128])


@gluon.jit
def _crossed(x):
    """Sums and differences over the first axis of x [2, a, b, c, d], which becomes the last."""
    a, b = gl.split(gl.permute(x, (1, 2, 3, 4, 0)))
    return gl.join(a + b, a - b)


@gluon.jit
def _transformed(x):
    """Hadamard's transform of x [64, 128], which is rounded to bfloat16 first."""
    M: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[8, 1], instr_shape=[16, 8])
    B: gl.constexpr = gl.DotOperandLayout(1, M, 2)
    i = gl.arange(0, 16, layout=gl.SliceLayout(1, B))[:, None] & gl.arange(0, 16, layout=gl.SliceLayout(0, B))[None, :]
    i = i ^ (i >> 2)
    i = i ^ (i >> 1)
    signs = (((i & 1) << 15) | 0x3F80).to(gl.int16).to(gl.bfloat16, bitcast=True)
    # warp, its head, dims' bits 6 and 5, 4 and 3, 2, 1, 0
    x = gl.permute(gl.reshape(x.to(gl.bfloat16), [8, 8, 4, 4, 2, 2, 2]), (2, 0, 4, 1, 5, 3, 6))
    x = gl.convert_layout(gl.reshape(x, [512, 16]), gl.DotOperandLayout(0, M, 2), assert_trivial=True)
    y = mma_v2(x, signs, gl.zeros([512, 16], gl.float32, layout=M))
    y = _crossed(gl.reshape(y, [2, 2, 8, 2, 128]))  # over bit 6
    y = _crossed(y)  # 5
    y = _crossed(gl.permute(y, (1, 0, 2, 3, 4)))  # 2
    y = gl.reshape(y, [64, 2, 4, 2, 2, 2, 2])  # head, dims' bits 1, 4 and 3, 0, 6, 5, 2
    y = gl.reshape(gl.permute(y, (0, 4, 5, 2, 6, 1, 3)), [64, 128])
    return gl.convert_layout(y, query_layout(), assert_trivial=True)


@gluon.jit
def _rounded_e2m1(x):
    """x [64, 128] on the e2m1 grid, groups of 32: values over 2^(most - 6), and most [64].

    2^p is a group's scale, `most` the largest p of a head, so values are at most 6 * 2^6.
    """
    g = gl.reshape(x, [64, 4, 32])
    top = gl.max(gl.abs(g), 2).to(gl.int32, bitcast=True)
    power = (top >> 23) - 129 + ((top & 0x7FFFFF) > 0x400000).to(gl.int32)
    power = gl.maximum(power, -100)
    y = g * gl.expand_dims(((127 - power) << 23).to(gl.float32, bitcast=True), 2)
    sign = y.to(gl.int32, bitcast=True) & -2147483648
    size = gl.abs(y)
    # 2^22 times the power of two below: what is added to it is rounded to its last bit
    far = gl.maximum(size.to(gl.int32, bitcast=True) & 0x7F800000, 0x3F800000) + _MAGIC
    far = far.to(gl.float32, bitcast=True)
    y = (((size + far) - far).to(gl.int32, bitcast=True) | sign).to(gl.float32, bitcast=True)
    most = gl.max(power, 1)
    shift = gl.maximum(power - most[:, None] + 6, -100)
    y = y * gl.expand_dims(((127 + shift) << 23).to(gl.float32, bitcast=True), 2)
    return gl.reshape(y, [64, 128]), gl.convert_layout(most, gl.SliceLayout(1, query_layout()))


@gluon.jit
def _within(x, power):
    """x [64, 128] and power [64] such that float16 holds what a head's products with MXFP4 keys may add up to.

    Those are at most 6 * 2^5, see mxfp4.py."""
    size = gl.sum(gl.abs(x), 1).to(gl.int32, bitcast=True)
    over = gl.maximum((size >> 23) - 135 + ((size & 0x7FFFFF) > 0x2A8000).to(gl.int32), -60)  # 341 at most
    x = x * gl.expand_dims(((127 - over) << 23).to(gl.float32, bitcast=True), 1)
    return x, power + gl.convert_layout(over, power.type.layout)


@gluon.jit
def asked_for(q_ptr, cos_ptr, sin_ptr, heads, ROPE: gl.constexpr):
    """Queries of a row at q_ptr [64, 128], 0 beyond `heads`, and what pairs of their dims are rotated by, 1 and 0 for
    all but the last ROPE dims. By eight warps."""
    L: gl.constexpr = query_layout()
    h = gl.arange(0, 64, layout=gl.SliceLayout(1, L))[:, None]
    d = gl.arange(0, 128, layout=gl.SliceLayout(0, L))[None, :]
    raw = gl.load(q_ptr + h * 128 + d, mask=(h < heads) & (d >= 0), other=0.0)
    even, _ = gl.split(gl.reshape(raw, [64, 64, 2]))
    pair = gl.arange(0, 64, layout=gl.SliceLayout(0, even.type.layout)) - (128 - ROPE) // 2
    cos = gl.load(cos_ptr + pair, mask=(pair >= 0) & (heads > 0), other=1.0)
    return raw, (cos, gl.load(sin_ptr + pair, mask=(pair >= 0) & (heads > 0), other=0.0))


@gluon.jit
def made(
    q_ptr, cos_ptr, sin_ptr, heads, ROUNDS: gl.constexpr, ROPE: gl.constexpr, KIND: gl.constexpr
):  # fmt: skip
    """made_of the queries of a row at q_ptr, by eight warps."""
    raw, turns = asked_for(q_ptr, cos_ptr, sin_ptr, heads, ROPE)
    return made_of(raw, turns, ROUNDS, ROPE, KIND)


@gluon.jit
def made_of(raw, turns, ROUNDS: gl.constexpr, ROPE: gl.constexpr, KIND: gl.constexpr):
    """Queries of a row, as they were asked for -> [64, 128] e4m3, which lack 2^power [64].

    For MXFP4 keys their dims are in the order in which mxfp4.py expands those."""
    L: gl.constexpr = query_layout()
    x = raw.to(gl.float32)
    if ROPE > 0:
        x = gl.convert_layout(_turned(x, turns), L)
    if ROUNDS:
        x = _transformed(x) * 0.08838834764831845  # 128 ** -0.5
        x = gl.inline_asm_elementwise(_AS_BF16, "=f,=f,f,f", [x], gl.float32, is_pure=True, pack=2)
        x, power = _rounded_e2m1(x)
        power -= 6
    else:
        top = gl.max(gl.abs(x), 1).to(gl.int32, bitcast=True)
        power = gl.maximum((top >> 23) - 135 + ((top & 0x7FFFFF) > 0x600000).to(gl.int32), -100)
        x = x * ((127 - power) << 23).to(gl.float32, bitcast=True)[:, None]
    if KIND == 2:
        x, power = _within(x, power)
    x = x.to(gl.float8e4nv)
    if KIND == 2:
        x = gl.reshape(gl.permute(gl.reshape(x, [64, 4, 4, 2, 4]), (0, 2, 3, 1, 4)), [64, 128])
    return x.to(gl.uint8, bitcast=True), power


@gluon.jit
def _prepare(
    q_ptr, q_row, cos_ptr, sin_ptr, out_ptr, power_ptr, count, heads,
    ROUNDS: gl.constexpr, ROWS: gl.constexpr, ROPE: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    """Queries of ROWS rows as e4m3 [R, heads, 128] that lack a power of two a head."""
    h = gl.arange(0, 64, layout=gl.SliceLayout(1, query_layout()))
    for n in range(ROWS):
        r = gl.minimum(gl.program_id(0) * ROWS + n, count - 1).to(gl.int64)
        turn = r * (ROPE // 2)
        x, power = made(q_ptr + r * q_row, cos_ptr + turn, sin_ptr + turn, heads, ROUNDS, ROPE, KIND)
        its = gl.arange(0, 64, layout=gl.SliceLayout(1, x.type.layout))[:, None]
        place = its * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, x.type.layout))[None, :]
        gl.store(out_ptr + r * heads * 128 + place, x, mask=its < heads)
        gl.store(power_ptr + r * heads + h, power, mask=h < heads)
