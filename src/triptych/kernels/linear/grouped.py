"""Grouped linear maps of rows that are not rounded, in one launch, bound by the bytes of their weights or the products.

    shared memory   a ring of stages: blocks of 128 columns of 128 rows of weights, e4m3, and of N rows of x, bf16

    fetch      weights and rows on their way into the next empty stage
    multiply   twice, each every other block: weights go through registers, where they become bf16, into the tensor
               cores as left operands; rows are the right ones, as they lie

A weight, four bits and a power of two, is exact in bf16 with its scale in it, so nothing is scaled afterwards, and sums
stay in the tensor cores' registers from the first block to the last.

A tile is 128 outputs, those that share a scale when they are rounded. Programs hold a tile of up to N rows and a part
of the columns, as many as fill the GPU. The last of those that share a tile adds up the parts, in their order; counters
are back at zero afterwards.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from triptych.kernels.barriers import forget
from triptych.kernels.linear.rings import meet, next_place, sums_layout
from triptych.kernels.quant.e4m3 import scale_of

_EXPAND: Any = gl.constexpr(
    """
{
.reg .b32 w;
cvt.u32.u16 w, $2;
prmt.b32 w, w, 0, 0x9180;
shl.b32 w, w, 4;
and.b32 w, w, 0x87f087f0;
mul.bf16x2 w, w, $3;
mov.b32 {$0, $1}, w;
}
"""
)
"""Two e4m3 ($2) to bf16: bytes and their signs in halves of words, moved. Of the 2^120 they lack 2^104 are in $3."""

_LACKING: Any = gl.constexpr(65536.0)
"""What sums lack: with all of it in their scales, weights of scales from 2^8 on would not be numbers of bf16."""


@gluon.constexpr_function
def _pairs():
    """Pairs of columns [64, 64], in the order of a left operand's registers."""
    mine = [[8, 0], [0, 4], [0, 8], [0, 16], [0, 32]]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(mine, lanes, [[16, 0], [32, 0]], [], [64, 64])


@gluon.constexpr_function
def _rows():
    """Sums [n, 128], a row in a warp."""
    return gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])


@gluon.jit
def _fetch(w, x, ring, row, line, column, first, PART: gl.constexpr, STAGES: gl.constexpr):
    """Blocks [first, first + PART) of weights from `row` on, and of rows from `line` on, whose first is `column`."""
    ws, xs, full, empty = ring
    phase = 1  # all places are empty
    place = 0
    for block in range(first, first + PART):
        mbarrier.wait(empty.index(place), phase)
        mbarrier.expect(full.index(place), 128 * (128 + 2 * xs.shape[1]))
        tma.async_copy_global_to_shared(w, [row, block * 128], full.index(place), ws.index(place))
        tma.async_copy_global_to_shared(x, [line, (column + block) * 128], full.index(place), xs.index(place))
        place, phase = next_place(place, phase, STAGES)


@gluon.jit
def _expanded(ws, factor, HALF: gl.constexpr, MMA: gl.constexpr):
    """Half of a block of weights [128, 128] e4m3 times a scale: the left operand, bf16 [64, 128], 2^-16 of it."""
    pairs = ws._reinterpret(gl.int16, [128, 64], gl.NVMMASharedLayout(128, 16)).slice(HALF * 64, 64, 0).load(_pairs())
    both = (factor * 2.028240960365167e31).to(gl.int32, bitcast=True).to(gl.uint32, bitcast=True) >> 16
    both |= both << 16
    low, high = gl.inline_asm_elementwise(
        _EXPAND, "=h,=h,h,r", [pairs, both], dtype=(gl.bfloat16,) * 2, is_pure=True, pack=1
    )
    whole = gl.reshape(gl.join(low, high), [64, 128])
    return gl.convert_layout(whole, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.jit
def _part(f_ptr, ring, WHO: gl.constexpr, PART: gl.constexpr, STAGES: gl.constexpr):
    """Sums of a tile over every other of PART blocks, those of the ring: twice float32 [64, N]. Scales are at f_ptr."""
    ws, xs, full, empty = ring
    N: gl.constexpr = xs.shape[1]
    MMA: gl.constexpr = sums_layout(N, 16)
    low = gl.zeros([64, N], gl.float32, MMA)
    high = gl.zeros([64, N], gl.float32, MMA)
    place = 0
    phase = 0
    if WHO == 1:
        place, phase = next_place(place, phase, STAGES)
    scale = gl.load(f_ptr + gl.minimum(WHO, PART - 1))
    for block in range(WHO, PART, 2):
        mbarrier.wait(full.index(place), phase)
        x = xs.index(place).permute((1, 0))
        w = _expanded(ws.index(place), scale, 0, MMA)
        low = warpgroup_mma(w, x, low, is_async=True)
        w = _expanded(ws.index(place), scale, 1, MMA)  # while the tensor cores are busy
        high = warpgroup_mma(w, x, high, is_async=True)
        scale = gl.load(f_ptr + gl.minimum(block + 2, PART - 1))  # of the next block, asked for early
        low, high = warpgroup_mma_wait(0, deps=[low, high])
        gl.thread_barrier()  # all warps have read the stage
        mbarrier.arrive(empty.index(place), count=1)
        place, phase = next_place(place, phase, STAGES)
        place, phase = next_place(place, phase, STAGES)
    return low, high


@gluon.jit
def _halves(low, high, sums, met, WHO: gl.constexpr):
    """Of what both warpgroups have summed, half of the rows: float32 [N / 2, 128]."""
    N: gl.constexpr = low.shape[1]
    meet(met.index(0))  # nobody needs the ring any more, in whose place the sums are
    mine = sums.index(WHO)
    mine.slice(0, 64, 1).store(gl.permute(low, (1, 0)))
    mine.slice(64, 64, 1).store(gl.permute(high, (1, 0)))
    meet(met.index(1))
    one = sums.index(0).slice(WHO * (N // 2), N // 2, 0).load(_rows())
    other = sums.index(1).slice(WHO * (N // 2), N // 2, 0).load(_rows())
    return (one + other) * _LACKING


@gluon.jit
def _whole(acc, outputs, where, WHO: gl.constexpr, SPLIT: gl.constexpr):
    """The sums of all parts of half of a tile, and whether they are: only the last program of the tile has them."""
    _, _, _, _, part_ptr, count_ptr = outputs
    _, split, place, _, _ = where
    HALF: gl.constexpr = acc.shape[0]
    n = gl.arange(0, 128, gl.SliceLayout(0, _rows()))
    j = WHO * HALF + gl.arange(0, HALF, gl.SliceLayout(1, _rows()))
    at = j[:, None] * 128 + n[None, :]
    part_ptr += place * (SPLIT * HALF * 256)
    gl.store(part_ptr + split * (HALF * 256) + at, acc)
    gl.thread_barrier()
    count_ptr += place * 2 + WHO
    whole = gl.atomic_add(count_ptr, 1, sem="acq_rel") == SPLIT - 1
    if whole:
        total = gl.zeros([HALF, 128], gl.float32, _rows())
        for i in gl.static_range(SPLIT):
            theirs = part_ptr + i * (HALF * 256) + at
            more = gl.load(theirs, mask=(at >= 0) & (i != split), other=0.0, cache_modifier=".cg")
            total += gl.where(i == split, acc, more)
        acc = total
        gl.store(count_ptr, 0)
    return acc, whole


@gluon.jit
def _store(acc, outputs, where, WHO: gl.constexpr, OUT: gl.constexpr, ROUND: gl.constexpr):
    """Half of a tile. ROUND: bf16 first, as the activations that they are, then e4m3 and scales."""
    out_ptr, scale_ptr, s_row, s_group, _, _ = outputs
    tile, _, _, line, rows = where
    HALF: gl.constexpr = acc.shape[0]
    n = gl.arange(0, 128, gl.SliceLayout(0, _rows()))
    j = line + WHO * HALF + gl.arange(0, HALF, gl.SliceLayout(1, _rows()))
    if ROUND:
        acc = acc.to(gl.bfloat16).to(gl.float32)
        scale, inverse = scale_of(gl.max(gl.abs(acc), 1))
        gl.store(scale_ptr + j * s_row + tile * s_group, scale, mask=j < rows)
        acc *= inverse[:, None]
    at = tile * 128 + j[:, None] * OUT + n[None, :]
    keep = (j < rows)[:, None] & (n >= 0)[None, :]
    gl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=keep)


@gluon.jit
def _multiply(
    f_ptr, outputs, ring, shared, where,
    WHO: gl.constexpr, OUT: gl.constexpr, PART: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr,
    ROUND: gl.constexpr,
):  # fmt: skip
    """Every other block of a part of the columns, then half of the rows."""
    sums, met = shared
    low, high = _part(f_ptr, ring, WHO, PART, STAGES)
    acc = _halves(low, high, sums, met, WHO)
    if SPLIT == 1:
        _store(acc, outputs, where, WHO, OUT, ROUND)
    else:
        acc, whole = _whole(acc, outputs, where, WHO, SPLIT)
        if whole:
            _store(acc, outputs, where, WHO, OUT, ROUND)


@gluon.jit(do_not_specialize=["rows", "s_row", "s_group"])
def products(
    w, f_ptr, x, out_ptr, scale_ptr, part_ptr, count_ptr, rows, s_row, s_group,
    K: gl.constexpr, OUT: gl.constexpr, GROUP: gl.constexpr, SPLIT: gl.constexpr, N: gl.constexpr,
    STAGES: gl.constexpr, ROUND: gl.constexpr,
):  # fmt: skip
    """out [rows, OUT] of x by an FP8 matrix, 128 rows of which share a scale. w and x are descriptors, x of bf16.

    Every GROUP outputs have their own K columns of x. ROUND: out are e4m3 values, and scale [rows, OUT / 128] their
    scales. part [tiles, SPLIT, N, 128] float32 is scratch. Tiles have N rows; STAGES are even.
    """
    PART: gl.constexpr = K // 128 // SPLIT
    ws = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], gl.NVMMASharedLayout(128, 8))
    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, N, 128], gl.NVMMASharedLayout(128, 16))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    met = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    for s in gl.static_range(2):
        mbarrier.init(met.index(s), count=2)
    fence_async_shared()
    # places of rows are free when sums are exchanged: two of 512 bytes a row in four of 256
    sums = xs._reinterpret(gl.float32, [STAGES // 2, N, 128], gl.SwizzledSharedLayout(8, 2, 4, [1, 0]))
    down = (rows + N - 1) // N  # tiles of rows, of which those that have the same weights run together
    line, split = gl.program_id(0) % down, gl.program_id(0) // down % SPLIT
    tile = gl.program_id(0) // down // SPLIT
    place = tile * down + line
    line *= N
    ring = (ws, xs, full, empty)
    outputs = (out_ptr, scale_ptr, s_row, s_group, part_ptr, count_ptr)
    shared = (sums, met)
    f_ptr += (tile * SPLIT + split) * PART
    where = (tile, split, place, line, rows)
    gl.warp_specialize(
        [
            (_multiply, (f_ptr, outputs, ring, shared, where, 0, OUT, PART, SPLIT, STAGES, ROUND)),
            (_multiply, (f_ptr, outputs, ring, shared, where, 1, OUT, PART, SPLIT, STAGES, ROUND)),
            (_fetch, (w, x, ring, tile * 128, line, tile * 128 // GROUP * (K // 128), split * PART, PART, STAGES)),
        ],
        [4, 1],
        [232, 40],
    )
    forget(full, STAGES)
    forget(empty, STAGES)
    forget(met, 2)
