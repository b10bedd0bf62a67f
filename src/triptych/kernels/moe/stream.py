"""Products of few rows and tiles of MXFP4 (quant/tiles.py), streamed from memory into the FP8 tensor cores.

A product is computed turned over, W x^T: expanded weights are its left operand, in registers, and up to eight rows of x
its right one, in shared memory for as long as a program lives. Bulk copies fetch several blocks of weights and their
scales ahead. A block of 128 columns is summed apart and scaled in float32, since the tensor cores keep few bits of an
e4m3 sum; its product is on its way while the weights of the next are expanded.
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

ASM_E4M3: Any = gl.constexpr(
    """
{
.reg .b32 s, t;
and.b32 s, $2, 0x77777777;
prmt.b32 t, $7, $3, s;
lop3.b32 $0, $2, 0x80808080, t, 0xea;
shr.u32 s, s, 16;
prmt.b32 t, $7, $3, s;
shl.b32 s, $2, 4;
lop3.b32 $1, s, 0x80808080, t, 0xea;
}
"""
)
"""A word of a tile ($2) to twice four e4m3: a table of bytes has the magnitudes, 0 to 3 in $7 and 4 to 7 in $3."""


@gluon.constexpr_function
def _value_layout(tiles):
    """Bytes [tiles, 32, 128] of a block: of its tile a thread has two times 16."""
    deep = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], [0, 16, 0]]
    lanes = [[0, 0, 16], [0, 0, 32], [0, 0, 64], [0, 1, 0], [0, 2, 0]]
    return gl.DistributedLinearLayout(deep, lanes, [[0, 4, 0], [0, 8, 0], *_more(tiles)], [], [tiles, 32, 128])


@gluon.constexpr_function
def _scale_layout(tiles, blocks):
    """Bytes [tiles, 2 * blocks, 128] of neighbouring blocks' scales: of its tile a thread has two of each block."""
    deep = [[0, 0, 1]] + [[0, 2 << i, 0] for i in range(blocks.bit_length() - 1)]
    lanes = [[0, 0, 2], [0, 0, 4], [0, 0, 8], [0, 0, 16], [0, 0, 32]]
    warps = [[0, 0, 64], [0, 1, 0], *_more(tiles)]
    return gl.DistributedLinearLayout(deep, lanes, warps, [], [tiles, 2 * blocks, 128])


@gluon.constexpr_function
def _more(tiles):
    return [[1 << i, 0, 0] for i in range(tiles.bit_length() - 1)]


@gluon.constexpr_function
def factor_layout(tiles, blocks):
    """[8, blocks] float32 scales of rows: a thread has those of the two rows that it has of the result."""
    deep = [[1, 0]] + [[0, 1 << i] for i in range(blocks.bit_length() - 1)]
    lanes = [[2, 0], [4, 0], [0, 0], [0, 0], [0, 0]]
    return gl.DistributedLinearLayout(deep, lanes, [[0, 0]] * (1 + tiles.bit_length()), [], [8, blocks])


@gluon.constexpr_function
def rows_layout(tiles):
    """[blocks, 8, 128] e4m3 of rows on their way into shared memory."""
    return gl.BlockedLayout([1, 1, 16], [1, 4, 8], [2 * tiles, 2, 1], [2, 1, 0])


@gluon.jit
def nth(x, i: gl.constexpr, COUNT: gl.constexpr):
    """x[.., i] of [.., COUNT], 1, 2 or 4, without moving anything."""
    if COUNT == 1:
        return gl.reshape(x, x.shape[:-1])
    elif COUNT == 2:
        a, b = gl.split(x)
        if i == 0:
            return a
        else:
            return b
    else:
        a, b = gl.split(gl.reshape(x, x.shape[:-1] + [2, 2]))  # noqa: RUF005  even and odd ones
        if i % 2 == 0:
            return nth(a, i // 2, 2)
        else:
            return nth(b, i // 2, 2)


@gluon.jit
def shifts(scales, TILES: gl.constexpr, KS: gl.constexpr):
    """Scales' distances in shared memory [TILES, 2 KS, 128] -> int32 [TILES, 2, 4, 4, 2, 4, KS], how far exponents of
    e4m3 are raised: 11 for a row's largest scale, 0 for those 2^11 below it and for any further below."""
    below = gl.maximum(11 - scales.load(_scale_layout(TILES, KS)).to(gl.int32), 0)
    # tile, block, w1 | w0, r4, r2, c, half of rows
    below = gl.permute(gl.reshape(below, [TILES, KS, 2, 2, 4, 2, 4, 2]), (0, 7, 2, 3, 4, 5, 6, 1))
    return gl.reshape(below, [TILES, 2, 4, 4, 2, 4, KS])


@gluon.jit
def expand(tile, shift, STEP: gl.constexpr, KS: gl.constexpr, TILES: gl.constexpr, MMA: gl.constexpr):
    """A block in shared memory [TILES, 32, 128] -> the left operand e4m3 [64 TILES, 128]; see shifts."""
    packed = gl.reshape(tile.load(_value_layout(TILES)), [TILES, 2, 4, 4, 2, 4, 4, 4])  # tile half w r4 r2 c i place
    L: gl.constexpr = packed.type.layout
    shift = gl.convert_layout(nth(shift, STEP, KS), gl.SliceLayout(6, gl.SliceLayout(7, L)), assert_trivial=True)
    high = shift * 0x08080808 + 0x24201C18
    low = shift * 0x08080800 + 0x14100800
    _, high = gl.broadcast(packed, gl.expand_dims(gl.expand_dims(high, 6), 7))
    _, low = gl.broadcast(packed, gl.expand_dims(gl.expand_dims(low, 6), 7))
    a, b = gl.inline_asm_elementwise(
        ASM_E4M3,
        "=r,=r,r,r,r,r,r,r,r,r,r",
        [packed, high, low],
        dtype=(gl.float8e4nv, gl.float8e4nv),
        is_pure=True,
        pack=4,
    )
    # tile w half r4 r2, then i h c place
    slots = gl.reshape(gl.permute(gl.join(a, b), (0, 2, 1, 3, 4, 6, 8, 5, 7)), [64 * TILES, 128])
    return gl.convert_layout(slots, gl.DotOperandLayout(0, MMA, 4), assert_trivial=True)


@gluon.jit
def _fetch(values, scales, ws, es, bar, row, chunk, s, KS: gl.constexpr, TILES: gl.constexpr):
    """Blocks [KS chunk, KS chunk + KS) of row tiles [row, row + TILES), on their way into stage s."""
    mbarrier.expect(bar.index(s), TILES * KS * (4096 + 256))
    tma.async_copy_global_to_shared(values, [row, chunk * KS * 32, 0], bar.index(s), ws.index(s))
    tma.async_copy_global_to_shared(scales, [row, chunk * KS * 2, 0], bar.index(s), es.index(s))


@gluon.jit
def stages(KS: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory for tiles and for scales, and what says that they came."""
    ws = gl.allocate_shared_memory(gl.uint8, [STAGES, TILES, KS * 32, 128], gl.NVMMASharedLayout(128, 8, rank=3))
    es = gl.allocate_shared_memory(
        gl.uint8, [STAGES, TILES, KS * 2, 128], gl.NVMMASharedLayout(0 if KS < 4 else 128, 8, rank=3)
    )
    bar = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(bar.index(s), count=1)
    fence_async_shared()
    gl.thread_barrier()
    return ws, es, bar


@gluon.jit
def begin(values, scales, ws, es, bar, it, row, KS: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr):
    """The first chunks of row tiles [row, row + TILES) on their way, as many as there are stages; `it` came before."""
    for s in gl.static_range(STAGES):
        _fetch(values, scales, ws, es, bar, row, s, (it + s) % STAGES, KS, TILES)


@gluon.jit
def multiply(
    values, scales, ws, es, bar, it, row, next_row, xs, fs, top,
    K: gl.constexpr, KS: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr, MMA: gl.constexpr,
    SHARE: gl.constexpr = 1,
):  # fmt: skip
    """sum over K of row tiles [row, row + TILES) times x -> float32 [64 TILES, 8]; its first chunks are on their way,
    and those of `next_row` are then, unless it is -1. `it` chunks of KS blocks came before.

    xs [K / 128 / SHARE, 8, 128] e4m3 in shared memory, in slots, each for SHARE blocks (operands.py), and fs
    [.., 8, KS] float32, the scales of x's blocks; top [64 TILES] are the rows' largest codes. No more STAGES than
    chunks.
    """
    CHUNKS: gl.constexpr = K // 128 // KS
    A: gl.constexpr = gl.SliceLayout(0, MMA)
    acc = gl.zeros([64 * TILES, 8], gl.float32, MMA)
    zero = gl.zeros([64 * TILES, 8], gl.float32, MMA)
    for chunk in range(0, CHUNKS):
        s = (it + chunk) % STAGES
        mbarrier.wait(bar.index(s), ((it + chunk) // STAGES) & 1)
        shift = shifts(es.index(s), TILES, KS)
        factors = fs.index(chunk).load(factor_layout(TILES, KS))
        before = zero
        for step in gl.static_range(KS):
            a = expand(ws.index(s).slice(step * 32, 32, 1), shift, step, KS, TILES, MMA)
            x = xs.index((chunk * KS + step) // SHARE).permute((1, 0))
            running = warpgroup_mma(a, x, zero, use_acc=False, is_async=True)
            if step > 0:
                # the next product is on its way before the last one's sum is taken: ptxas would wait first otherwise
                part = warpgroup_mma_wait(1, deps=[before])
                acc += part * gl.convert_layout(nth(factors, step - 1, KS), A, assert_trivial=True)[None, :]
            before = running
        gl.thread_barrier()
        if chunk + STAGES < CHUNKS:
            _fetch(values, scales, ws, es, bar, row, chunk + STAGES, s, KS, TILES)
        elif next_row >= 0:
            _fetch(values, scales, ws, es, bar, next_row, chunk + STAGES - CHUNKS, s, KS, TILES)
        last = gl.convert_layout(nth(factors, KS - 1, KS), A, assert_trivial=True)
        part = warpgroup_mma_wait(0, deps=[before])
        acc += part * last[None, :]
    raised = (gl.maximum(top.to(gl.int32) - 6, 1) << 23).to(gl.float32, bitcast=True)
    return acc * raised[:, None]


@gluon.jit
def rows_in_slots(x_ptr, row, wanted, K: gl.constexpr, TILES: gl.constexpr):
    """x[row] of x [.., K] e4m3 in shared memory [K / 128, 8, 128], the columns of each block in slots.

    row and wanted [8] in the layout SliceLayout(0, SliceLayout(2, rows_layout(TILES)))."""
    B: gl.constexpr = rows_layout(TILES)
    SOME: gl.constexpr = _together(K // 128)
    room = gl.allocate_shared_memory(gl.float8e4nv, [K // 128 // SOME, SOME * 8, 128], gl.NVMMASharedLayout(128, 8))
    b = gl.arange(0, SOME, gl.SliceLayout(1, gl.SliceLayout(2, B)))
    d = gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(1, B)))
    inside = gl.expand_dims(b[:, None] * 128, 2) + gl.expand_dims(d[None, :], 1)
    xp = x_ptr + gl.expand_dims((row * K)[None, :], 2) + inside
    mask = gl.expand_dims(wanted[None, :], 2) & (inside >= 0)
    for at in gl.static_range(K // 128 // SOME):
        x = gl.load(xp + at * (SOME * 128), mask=mask, other=0).to(gl.float8e4nv, bitcast=True)
        x = gl.permute(gl.reshape(x, [SOME, 8, 4, 4, 2, 4]), (0, 1, 3, 4, 2, 5))  # c, i, h -> i, h, c
        room.index(at).store(gl.reshape(x, [SOME * 8, 128]))
    return room._reinterpret(gl.float8e4nv, [K // 128, 8, 128], gl.NVMMASharedLayout(128, 8))


@gluon.jit
def scales_of_rows(
    ptr, stride, order_ptr, count, K: gl.constexpr, KS: gl.constexpr, TOPK: gl.constexpr, TILES: gl.constexpr
):
    """Scales of the rows order[j] / TOPK, j < count <= 8, in shared memory [chunks, 8, KS] float32, by chunks of KS
    blocks; ptr [K / 128, stride]."""
    CHUNKS: gl.constexpr = _power_of_two(K // 128) // KS
    L: gl.constexpr = gl.BlockedLayout([1, 1, 1], [4 // KS, 8, KS], [4 * TILES, 1, 1], [2, 1, 0])
    room = gl.allocate_shared_memory(gl.float32, [CHUNKS, 8, KS], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    c = gl.arange(0, CHUNKS, gl.SliceLayout(1, gl.SliceLayout(2, L)))
    j = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, L)))
    b = gl.arange(0, KS, gl.SliceLayout(0, gl.SliceLayout(1, L)))
    row = gl.load(order_ptr + j, mask=j < count, other=0) // TOPK
    block = gl.expand_dims(c[:, None] * KS, 2) + gl.expand_dims(b[None, :], 1)
    there = (block < K // 128) & gl.expand_dims((j < count)[None, :], 2)
    room.store(gl.load(ptr + block * stride + gl.expand_dims(row[None, :], 2), mask=there, other=0.0))
    return room._reinterpret(gl.float32, [CHUNKS, 8, KS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.constexpr_function
def _power_of_two(count):
    """The least one that is no less."""
    return 1 << (count - 1).bit_length()


@gluon.constexpr_function
def _together(blocks):
    """How many of a row's blocks are loaded at once: a power of two that divides them, 32 at most."""
    return min(32, blocks & -blocks)
