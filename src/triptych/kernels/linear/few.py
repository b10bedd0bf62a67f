"""Linear maps of few rounded rows (decode) in one launch, bound by the bytes of their weights.

A product is computed turned over, W x^T, on the FP8 tensor cores: bulk copies bring blocks of 128 columns of weights
and of rounded rows into shared memory as they are, and nothing is converted on the way. Each block is summed apart and
scaled in float32, since the tensor cores keep few bits of an e4m3 sum.

Programs hold TALL outputs and a part of the columns, as many as fill the GPU. The last of those that share outputs adds
up the parts, in their order; counters are back at zero afterwards.
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
from triptych.kernels.linear.rings import sums_layout


@gluon.constexpr_function
def _factors(n, blocks):
    """[n, blocks] float32: a thread has those of the rows that it has of sums_layout(n)."""
    deep = [[0, 1 << i] for i in range(blocks.bit_length() - 1)]
    deep += [[1, 0]] + [[8 << i, 0] for i in range((n // 8).bit_length() - 1)]
    return gl.DistributedLinearLayout(deep, [[2, 0], [4, 0], [0, 0], [0, 0], [0, 0]], [[0, 0], [0, 0]], [], [n, blocks])


@gluon.jit
def _nth(x, i: gl.constexpr, COUNT: gl.constexpr):
    """x[:, i] of [n, COUNT], a power of two, without moving anything."""
    if COUNT == 1:
        return gl.reshape(x, x.shape[:-1])
    else:
        even, odd = gl.split(gl.reshape(x, x.shape[:-1] + [COUNT // 2, 2]))  # noqa: RUF005
        if i % 2 == 0:
            return _nth(even, i // 2, COUNT // 2)
        else:
            return _nth(odd, i // 2, COUNT // 2)


@gluon.jit
def _fetch(w, x, ws, xs, bar, row, at, s, BLOCKS: gl.constexpr, WIDE: gl.constexpr, ROWS: gl.constexpr):
    """BLOCKS blocks of 128 bytes of weight rows and of ROWS rows of x, from column `at` on, into stage s."""
    W: gl.constexpr = gl.NVMMASharedLayout(128, 16 if WIDE else 8)
    COLUMNS: gl.constexpr = 64 if WIDE else 128
    mbarrier.expect(bar.index(s), BLOCKS * 128 * (w.block_shape[0] + ROWS))
    for i in gl.static_range(BLOCKS):
        to = ws.index(s * BLOCKS + i)._reinterpret(w.dtype, w.block_shape, W)
        tma.async_copy_global_to_shared(w, [row, at + i * COLUMNS], bar.index(s), to)
        to = xs.index(s * BLOCKS + i)._reinterpret(x.dtype, x.block_shape, W)
        tma.async_copy_global_to_shared(x, [0, at + i * COLUMNS], bar.index(s), to)


@gluon.jit
def _rounded_part(
    w, f_ptr, x, s_ptr, ws, xs, bar, row, first, rows,
    DEPTH: gl.constexpr, PART: gl.constexpr, N: gl.constexpr, KS: gl.constexpr, STAGES: gl.constexpr,
    TALL: gl.constexpr,
):  # fmt: skip
    """Products of blocks [first, first + PART) of 128 columns, the first on their way: float32 [TALL, N].

    f_ptr [DEPTH] are the scales of the weights, s_ptr [rows, DEPTH] those of x.
    """
    MMA: gl.constexpr = sums_layout(N)
    F: gl.constexpr = _factors(N, KS)
    STEPS: gl.constexpr = PART // KS
    b = gl.arange(0, KS, gl.SliceLayout(0, F))
    j = gl.minimum(gl.arange(0, N, gl.SliceLayout(1, F)), rows - 1)
    acc = gl.zeros([TALL, N], gl.float32, MMA)
    zero = gl.zeros([TALL, N], gl.float32, MMA)
    for step in gl.static_range(STEPS):
        factors = gl.load(f_ptr + first + step * KS + b)[None, :]
        factors = factors * gl.load(s_ptr + j[:, None] * DEPTH + (first + step * KS + b)[None, :])
        mbarrier.wait(bar.index(step % STAGES), (step // STAGES) & 1)
        before = zero
        for i in gl.static_range(KS):
            a = ws.index(step % STAGES * KS + i)
            right = xs.index(step % STAGES * KS + i).permute((1, 0))
            running = warpgroup_mma(a, right, zero, use_acc=False, is_async=True)
            if i > 0:
                part = warpgroup_mma_wait(1, deps=[before])
                acc += part * gl.convert_layout(_nth(factors, i - 1, KS), gl.SliceLayout(0, MMA))[None, :]
            before = running
        part = warpgroup_mma_wait(0, deps=[before])
        if step + STAGES < STEPS:
            gl.thread_barrier()  # all warps have read the stage
            at = (first + (step + STAGES) * KS) * 128
            _fetch(w, x, ws, xs, bar, row, at, step % STAGES, KS, False, N)
        acc += part * gl.convert_layout(_nth(factors, KS - 1, KS), gl.SliceLayout(0, MMA))[None, :]
    return acc


@gluon.jit
def _bf16_part(
    w, x, ws, xs, bar, row, first,
    PART: gl.constexpr, N: gl.constexpr, KS: gl.constexpr, STAGES: gl.constexpr, TALL: gl.constexpr,
):  # fmt: skip
    """As _rounded_part, of a bf16 matrix and rows as they are, in blocks of 64 columns."""
    MMA: gl.constexpr = sums_layout(N, 16)
    W: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    STEPS: gl.constexpr = PART // KS
    acc = gl.zeros([TALL, N], gl.float32, MMA)
    for step in gl.static_range(STEPS):
        mbarrier.wait(bar.index(step % STAGES), (step // STAGES) & 1)
        for i in gl.static_range(KS):
            a = ws.index(step % STAGES * KS + i)._reinterpret(gl.bfloat16, [TALL, 64], W)
            right = xs.index(step % STAGES * KS + i)._reinterpret(gl.bfloat16, [N, 64], W).permute((1, 0))
            acc = warpgroup_mma(a, right, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        if step + STAGES < STEPS:
            gl.thread_barrier()
            at = (first + (step + STAGES) * KS) * 64
            _fetch(w, x, ws, xs, bar, row, at, step % STAGES, KS, True, N)
    return acc


@gluon.jit(do_not_specialize=["rows"])
def products(
    w, f_ptr, rest, x, s_ptr, wide, out_ptr, part_ptr, count_ptr, rows,
    K: gl.constexpr, OUT: gl.constexpr, LATENT: gl.constexpr, TALL: gl.constexpr, SPLIT: gl.constexpr,
    N: gl.constexpr, KS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out [rows, OUT] of x [rows, K]: outputs below LATENT by the FP8 matrix `w`, the others by `rest` in bf16.

    w, rest, x and wide are descriptors; x are rounded rows and s_ptr their scales [rows, K / 128], `wide` rows in bf16.
    part [programs, TALL, N] float32 is scratch. No more STAGES than a part has steps.
    """
    DEPTH: gl.constexpr = K // 128
    TILES: gl.constexpr = LATENT // TALL
    PART: gl.constexpr = DEPTH // SPLIT
    ws = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * KS, TALL, 128], gl.NVMMASharedLayout(128, 8))
    xs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * KS, N, 128], gl.NVMMASharedLayout(128, 8))
    bar = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(bar.index(s), count=1)
    fence_async_shared()
    gl.thread_barrier()
    piece = gl.program_id(0)
    if LATENT == OUT or piece < TILES * SPLIT:
        tile, split = piece // SPLIT, piece % SPLIT
        first = split * PART
        for s in gl.static_range(STAGES):
            _fetch(w, x, ws, xs, bar, tile * TALL, (first + s * KS) * 128, s, KS, False, N)
        f_ptr += tile * TALL // 128 * DEPTH
        acc = _rounded_part(w, f_ptr, x, s_ptr, ws, xs, bar, tile * TALL, first, rows, DEPTH, PART, N, KS, STAGES, TALL)
        gather(acc, part_ptr, count_ptr, out_ptr, rows, tile, 0, split, OUT, SPLIT, LATENT != OUT)
    else:
        piece -= TILES * SPLIT
        tile, split = piece // (2 * SPLIT), piece % (2 * SPLIT)
        first = split * PART  # of blocks of 64 columns
        for s in gl.static_range(STAGES):
            _fetch(rest, wide, ws, xs, bar, tile * TALL, (first + s * KS) * 64, s, KS, True, N)
        part_ptr += TILES * SPLIT * TALL * N
        more = _bf16_part(rest, wide, ws, xs, bar, tile * TALL, first, PART, N, KS, STAGES, TALL)
        gather(more, part_ptr, count_ptr + TILES, out_ptr, rows, tile, LATENT, split, OUT, 2 * SPLIT, False)
    forget(bar, STAGES)


@gluon.jit
def gather(
    acc, part_ptr, count_ptr, out_ptr, rows, tile, n0, split,
    OUT: gl.constexpr, SPLIT: gl.constexpr, NARROW: gl.constexpr,
):  # fmt: skip
    """Stores a tile of outputs from n0 + TALL tile on, by the last of SPLIT programs that have a part of it."""
    TALL: gl.constexpr = acc.shape[0]
    N: gl.constexpr = acc.shape[1]
    L: gl.constexpr = acc.type.layout
    n = gl.arange(0, TALL, gl.SliceLayout(1, L))
    j = gl.arange(0, N, gl.SliceLayout(0, L))
    if SPLIT == 1:
        _store(acc, out_ptr, rows, n0 + tile * TALL + n, j, OUT, NARROW)
    else:
        at = part_ptr + tile * (SPLIT * TALL * N) + n[:, None] * N + j[None, :]
        gl.store(at + split * (TALL * N), acc)
        gl.thread_barrier()
        if gl.atomic_add(count_ptr + tile, 1, sem="acq_rel") == SPLIT - 1:
            total = gl.zeros([TALL, N], gl.float32, L)
            for s in gl.static_range(SPLIT):
                total += gl.load(at + s * (TALL * N), cache_modifier=".cg")
            _store(total, out_ptr, rows, n0 + tile * TALL + n, j, OUT, NARROW)
            gl.store(count_ptr + tile, 0)


@gluon.jit
def _store(acc, out_ptr, rows, n, j, OUT: gl.constexpr, NARROW: gl.constexpr):
    if NARROW:
        acc = acc.to(gl.bfloat16).to(gl.float32)  # the latent columns are activations, the others states
    keep = (j < rows)[None, :] & (n < OUT)[:, None]
    gl.store(out_ptr + j[None, :] * OUT + n[:, None], acc.to(out_ptr.dtype.element_ty), mask=keep)
