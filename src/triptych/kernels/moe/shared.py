"""The shared expert of few rows, as a part of few.py's launches: e4m3 matrices and rows on the FP8 tensor cores.

A program has 64 rows of weights, up to 64 rows of x and one of PARTS parts of the columns, two if it can, so that at
few rows it is about as long as one of a routed expert. Bulk copies fetch blocks of 128 columns of both several blocks
ahead. Programs that share weights are neighbours.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from triptych.kernels.barriers import forget
from triptych.kernels.quant.e4m3 import scale_of


def gates_and_ups(w13: Tensor) -> TensorDescriptor:
    """w13 [2 I, K] e4m3 as [I / 8, 2, 8, K], to copy 64 rows: eight of gates, their eight ups, and so on."""
    inner, columns = w13.shape[0] // 2, w13.shape[1]
    return TensorDescriptor(
        w13, [inner // 8, 2, 8, columns], [8 * columns, inner * columns, columns, 1], [4, 2, 8, 128],
        gl.NVMMASharedLayout(128, 8, rank=4),
    )  # fmt: skip


def parts_of(columns: int) -> int:
    """Into how many parts of whole blocks of 128 columns a product is split."""
    return 2 if columns % 256 == 0 else 1


def plain(matrix: Tensor, rows: int) -> TensorDescriptor:
    """A matrix [.., K] e4m3, to copy blocks of `rows` rows and 128 columns."""
    return TensorDescriptor.from_tensor(matrix, [rows, 128], gl.NVMMASharedLayout(128, 8))


@gluon.jit
def _fetch(w, x, ws, xs, bar, row, xrow, block, s, N: gl.constexpr):
    """A block of 128 columns of 64 rows of weights from row tile `row` on and of N rows of x, on its way to stage s."""
    mbarrier.expect(bar.index(s), (64 + N) * 128)
    if len(w.block_shape) == 4:
        tma.async_copy_global_to_shared(w, [row * 4, 0, 0, block * 128], bar.index(s), ws.index(s))
    else:
        tma.async_copy_global_to_shared(w, [row * 64, block * 128], bar.index(s), ws.index(s))
    tma.async_copy_global_to_shared(x, [xrow, block * 128], bar.index(s), xs.index(s))


@gluon.jit
def product(
    w, x, factor_ptr, scale_ptr, stride, row, xrow, first,
    BLOCKS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Of columns [128 first, 128 (first + BLOCKS)): row tile `row` of w times x[xrow ..] -> float32 [64, N].

    factor_ptr [64] point to the scales of w's blocks in the first of its columns, scale_ptr [N] to those of x's rows;
    x's next ones are `stride` further. No more STAGES than BLOCKS."""
    xs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, N, 128], gl.NVMMASharedLayout(128, 8))
    ws = gl.allocate_shared_memory(gl.float8e4nv, [STAGES] + w.block_shape, w.layout)  # noqa: RUF005
    bar = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bar.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    for i in gl.static_range(STAGES):
        _fetch(w, x, ws, xs, bar, row, xrow, first + i, i, N)
    acc = gl.zeros([64, N], gl.float32, MMA)
    zero = gl.zeros([64, N], gl.float32, MMA)
    factor_ptr += first
    scale_ptr += first * stride
    for block in range(0, BLOCKS):
        s = block % STAGES
        mbarrier.wait(bar.index(s), (block // STAGES) & 1)
        a = ws.index(s)._reinterpret(gl.float8e4nv, [64, 128], gl.NVMMASharedLayout(128, 8))
        running = warpgroup_mma(a, xs.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
        factor = gl.load(factor_ptr + block)
        scale = gl.load(scale_ptr + block * stride)
        part = warpgroup_mma_wait(0, deps=[running])
        acc += part * (factor[:, None] * scale[None, :])
        gl.thread_barrier()
        if block + STAGES < BLOCKS:
            _fetch(w, x, ws, xs, bar, row, xrow, first + block + STAGES, s, N)
    forget(bar, STAGES)
    return acc


@gluon.jit
def shared_up(
    w, scale_ptr, x, xs_ptr, sums_ptr, hq_ptr, hs_ptr, count_ptr, piece, rows, pairs, limit,
    DIM: gl.constexpr, INNER: gl.constexpr, N: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A part of the sums of 32 gates and their ups for N rows; the last of the programs of 128 hidden columns adds and
    rounds them, into rows of hq and columns of hs behind the pairs'. sums [PARTS, 2, rows, INNER] float32 is scratch.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 32])
    BLOCKS: gl.constexpr = DIM // 128 // PARTS
    tile, part, row = _place(piece, rows, N, PARTS)
    m = gl.arange(0, 64, gl.SliceLayout(1, MMA))
    n = row * 32 + (m // 16) * 8 + m % 8 + ((m // 8) % 2) * INNER  # a thread's two rows are a gate and its up
    j = tile * N + gl.arange(0, N, gl.SliceLayout(0, MMA))
    acc = product(
        w, x, scale_ptr + n // 128 * (DIM // 128), xs_ptr + gl.minimum(j, rows - 1), rows, row, tile * N, part * BLOCKS,
        BLOCKS, N, STAGES, MMA,
    )  # fmt: skip
    at = part * 2 * rows * INNER + (n // INNER * rows * INNER + n % INNER)[:, None] + j[None, :] * INNER
    gl.store(sums_ptr + at, acc, mask=(j < rows)[None, :])
    gl.thread_barrier()
    group = row // 4
    mine = count_ptr + tile * (INNER // 128) + group
    if gl.atomic_add(mine, 1, sem="acq_rel") == 4 * PARTS - 1:
        for first in range(tile * N, gl.minimum(tile * N + N, rows), 8):
            _round(sums_ptr, hq_ptr, hs_ptr, first, group, rows, pairs, limit, INNER, PARTS)
        gl.store(mine, 0)


@gluon.jit
def _place(piece, rows, N: gl.constexpr, PARTS: gl.constexpr):
    """Tile of N rows, part of the columns, and row tile of the weights of a program."""
    tiles = (rows + N - 1) // N
    return piece % tiles, piece // tiles % PARTS, piece // tiles // PARTS


@gluon.jit
def _round(sums_ptr, hq_ptr, hs_ptr, first, group, rows, pairs, limit, INNER: gl.constexpr, PARTS: gl.constexpr):
    """SwiGLU of 128 columns of eight rows, on the e4m3 grid."""
    B: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    r = first + gl.arange(0, 8, gl.SliceLayout(1, B))
    d = gl.arange(0, 128, gl.SliceLayout(0, B))
    there = (r < rows)[:, None]
    at = sums_ptr + r[:, None] * INNER + group * 128 + d[None, :]
    gate = gl.zeros([8, 128], gl.float32, B)
    up = gl.zeros([8, 128], gl.float32, B)
    for part in gl.static_range(PARTS):
        gate += gl.load(at + 2 * part * rows * INNER, mask=there, other=0.0, cache_modifier=".cg")
        up += gl.load(at + (2 * part + 1) * rows * INNER, mask=there, other=0.0, cache_modifier=".cg")
    hidden = swiglu(gate, up, limit)
    scale, inverse = scale_of(gl.max(gl.abs(hidden), axis=1))
    values = (hidden * inverse[:, None]).to(gl.float8e4nv).to(gl.uint8, bitcast=True)
    gl.store(hq_ptr + (pairs + r)[:, None] * INNER + group * 128 + d[None, :], values, mask=there)
    gl.store(hs_ptr + group * (pairs + rows) + pairs + r, scale, mask=r < rows)


@gluon.jit
def swiglu(gate, up, limit):
    """Hidden values of gates and ups of one layout."""
    gate = gl.where(gate > limit, limit, gate)
    up = gl.where(up > limit, limit, gl.where(up < -limit, -limit, up))
    return gate / (1.0 + gl.exp(-gate)) * up


@gluon.jit
def shared_down(
    w, scale_ptr, h, hs_ptr, piece, rows, pairs,
    INNER: gl.constexpr, N: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """A part of the sums of 64 outputs [64, N], their row tile, their first row and which part it is."""
    BLOCKS: gl.constexpr = INNER // 128 // PARTS
    tile, part, row = _place(piece, rows, N, PARTS)
    n = row * 64 + gl.arange(0, 64, gl.SliceLayout(1, MMA))
    j = gl.minimum(tile * N + gl.arange(0, N, gl.SliceLayout(0, MMA)), rows - 1)
    acc = product(
        w, h, scale_ptr + n // 128 * (INNER // 128), hs_ptr + pairs + j, pairs + rows, row, tile * N, part * BLOCKS,
        BLOCKS, N, STAGES, MMA,
    )  # fmt: skip
    return acc, row, tile * N, part
