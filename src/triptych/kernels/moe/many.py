"""Experts of many rows (prefill), from MXFP4 on the FP8 tensor cores.

A product is computed turned over, W x^T: its left operand may lie in registers, so MXFP4 becomes e4m3 there, and only
packed weights go through shared memory. The rows of x are those of the pairs, sorted by expert, so a tile of pairs is
one block of memory. Columns are in an order in which what a thread unpacks is its fragment of m64n128k32:

    thread c of 4, columns 32c + 8i + 4h + j   ->   slot 32i + 16h + 4c + j of 128

Each 128 columns are summed apart and scaled in float32, since the tensor cores keep few bits of an e4m3 sum.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

ASM_E4M3: Any = gl.constexpr(
    """
{
.reg .b32 s, t, hi, lo, p0, p1;
and.b32 s, $2, 0x77777777;
shl.b32 t, $2, 4;
add.u32 hi, $3, 0x24201c18;
and.b32 lo, $3, 0xffffff00;
add.u32 lo, lo, 0x14100800;
prmt.b32 p0, t, $2, 0x5140;
prmt.b32 p1, t, $2, 0x7362;
prmt.b32 t, lo, hi, s;
lop3.b32 $0, p0, 0x80808080, t, 0xea;
shr.u32 s, s, 16;
prmt.b32 t, lo, hi, s;
lop3.b32 $1, p1, 0x80808080, t, 0xea;
}
"""
)
"""Eight e2m1 ($2) to twice four e4m3: a table of the eight magnitudes, its exponents moved by $3, looked up bytewise.

$3 holds 8 (n + 11) in each byte: values are e2m1's times 2^(n + 6), exactly, for n from -11 to 0."""

ROWS: Any = gl.constexpr(128)
PAIRS: Any = gl.constexpr(128)
STAGES: Any = gl.constexpr(4)
"""Blocks of 24 KB on their way or in use: eight were 5 % slower on an H200."""


@gluon.constexpr_function
def _weights():
    """Packed weights [128, 4, 16] bytes as eight warps' fragments want them: two rows of a thread, 16 bytes each."""
    deep = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], [8, 0, 0]]
    lanes = [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(deep, lanes, [[16, 0, 0], [32, 0, 0], [64, 0, 0]], [], [128, 4, 16])


@gluon.jit
def _fetch(xs, ws, xp, wp, k, BLOCKS: gl.constexpr):
    if k < BLOCKS:
        async_copy.async_copy_global_to_shared(xs.index(k % STAGES), xp + k * 128)
        async_copy.async_copy_global_to_shared(ws.index(k % STAGES), wp + k * 64)
    async_copy.commit_group()


@gluon.jit
def _arrive(xs, ws, xp, wp, k, BLOCKS: gl.constexpr):
    """Wait for block k and fetch one into the place of block k - 2: a product of k - 1 may still be running."""
    async_copy.wait_group(STAGES - 3)
    fence_async_shared()  # by those who wrote, before the barrier
    gl.thread_barrier()
    _fetch(xs, ws, xp, wp, k + STAGES - 2, BLOCKS)


@gluon.jit
def _unpack(ws, cp, low, k, W: gl.constexpr, MMA: gl.constexpr):
    """Left operand e4m3 [128, 128] of block k."""
    packed = ws.index(k % STAGES).reshape([128, 4, 16]).load(W)
    code = gl.load(cp + k * 4).to(gl.int32)
    shift = (gl.maximum(code - low, 0) * 8).to(gl.uint8)
    _, shift = gl.broadcast(packed, gl.expand_dims(shift, 2))
    a, b = gl.inline_asm_elementwise(
        ASM_E4M3, "=r,=r,r,r", [packed, shift], dtype=(gl.float8e4nv, gl.float8e4nv), is_pure=True, pack=4
    )
    both = gl.reshape(gl.join(a, b), [128, 4, 4, 4, 2])  # row, thread c, word i, j, h
    slots = gl.reshape(gl.permute(both, (0, 2, 4, 1, 3)), [128, 128])
    return gl.convert_layout(slots, gl.DotOperandLayout(0, MMA, 4), assert_trivial=True)


@gluon.jit
def _tile(w_ptr, code_ptr, x_ptr, scale_ptr, row, first, count, padded, K: gl.constexpr, MMA: gl.constexpr):
    """sum over K of w[row] x[first ..] -> float32 [128, 128]; w_ptr and code_ptr are the expert's."""
    W: gl.constexpr = _weights()
    BLOCKS: gl.constexpr = K // 128
    C: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [8, 1], [1, 0])
    D: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [8, 1], [1, 0])
    xs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], gl.NVMMASharedLayout(128, 8))
    ws = gl.allocate_shared_memory(gl.uint8, [STAGES, 128, 64], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    j = gl.minimum(gl.arange(0, 128, gl.SliceLayout(1, C)), count - 1) + first
    xp = x_ptr + j.to(gl.int64)[:, None] * K + gl.arange(0, 128, gl.SliceLayout(0, C))[None, :]
    r = gl.convert_layout(row, gl.SliceLayout(1, D))
    wp = w_ptr + r[:, None] * (K // 2) + gl.arange(0, 64, gl.SliceLayout(0, D))[None, :]
    for early in gl.static_range(STAGES - 2):
        _fetch(xs, ws, xp, wp, early, BLOCKS)
    # the largest code of each row, then the shift of its columns
    g = gl.arange(0, 64, gl.SliceLayout(0, D))
    top = gl.full([128], 0, gl.int32, gl.SliceLayout(1, D))
    for at in range(0, K // 32, 64):
        there = (at + g < K // 32)[None, :]
        codes = gl.load(code_ptr + r[:, None] * (K // 32) + at + g[None, :], mask=there, other=0)
        top = gl.maximum(top, gl.max(codes.to(gl.int32), axis=1))
    L: gl.constexpr = gl.SliceLayout(2, W)
    low = gl.convert_layout(top, gl.SliceLayout(1, L))[:, None] - 11
    cp = code_ptr + gl.convert_layout(row, gl.SliceLayout(1, L))[:, None] * (K // 32)
    cp = cp + gl.arange(0, 4, gl.SliceLayout(0, L))[None, :]
    sp = scale_ptr + first + gl.arange(0, 128, gl.SliceLayout(0, MMA))  # there are 128 more than pairs
    total = gl.zeros([128, 128], gl.float32, MMA)
    zero = gl.zeros([128, 128], gl.float32, MMA)
    UNROLL: gl.constexpr = 1 if BLOCKS % 4 else 4
    for at in range(0, BLOCKS, UNROLL):
        # fragments must not live around the loop, or the compiler takes them apart into bytes
        _arrive(xs, ws, xp, wp, at, BLOCKS)
        a = _unpack(ws, cp, low, at, W, MMA)
        for step in gl.static_range(UNROLL):
            k = at + step
            running = warpgroup_mma(a, xs.index(k % STAGES).permute((1, 0)), zero, use_acc=False, is_async=True)
            s = gl.load(sp + k * padded)
            if step + 1 < UNROLL:
                _arrive(xs, ws, xp, wp, k + 1, BLOCKS)
                a = _unpack(ws, cp, low, k + 1, W, MMA)
            some = warpgroup_mma_wait(0, deps=[running])
            total += some * s[None, :]
    factor = (gl.maximum(gl.convert_layout(top, gl.SliceLayout(1, MMA)) - 6, 1) << 23).to(gl.float32, bitcast=True)
    return total * factor[:, None]


@gluon.jit
def up(
    x_ptr,
    scale_ptr,
    tile_ptr,
    gate_ptr,
    w_ptr,
    code_ptr,
    h_ptr,
    padded,
    limit,
    DIM: gl.constexpr,
    INNER: gl.constexpr,
):
    """Hidden values h [pairs, INNER] bf16, 64 columns of up to 128 sorted pairs of an expert.

    x [pairs, DIM] e4m3 in the order above, scale [DIM / 128, padded] with at least 128
    columns more than pairs, tile [.., 3] int32: expert (-1: none), first
    pair, pairs; gate [pairs] the routing weights.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 32])
    entry = tile_ptr + gl.program_id(1) * 3
    expert = gl.load(entry)
    if expert >= 0:
        first, count = gl.load(entry + 1), gl.load(entry + 2)
        n0 = gl.program_id(0) * 64
        m = gl.arange(0, 128, gl.SliceLayout(1, MMA))
        row = n0 + (m // 16) * 8 + m % 8 + ((m // 8) % 2) * INNER  # a thread's two rows are a gate and its up
        acc = _tile(
            w_ptr + expert.to(gl.int64) * (2 * INNER * (DIM // 2)),
            code_ptr + expert.to(gl.int64) * (2 * INNER * (DIM // 32)),
            *(x_ptr, scale_ptr, row, first, count, padded, DIM, MMA),
        )
        gate, up_ = gl.split(gl.permute(gl.reshape(acc, [8, 2, 8, 128]), (0, 2, 3, 1)))
        gate, up_ = gl.reshape(gate, [64, 128]), gl.reshape(up_, [64, 128])
        L: gl.constexpr = gate.type.layout
        j = gl.arange(0, 128, gl.SliceLayout(0, L))
        weight = gl.load(gate_ptr + first + j, mask=j < count, other=0.0)
        gate = gl.where(gate > limit, limit, gate)
        up_ = gl.where(up_ > limit, limit, gl.where(up_ < -limit, -limit, up_))
        hidden = gate / (1.0 + gl.exp(-gate)) * up_ * weight[None, :]
        n = n0 + gl.arange(0, 64, gl.SliceLayout(1, L))
        at = (first + j).to(gl.int64)[None, :] * INNER + n[:, None]
        gl.store(h_ptr + at, hidden.to(gl.bfloat16), mask=(j < count)[None, :])


@gluon.jit
def down(
    h_ptr,
    scale_ptr,
    tile_ptr,
    w_ptr,
    code_ptr,
    each_ptr,
    padded,
    DIM: gl.constexpr,
    INNER: gl.constexpr,
):
    """each [pairs, DIM] float32, 128 columns of up to 128 sorted pairs; h [pairs, INNER] e4m3 as x above."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 32])
    entry = tile_ptr + gl.program_id(1) * 3
    expert = gl.load(entry)
    if expert >= 0:
        first, count = gl.load(entry + 1), gl.load(entry + 2)
        row = gl.program_id(0) * 128 + gl.arange(0, 128, gl.SliceLayout(1, MMA))
        acc = _tile(
            w_ptr + expert.to(gl.int64) * (DIM * (INNER // 2)),
            code_ptr + expert.to(gl.int64) * (DIM * (INNER // 32)),
            *(h_ptr, scale_ptr, row, first, count, padded, INNER, MMA),
        )
        j = gl.arange(0, 128, gl.SliceLayout(0, MMA))
        at = (first + j).to(gl.int64)[None, :] * DIM + row[:, None]
        gl.store(each_ptr + at, acc, mask=(j < count)[None, :])
