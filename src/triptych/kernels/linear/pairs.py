"""Grouped linear maps of 33 to 128 rows that lose nothing to rounding, on the FP8 tensor cores: rows as pairs of e4m3.

A number of bf16 has eight bits, and two of e4m3 have them too: x = scale * (high + low / 16), exactly for what is not
2^13 times smaller than the largest of its group of 128. `part_rows` makes them in a launch of its own; `products`
multiplies both by the same weights. Programs have 128 outputs, up to 64 rows and a part of the columns; bulk copies
bring weights and rows as they are, and the last of the programs that share outputs adds up their parts, in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
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

from triptych.kernels.gpu import multiprocessors
from triptych.kernels.linear.counters import counters
from triptych.kernels.linear.few import gather
from triptych.kernels.linear.few_rows import blocks_of
from triptych.kernels.quant.e4m3 import on_e4m3, scale_of
from triptych.kernels.quant.matrices import Fp8Matrix

MOST = 128
"""Rows up to which this is the quickest way: from there on weights are widened for the library's product."""
_ROWS, _STAGES = 64, 5


def grouped(x: Tensor, weight: Fp8Matrix, out: Tensor) -> Tensor:
    """x [rows, G * K] bf16 by matrices [G, N, K], N and K in whole 128, into out [rows, G * N]; two launches."""
    rows, columns = out.shape
    depth = weight.shape[2]
    values, scales = parted(x)
    chunks, tiles, blocks = triton.cdiv(rows, _ROWS), columns // 128, depth // 128
    split = 1
    while chunks * tiles * split < 0.9 * multiprocessors(x.device) and blocks % (2 * split) == 0:
        split *= 2
    programs = chunks * tiles * split
    part = torch.empty(programs * 128 * _ROWS if split > 1 else 0, dtype=torch.float32, device=x.device)
    products[(programs,)](
        *(blocks_of(weight.values.view(columns, depth), 128), weight.scales, blocks_of(values, _ROWS), scales),
        *(out, part, counters(x.device), rows),
        K=depth,
        OUT=columns,
        GROUP=weight.shape[1],
        SPLIT=split,
        N=_ROWS,
        STAGES=min(_STAGES, blocks // split),
        num_warps=8,
    )
    return out


def parted(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, width] bf16 as pairs: values [2 * rows, width] e4m3, high ones first; scales [width / 128, rows]."""
    rows, width = x.shape
    values = torch.empty(2 * rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(width // 128, rows, dtype=torch.float32, device=x.device)
    part_rows[(rows, triton.cdiv(width, 1024))](x.contiguous(), values, scales, rows, width, GROUPS=8, num_warps=4)
    return values, scales


@triton.jit
def part_rows(x_ptr, values_ptr, scales_ptr, rows, width, GROUPS: tl.constexpr):
    """GROUPS groups of a row of x as pairs.

    What the high part leaves is found without its byte: of a byte that is stored and used besides, the ptxas of Triton
    3.6 makes one use of R1, the stack's address, and sums were 16 % off."""
    r = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    d = g[:, None] * 128 + tl.arange(0, 128)[None, :]
    there = d < width
    x = tl.load(x_ptr + r * width + d, mask=there, other=0.0).to(tl.float32)
    scale, inverse = scale_of(tl.max(tl.abs(x), 1))
    x = x * inverse[:, None]
    low = (x - on_e4m3(x)) * 16.0
    tl.store(values_ptr + r * width + d, x.to(tl.float8e4nv), mask=there)
    tl.store(values_ptr + (rows + r) * width + d, low.to(tl.float8e4nv), mask=there)
    tl.store(scales_ptr + g * rows + r, scale, mask=g * 128 < width)


@gluon.jit
def _fetch(w, x, ws, xs, bar, row, first, rows, column, block, s, N: gl.constexpr):
    """A block of 128 columns of weights from `row` on and of both parts of N rows from `first` on, into stage s."""
    mbarrier.expect(bar.index(s), 128 * (128 + 2 * N))
    tma.async_copy_global_to_shared(w, [row, block * 128], bar.index(s), ws.index(s))
    at = column + block * 128
    tma.async_copy_global_to_shared(x, [first, at], bar.index(s), xs.index(2 * s))
    tma.async_copy_global_to_shared(x, [first + rows, at], bar.index(s), xs.index(2 * s + 1))


@gluon.jit(do_not_specialize=["rows"])
def products(
    w, f_ptr, x, s_ptr, out_ptr, part_ptr, count_ptr, rows,
    K: gl.constexpr, OUT: gl.constexpr, GROUP: gl.constexpr, SPLIT: gl.constexpr, N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """out [rows, OUT] of pairs, every GROUP outputs of which have their own K columns; w and x are descriptors.

    f are the scales of w's blocks of 128 x 128, s those of x. part [programs, 128, N] float32 is scratch. Programs that
    share weights are neighbours."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, N, 32])
    BLOCKS: gl.constexpr = K // 128 // SPLIT
    ws = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], gl.NVMMASharedLayout(128, 8))
    xs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * 2, N, 128], gl.NVMMASharedLayout(128, 8))
    bar = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bar.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    chunks = (rows + N - 1) // N
    first = gl.program_id(0) % chunks * N
    part = gl.program_id(0) // chunks % SPLIT
    tile = gl.program_id(0) // chunks // SPLIT
    column = tile * 128 // GROUP * K
    at = part * BLOCKS
    for i in gl.static_range(STAGES):
        _fetch(w, x, ws, xs, bar, tile * 128, first, rows, column, at + i, i, N)
    j = gl.minimum(first + gl.arange(0, N, gl.SliceLayout(0, MMA)), rows - 1)
    f_ptr += tile * (K // 128) + at
    s_ptr += j + (column // 128 + at) * rows
    acc = _sums(
        w, x, ws, xs, bar, f_ptr, s_ptr, tile * 128, first, rows, column, at, BLOCKS, N, STAGES, MMA
    )  # fmt: skip
    place = tile * chunks + first // N
    n0 = (tile - place) * 128  # gather counts outputs from 128 times its tile on, which is `place` here
    gather(acc, part_ptr, count_ptr, out_ptr + first * OUT, rows - first, place, n0, part, OUT, SPLIT, False)


@gluon.jit
def _sums(
    w, x, ws, xs, bar, f_ptr, s_ptr, row, first, rows, column, at,
    BLOCKS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Products of BLOCKS blocks of 128 columns from `at` on, the first on their way: float32 [128, N]."""
    acc = gl.zeros([128, N], gl.float32, MMA)
    zero = gl.zeros([128, N], gl.float32, MMA)
    for block in range(0, BLOCKS):
        s = block % STAGES
        factor = gl.load(s_ptr + block * rows) * gl.load(f_ptr + block)
        mbarrier.wait(bar.index(s), (block // STAGES) & 1)
        high = warpgroup_mma(ws.index(s), xs.index(2 * s).permute((1, 0)), zero, use_acc=False, is_async=True)
        low = warpgroup_mma(ws.index(s), xs.index(2 * s + 1).permute((1, 0)), zero, use_acc=False, is_async=True)
        high, low = warpgroup_mma_wait(0, deps=[high, low])
        gl.thread_barrier()  # all warps have read the stage
        if block + STAGES < BLOCKS:
            _fetch(w, x, ws, xs, bar, row, first, rows, column, at + block + STAGES, s, N)
        acc += (high + low * 0.0625) * factor[None, :]
    return acc
