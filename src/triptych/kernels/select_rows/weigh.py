"""What the kernels for Hopper share: products of keys and queries weighed and summed over heads.

FP8 keys: a thread of a product [16 keys a warp, 64 heads a row] has 16 of the heads of two keys; with two rows, or two
products, it has four sums, of which its neighbours in a quad have the other quarters. They swap halves, so that each
thread ends with one score instead of all four with the same ones. relu is a product that saturates: it keeps the unit
for comparisons free, which serves half as many a cycle as the one for products.

MXFP4 keys: sums of products of e2m1 fit float16, as long as a key's scales are much alike, so relu takes two at a time,
and products with columns of weights sum them over heads in float32.

The order of a sum is the same everywhere, so a score depends on its row and key alone.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

_RELU: Any = gl.constexpr("mul.sat.f32 $0, $1, 0f33000000;")
"""relu of a product times 2^-25, and so below 1: e4m3 sums over 128 dims are less than 2^25."""
_UNSATURATED: Any = gl.constexpr(33554432.0)

_QUAD: Any = gl.constexpr(
    """
{
.reg .pred p;
.reg .b32 a, b, c, d;
and.b32 a, $5, 1;
setp.ne.b32 p, a, 0;
selp.b32 a, $2, $1, p;
selp.b32 b, $1, $2, p;
selp.b32 c, $4, $3, p;
selp.b32 d, $3, $4, p;
shfl.sync.bfly.b32 b, b, 1, 31, -1;
shfl.sync.bfly.b32 d, d, 1, 31, -1;
add.rn.f32 a, a, b;
add.rn.f32 c, c, d;
and.b32 b, $5, 2;
setp.ne.b32 p, b, 0;
selp.b32 b, c, a, p;
selp.b32 d, a, c, p;
shfl.sync.bfly.b32 d, d, 2, 31, -1;
add.rn.f32 $0, b, d;
}
"""
)
"""Sums of a quad: $1 and $2 of the first of two keys, $3 and $4 of the second; a thread's number in it is $5."""


@gluon.constexpr_function
def bits(n):
    """Powers of two below n."""
    return [1 << i for i in range(n.bit_length() - 1)]


@gluon.constexpr_function
def pair_layout(warps):
    """[16 warps, 2] scores, one a thread: of keys of a product and two rows."""
    lanes = [[0, 1], [8, 0], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([], lanes, [[16 * b, 0] for b in bits(warps)], [], [16 * warps, 2])


@gluon.constexpr_function
def line_layout(warps):
    """[32 warps] scores, one a thread: of keys of two products of one row."""
    lanes = [[16 * warps], [8], [1], [2], [4]]
    return gl.DistributedLinearLayout([], lanes, [[16 * b] for b in bits(warps)], [], [32 * warps])


@gluon.constexpr_function
def _weight_layout(warps):
    """[4, 4 of a quad, 4] weights of a row, as weight_of has them: a thread has its quarter."""
    lanes = [[0, 1, 0], [0, 2, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    deep = [[0, 0, 1], [0, 0, 2], [1, 0, 0], [2, 0, 0]]
    return gl.DistributedLinearLayout(deep, lanes, [[0, 0, 0] for _ in bits(warps)], [], [4, 4, 4])


@gluon.jit
def weight_at(power_ptr, weight_ptr, head, heads):
    """Weights of some heads of a row, times what queries lack."""
    power = gl.load(power_ptr + head, mask=head < heads, other=0)
    weight = gl.load(weight_ptr + head, mask=head < heads, other=0.0)
    return weight * ((127 + power) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def weight_of(power_ptr, weight_ptr, i, heads):
    """weight_at, times what products lack, in the order in which weights_of reads them.

    What a thread of a product needs comes 16 bytes a time."""
    head = i // 16 * 16 + i % 4 // 2 * 8 + i // 4 % 4 * 2 + i % 2
    return weight_at(power_ptr, weight_ptr, head, heads) * _UNSATURATED


@gluon.jit
def lined_up(weight, power):
    """weight_of of all 64 heads, each where a thread has it already."""
    w = weight * ((127 + power) << 23).to(gl.float32, bitcast=True) * _UNSATURATED
    return gl.reshape(gl.permute(gl.reshape(w, [4, 2, 4, 2]), (0, 2, 1, 3)), [64])


@gluon.jit
def weights_of(weights, WARPS: gl.constexpr):
    """Weights in shared memory [64] -> [4 of a quad, 16]: those of a thread's heads, in the order of its products."""
    w = weights._reinterpret(gl.float32, [4, 4, 4], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    return gl.reshape(gl.permute(w.load(_weight_layout(WARPS)), (1, 0, 2)), [4, 16])


@gluon.jit
def _sum(total, s, w, COUNT: gl.constexpr):
    """total + relu(s) w, one head after the other: COUNT of them along the last axis."""
    if COUNT == 1:
        L: gl.constexpr = total.type.layout
        s = gl.convert_layout(gl.reshape(s, s.shape[:-1]), L, assert_trivial=True)
        w = gl.convert_layout(gl.reshape(w, w.shape[:-1]), L, assert_trivial=True)
        s = gl.inline_asm_elementwise(_RELU, "=f,f", [s], gl.float32, is_pure=True, pack=1)
        return gl.fma(s, w, total)
    else:
        shape: gl.constexpr = s.shape[:-1] + [2, COUNT // 2]  # noqa: RUF005  (no stars here)
        a, b = gl.split(gl.permute(gl.reshape(s, shape), (0, 1, 2, 4, 3)))
        u, v = gl.split(gl.permute(gl.reshape(w, shape), (0, 1, 2, 4, 3)))
        return _sum(_sum(total, a, u, COUNT // 2), b, v, COUNT // 2)


@gluon.jit
def _part(s, w):
    """Sums [warp, key, quad] of s [.., 16 heads] weighed by w [quad, 16]."""
    L: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, s.type.layout))
    w = gl.expand_dims(gl.expand_dims(gl.convert_layout(w, L, assert_trivial=True), 0), 0)
    w, _ = gl.broadcast(w, s)
    zero = gl.zeros(s.shape[:-1], gl.float32, layout=gl.SliceLayout(3, s.type.layout))
    return _sum(zero, s, w, 16)


@gluon.jit
def weighed_rows(s, w0, w1, WARPS: gl.constexpr):
    """Products s [16 WARPS, 2 rows of 64] weighed: a thread's four sums, of two keys and the rows.

    w0 and w1 [4, 16] are weights_of the rows."""
    x = gl.permute(gl.reshape(s, [WARPS, 2, 8, 2, 8, 4, 2]), (0, 2, 5, 4, 6, 1, 3))
    # warp, key of 8, thread of the quad, its heads, half of keys, row
    even, odd = gl.split(gl.reshape(x, [WARPS, 8, 4, 16, 2, 2]))
    a, c = gl.split(even)
    b, d = gl.split(odd)
    return _part(a, w0), _part(b, w1), _part(c, w0), _part(d, w1)


@gluon.jit
def weighed(s, w, WARPS: gl.constexpr):
    """Products s [16 WARPS, 64] of a row weighed: a thread's two sums, of two keys; w [4, 16] are its weights_of."""
    x = gl.permute(gl.reshape(s, [WARPS, 2, 8, 8, 4, 2]), (0, 2, 4, 3, 5, 1))
    a, c = gl.split(gl.reshape(x, [WARPS, 8, 4, 16, 2]))
    return _part(a, w), _part(c, w)


@gluon.jit
def summed(sums, WARPS: gl.constexpr, ROWS: gl.constexpr):
    """What a quad weighed: a sum a thread, [16 WARPS, 2 rows] in pair_layout or, of two products, [32 WARPS] in
    line_layout. Sums are of the first key and either row or product, then of the second."""
    a, b, c, d = sums
    L: gl.constexpr = a.type.layout
    turn = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(0, L)))
    turn, _ = gl.broadcast(gl.expand_dims(gl.expand_dims(turn, 0), 0), a)
    x = gl.inline_asm_elementwise(_QUAD, "=f,f,f,f,f,r", [a, b, c, d, turn], gl.float32, is_pure=False, pack=1)
    x = gl.permute(gl.reshape(x, [WARPS, 8, 2, 2]), (0, 2, 1, 3))  # warp, half of keys, key of 8, row or product
    if ROWS == 2:
        return gl.convert_layout(gl.reshape(x, [16 * WARPS, 2]), pair_layout(WARPS), assert_trivial=True)
    else:
        x = gl.reshape(gl.permute(x, (3, 0, 1, 2)), [32 * WARPS])
        return gl.convert_layout(x, line_layout(WARPS), assert_trivial=True)


@gluon.constexpr_function
def _sums_layout(warps):
    """[16 warps, 8] sums over heads."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1], instr_shape=[16, 8])


@gluon.jit
def columns_of(weights, WARPS: gl.constexpr):
    """Weights [64] in shared memory -> [64, 8] float16, and the power of two that they lack.

    Even columns have what weights are rounded to, odd ones what that leaves."""
    B: gl.constexpr = gl.DotOperandLayout(1, _sums_layout(WARPS), 2)
    w = weights.load(gl.SliceLayout(1, B))
    power = gl.maximum((gl.max(gl.abs(w), 0).to(gl.int32, bitcast=True) >> 23) - 126, -100)
    w = w * ((127 - power) << 23).to(gl.float32, bitcast=True)
    high = w.to(gl.float16)
    low = (w - high.to(gl.float32)).to(gl.float16)
    odd = gl.arange(0, 8, layout=gl.SliceLayout(0, B)) & 1
    return gl.where((odd == 0)[None, :], high[:, None], low[:, None]), power


@gluon.jit
def folded(s, w, WARPS: gl.constexpr):
    """Products s [16 WARPS, 64] -> their relus times weights, summed over heads: [16 WARPS, 4 of a quad], all alike."""
    M: gl.constexpr = _sums_layout(WARPS)
    one = gl.full_like(s, 1.0)
    zero = gl.full_like(s, 0.0)
    s = gl.inline_asm_elementwise(
        "fma.rn.relu.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [s, one, zero], gl.float16, is_pure=True, pack=2
    )
    s = gl.convert_layout(s, gl.DotOperandLayout(0, M, 2), assert_trivial=True)
    a, b = gl.split(gl.reshape(mma_v2(s, w, gl.zeros([s.shape[0], 8], gl.float32, layout=M)), [s.shape[0], 4, 2]))
    return a + b


@gluon.jit
def folded_rows(s, w0, w1, WARPS: gl.constexpr):
    """Products s [16 WARPS, 2 rows of 64] folded by the rows' columns_of -> sums [16 WARPS, 2] in pair_layout."""
    a, b = gl.split(gl.permute(gl.reshape(s, [16 * WARPS, 2, 64]), (0, 2, 1)))
    x = picked(folded(a, w0, WARPS), folded(b, w1, WARPS), WARPS)
    x = gl.reshape(gl.permute(x, (0, 2, 1, 3)), [16 * WARPS, 2])
    return gl.convert_layout(x, pair_layout(WARPS), assert_trivial=True)


@gluon.jit
def picked(a, b, WARPS: gl.constexpr):
    """Of sums [16 WARPS, 4 of a quad] of two rows or products, a thread's own: [WARPS, key of 8, half of keys, row or
    product]."""
    quad = gl.arange(0, 4, layout=gl.SliceLayout(0, a.type.layout))[None, :]
    x = gl.where((quad & 1) == 0, a, b)
    low, high = gl.split(gl.permute(gl.reshape(x, [WARPS, 2, 8, 2, 2]), (0, 2, 3, 4, 1)))
    half = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, low.type.layout))))
    half = gl.expand_dims(gl.expand_dims(gl.expand_dims(half, 0), 1), 3)
    return gl.where(half == 0, low, high)


@gluon.jit
def in_order(s, factor):
    """Scores as integers that sort like the floats; -0 is 0."""
    bits = gl.fma(s, factor, 0.0).to(gl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
