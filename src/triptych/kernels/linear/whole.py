"""Grouped linear maps of few rows that are not rounded, in one launch: each weight is read once.

Bulk copies bring blocks of 128 columns of weights and rows into shared memory, from where both go into registers in the
order of the tensor cores' operands, as f16.

Programs hold 64 outputs and a part of the columns, as many as fill the GPU. The last of those that share outputs adds
up the parts, in their order, and rounds 128 outputs for the product that reads them; counters are back at zero
afterwards.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from triptych.kernels.barriers import forget, read_by_all
from triptych.kernels.quant.e4m3 import scale_of
from triptych.kernels.quant.fragments import from_fp8, from_rows, mma_layout, weight_layout

WARPS = gl.constexpr(4)


@gluon.constexpr_function
def _rows(n):
    """[2, n, 64], 128 columns of rows in halves: a thread has 32 columns in a row, the same in every warp."""
    deep = [[0, 0, 1 << i] for i in range(5)] + [[0, 8 << i, 0] for i in range((n // 8).bit_length() - 1)]
    lanes = [[0, 0, 32], [1, 0, 0], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(deep, lanes, [[0, 0, 0]] * 2, [], [2, n, 64])


@gluon.jit
def _fetch(w, x, ws, xs, bar, row, column, block, s, KS: gl.constexpr, N: gl.constexpr):
    """KS blocks of 128 columns of 64 rows of weights and of the rows of x, from `block` on, on their way to stage s."""
    mbarrier.expect(bar.index(s), KS * 128 * (64 + 2 * N))
    for i in gl.static_range(KS):
        tma.async_copy_global_to_shared(w, [row, (block + i) * 128], bar.index(s), ws.index(s * KS + i))
        tma.async_copy_global_to_shared(x, [(column + block + i) * 2, 0, 0], bar.index(s), xs.index(s * KS + i))


@gluon.jit
def _part(
    w, x, ws, xs, bar, fp, row, column, first,
    PART: gl.constexpr, N: gl.constexpr, KS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Products of blocks [first, first + PART) of 128 columns, the first on their way: float32 [64, N].

    fp [64] points at the weights' scales of the first block, x's blocks begin at `column`."""
    MMA: gl.constexpr = mma_layout(WARPS)
    WORDS: gl.constexpr = gl.NVMMASharedLayout(128, 32)
    STEPS: gl.constexpr = PART // KS
    acc = gl.zeros([64, N], gl.float32, MMA)
    zero = gl.zeros([64, N], gl.float32, MMA)
    f0 = gl.load(fp)
    for step in range(0, STEPS):
        s = step % STAGES
        mbarrier.wait(bar.index(s), (step // STAGES) & 1)
        for i in gl.static_range(KS):
            at = step * KS + i + 1  # the next block, whose scales are asked for early
            f = f0
            f0 = gl.load(fp + at, mask=at < PART, other=0.0)
            words = ws.index(s * KS + i)._reinterpret(gl.int32, [64, 32], WORDS).load(weight_layout())
            some = xs.index(s * KS + i).load(_rows(N)).to(gl.float32)
            some = gl.minimum(gl.maximum(some, -65504.0), 65504.0)  # bf16 of any likely size is exact in f16
            some = gl.reshape(gl.permute(some.to(gl.float16), (1, 0, 2)), [N, 4, 32])
            right = from_rows(some, N, MMA)
            acc += mma_v2(from_fp8(gl.reshape(words, [64, 4, 8]), 64, MMA), right, zero) * f[:, None]
        read_by_all()
        if step + STAGES < STEPS:
            _fetch(w, x, ws, xs, bar, row, column, first + (step + STAGES) * KS, s, KS, N)
    return acc


@gluon.jit(do_not_specialize=["rows"])
def products(
    w, f_ptr, x, out_ptr, scale_ptr, part_ptr, count_ptr, rows,
    K: gl.constexpr, OUT: gl.constexpr, GROUP: gl.constexpr, SPLIT: gl.constexpr, TALL: gl.constexpr,
    ROUND: gl.constexpr, N: gl.constexpr, KS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out [rows, OUT] of x by an FP8 matrix, TALL rows of which share a scale. w and x are descriptors, x of bf16 rows
    in halves of blocks, [.. / 64, rows, 64].

    Every GROUP outputs have their own K columns of x. ROUND: out are e4m3 values, and scale [rows, OUT / 128] their
    scales. part [SPLIT, rows, OUT] float32 is scratch.
    """
    MMA: gl.constexpr = mma_layout(WARPS)
    PART: gl.constexpr = K // 128 // SPLIT
    ws = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * KS, 64, 128], gl.NVMMASharedLayout(128, 8))
    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES * KS, 2, N, 64], gl.NVMMASharedLayout(128, 16, rank=3))
    bar = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(bar.index(s), count=1)
    fence_async_shared()
    gl.thread_barrier()
    tile, split = gl.program_id(0) // SPLIT, gl.program_id(0) % SPLIT
    n0 = tile * 64
    first = split * PART
    column = n0 // GROUP * (K // 128)
    for s in gl.static_range(STAGES):
        _fetch(w, x, ws, xs, bar, n0, column, first + s * KS, s, KS, N)
    n = n0 + gl.arange(0, 64, gl.SliceLayout(1, MMA))
    fp = f_ptr + n // TALL * (K // 128) + first
    acc = _part(w, x, ws, xs, bar, fp, n0, column, first, PART, N, KS, STAGES)
    j = gl.arange(0, N, gl.SliceLayout(0, MMA))
    keep = (j < rows)[None, :] & (n < OUT)[:, None]
    at = j[None, :] * OUT + n[:, None]
    HALVES: gl.constexpr = 2 if ROUND else 1  # tiles of 64 outputs that are finished together
    if SPLIT * HALVES == 1:
        gl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=keep)
    else:
        gl.store(part_ptr + split * rows * OUT + at, acc, mask=keep)
        gl.thread_barrier()
        mine = count_ptr + tile // HALVES
        if gl.atomic_add(mine, 1, sem="acq_rel") == SPLIT * HALVES - 1:
            at -= tile % HALVES * 64
            total = _total(part_ptr + at, rows * OUT, keep, SPLIT)
            if ROUND:
                other = _total(part_ptr + at + 64, rows * OUT, keep, SPLIT)
                scale_at = scale_ptr + j * (OUT // 128) + n0 // 128
                _store_rounded(total, other, out_ptr + at, scale_at, j < rows)
            else:
                gl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=keep)
            gl.store(mine, 0)
    forget(bar, STAGES)


@gluon.jit
def _store_rounded(low, high, out_ptr, scale_ptr, there):
    """Outputs [64, N] and the 64 behind them, bf16 first as the activations that they are, then e4m3 and their scales.

    There are only rows `there` [N]."""
    low, high = low.to(gl.bfloat16).to(gl.float32), high.to(gl.bfloat16).to(gl.float32)
    scale, inverse = scale_of(gl.maximum(gl.max(gl.abs(low), 0), gl.max(gl.abs(high), 0)))
    gl.store(scale_ptr, scale, mask=there)
    gl.store(out_ptr, (low * inverse[None, :]).to(gl.float8e4nv), mask=there[None, :])
    gl.store(out_ptr + 64, (high * inverse[None, :]).to(gl.float8e4nv), mask=there[None, :])


@gluon.jit
def _total(part_ptr, stride, keep, SPLIT: gl.constexpr):
    """The parts at part_ptr [64, N], `stride` apart, added up in their order."""
    total = gl.load(part_ptr, mask=keep, other=0.0, cache_modifier=".cg")
    for s in gl.static_range(1, SPLIT):
        total += gl.load(part_ptr + s * stride, mask=keep, other=0.0, cache_modifier=".cg")
    return total
