"""Linear maps of dozens of rounded rows with many outputs of few columns, in one launch, near what the bytes of its
weights take.

    shared memory   all of the rows, which every tile meets | scales | two rings of blocks of 128 columns of 64 weights

    fetch      weights on their way into the next empty places, in turn for the two
    multiply   twice, each a tile of 64 outputs at a time: blocks on the tensor cores, scaled in float32 and added up;
               while one stores a tile, the other multiplies and weights of the next ones come

A program has a stretch of tiles, which it computes as W x^T.
"""

from __future__ import annotations

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
from triptych.kernels.linear.rings import meet, next_place, side_by_side, sums_layout


@gluon.jit
def _fetch(w, x, ring, xs, begin, end, STAGES: gl.constexpr):
    """All rows, and weights of tiles [begin, end), of two tiles in turn."""
    ws, full, empty, here = ring
    BLOCKS: gl.constexpr = xs.shape[0]
    mbarrier.expect(here, BLOCKS * xs.shape[1] * 128)
    for i in gl.static_range(BLOCKS):
        tma.async_copy_global_to_shared(x, [0, i * 128], here, xs.index(i))
    place = 0
    phase = 1  # all places are empty
    for tile in range(begin, end, 2):
        for b in range(0, BLOCKS):
            for h in gl.static_range(2):
                if tile + h < end:
                    at = h * STAGES + place
                    mbarrier.wait(empty.index(at), phase)
                    mbarrier.expect(full.index(at), 64 * 128)
                    tma.async_copy_global_to_shared(w, [(tile + h) * 64, b * 128], full.index(at), ws.index(at))
            place, phase = next_place(place, phase, STAGES)


@gluon.jit
def _keep_factors(factors, scales, rows, begin, end, met, HALF: gl.constexpr, BLOCKS: gl.constexpr):
    """Scales of rows times those of weights, of all blocks of the tiles, brought at once: one after the other would
    each take the time of a load."""
    f_ptr, s_ptr, s_row, s_group = scales
    MANY: gl.constexpr = factors.shape[1]
    N: gl.constexpr = factors.shape[2]
    L: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    e = HALF * MANY + gl.arange(0, MANY, gl.SliceLayout(1, L))
    j = gl.minimum(gl.arange(0, N, gl.SliceLayout(0, L)), rows - 1)
    last = ((end - 1) // 2 + 1) * BLOCKS - 1
    f = gl.load(f_ptr + gl.minimum(begin // 2 * BLOCKS + e, last))
    s = gl.load(s_ptr + (e % BLOCKS * s_group)[:, None] + (j * s_row)[None, :])
    factors.index(HALF).store(s * f[:, None])
    meet(met)


@gluon.jit
def _multiply(
    scales, out_ptr, rows, begin, end, ring, xs, factors, met,
    HALF: gl.constexpr, OUT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Every other one of the tiles [begin, end)."""
    ws, full, empty, here = ring
    BLOCKS: gl.constexpr = xs.shape[0]
    N: gl.constexpr = xs.shape[1]
    MMA: gl.constexpr = sums_layout(N)
    MANY: gl.constexpr = factors.shape[1]
    _keep_factors(factors, scales, rows, begin, end, met, HALF, BLOCKS)
    table = factors._reinterpret(gl.float32, [2 * MANY, N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    mbarrier.wait(here, 0)
    zero = gl.zeros([64, N], gl.float32, MMA)
    place = 0
    phase = 0
    for tile in range(begin + HALF, end, 2):
        acc = gl.zeros([64, N], gl.float32, MMA)
        entry = (tile // 2 - begin // 2) * BLOCKS
        for b in range(0, BLOCKS, 2):
            one = HALF * STAGES + place
            mbarrier.wait(full.index(one), phase)
            first = warpgroup_mma(ws.index(one), xs.index(b).permute((1, 0)), zero, use_acc=False, is_async=True)
            place, phase = next_place(place, phase, STAGES)
            two = HALF * STAGES + place
            mbarrier.wait(full.index(two), phase)
            second = warpgroup_mma(ws.index(two), xs.index(b + 1).permute((1, 0)), zero, use_acc=False, is_async=True)
            place, phase = next_place(place, phase, STAGES)
            part = warpgroup_mma_wait(1, deps=[first])
            gl.thread_barrier()  # all warps have read the block
            mbarrier.arrive(empty.index(one), count=1)
            acc += part * table.index(entry + b).load(gl.SliceLayout(0, MMA))[None, :]
            part = warpgroup_mma_wait(0, deps=[second])
            gl.thread_barrier()
            mbarrier.arrive(empty.index(two), count=1)
            acc += part * table.index(entry + b + 1).load(gl.SliceLayout(0, MMA))[None, :]
        B: gl.constexpr = side_by_side(2)
        y = gl.convert_layout(acc.to(gl.bfloat16), B)
        j = gl.arange(0, N, gl.SliceLayout(0, B))
        n = gl.arange(0, 64, gl.SliceLayout(1, B))
        keep = (j < rows)[None, :] & (n >= 0)[:, None]
        gl.store(out_ptr + tile * 64 + j[None, :] * OUT + n[:, None], y, mask=keep)


@gluon.jit(do_not_specialize=["rows", "s_row", "s_group"])
def products(
    w, f_ptr, x, s_ptr, out_ptr, rows, s_row, s_group,
    K: gl.constexpr, OUT: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, MANY: gl.constexpr,
):  # fmt: skip
    """out [rows, OUT] bf16 of up to N rows x by an FP8 matrix. w and x are descriptors, x of e4m3 rows, s their scales.

    A program has blocks of up to 2 * MANY scales of weights."""
    BLOCKS: gl.constexpr = K // 128
    ws = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, 64, 128], gl.NVMMASharedLayout(128, 8))
    xs = gl.allocate_shared_memory(gl.float8e4nv, [BLOCKS, N, 128], gl.NVMMASharedLayout(128, 8))
    factors = gl.allocate_shared_memory(gl.float32, [2, MANY, N], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    met = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for s in gl.static_range(2 * STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    mbarrier.init(here, count=1)
    mbarrier.init(met, count=2)
    fence_async_shared()
    tiles = OUT // 64
    begin = gl.program_id(0) * tiles // gl.num_programs(0)
    end = (gl.program_id(0) + 1) * tiles // gl.num_programs(0)
    ring = (ws, full, empty, here)
    scales = (f_ptr, s_ptr, s_row, s_group)
    gl.warp_specialize(
        [
            (_multiply, (scales, out_ptr, rows, begin, end, ring, xs, factors, met, 0, OUT, STAGES)),
            (_multiply, (scales, out_ptr, rows, begin, end, ring, xs, factors, met, 1, OUT, STAGES)),
            (_fetch, (w, x, ring, xs, begin, end, STAGES)),
        ],
        [4, 1],
        [232, 40],
    )
    forget(full, 2 * STAGES)
    forget(empty, 2 * STAGES)
    mbarrier.invalidate(here)
    mbarrier.invalidate(met)
