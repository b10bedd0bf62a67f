"""The product of a single row that is still to be normed and rounded, in one launch: each program does that for itself
while its weights are on their way, so the launch need not wait for another that does it.

It may begin while the launch before it still runs, of whose results it reads none. It stores nothing before that ended:
what it stores may lie where that one's scratch is.
"""

from __future__ import annotations

import math

import torch
import triton
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
from triton.language.extra.cuda import gdc_wait

from triptych.kernels.barriers import forget
from triptych.kernels.linear.few_rows import TILING, blocks_of
from triptych.kernels.quant.e4m3 import scale_of
from triptych.kernels.quant.matrices import Fp8Matrix, Unnormed

_SLOTS = gl.constexpr(8)  # columns of the least product of the tensor cores; one is wanted


def product(x: Unnormed, weight: Fp8Matrix) -> Tensor:
    """The row, normed and rounded, times weight [N, K] -> [1, N] bf16."""
    columns, depth = weight.shape
    out = torch.empty(1, columns, dtype=torch.bfloat16, device=x.columns.device)
    blocks = math.gcd(depth // 128, TILING.blocks)
    _products[(columns // TILING.tall,)](
        *(blocks_of(weight.values, TILING.tall), weight.scales, x.columns, x.norm, out, x.eps),
        K=depth,
        GROUPS=triton.next_power_of_2(depth // 128),
        TALL=TILING.tall,
        KS=blocks,
        STAGES=min(TILING.stages, depth // 128 // blocks),
        num_warps=4,
        launch_pdl=True,
    )
    return out


@gluon.jit
def _fetch(w, ws, bar, row, step, KS: gl.constexpr, STAGES: gl.constexpr):
    """KS blocks of 128 columns of weights on their way."""
    s = step % STAGES
    mbarrier.expect(bar.index(s), KS * 128 * w.block_shape[0])
    for i in gl.static_range(KS):
        tma.async_copy_global_to_shared(w, [row, (step * KS + i) * 128], bar.index(s), ws.index(s * KS + i))


@gluon.jit
def _rounded(x, norm, eps, f, xs, fs, K: gl.constexpr):
    """x [groups, 128], of K columns, normed, and rounded to e4m3 in all slots of xs; their scales times f in fs."""
    GROUPS: gl.constexpr = x.shape[0]
    square = gl.sum(gl.sum(x * x, 1), 0)
    x = (x * gl.rsqrt(square / K + eps) * norm).to(gl.bfloat16).to(gl.float32)
    scale, inverse = scale_of(gl.max(gl.abs(x), 1))
    values = gl.expand_dims((x * inverse[:, None]).to(gl.float8e4nv), 1)
    slots = gl.arange(0, _SLOTS, gl.SliceLayout(0, gl.SliceLayout(2, values.type.layout)))
    values, _ = gl.broadcast(values, gl.expand_dims(slots[None, :], 2))
    xs.store(gl.reshape(values, [GROUPS * _SLOTS, 128]))
    fs.store(scale * f)


@gluon.jit
def _products(
    w, f_ptr, x_ptr, norm_ptr, out_ptr, eps,
    K: gl.constexpr, GROUPS: gl.constexpr, TALL: gl.constexpr, KS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """TALL outputs of x [K] float32, normed with norm [K] and rounded, by the FP8 matrix w, a descriptor."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _SLOTS, 32])
    L: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 8, 4], [1, 1, 32], [4, 1, 1], [2, 1, 0]))
    ROWS: gl.constexpr = gl.NVMMASharedLayout(128, 8)
    BLOCKS: gl.constexpr = K // 128
    ws = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * KS, TALL, 128], ROWS)
    xs = gl.allocate_shared_memory(gl.float8e4nv, [GROUPS * _SLOTS, 128], ROWS)
    fs = gl.allocate_shared_memory(gl.float32, [GROUPS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bar = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(bar.index(s), count=1)
    fence_async_shared()
    gl.thread_barrier()
    row = gl.program_id(0) * TALL
    for s in gl.static_range(STAGES):
        _fetch(w, ws, bar, row, s, KS, STAGES)
    g = gl.arange(0, GROUPS, gl.SliceLayout(1, L))
    at = g[:, None] * 128 + gl.arange(0, 128, gl.SliceLayout(0, L))[None, :]
    x = gl.load(x_ptr + at, mask=at < K, other=0.0).to(gl.bfloat16).to(gl.float32)
    norm = gl.load(norm_ptr + at, mask=at < K, other=0.0)
    _rounded(x, norm, eps, gl.load(f_ptr + row // 128 * BLOCKS + g, mask=g < BLOCKS, other=0.0), xs, fs, K)
    fence_async_shared()
    gl.thread_barrier()
    xs = xs._reinterpret(gl.float8e4nv, [GROUPS, _SLOTS, 128], ROWS)
    fs = fs._reinterpret(gl.float32, [GROUPS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    acc = gl.zeros([TALL, _SLOTS], gl.float32, MMA)
    zero = gl.zeros([TALL, _SLOTS], gl.float32, MMA)
    for step in gl.static_range(BLOCKS // KS):
        mbarrier.wait(bar.index(step % STAGES), (step // STAGES) & 1)
        for i in gl.static_range(KS):
            block = step * KS + i
            left = ws.index(step % STAGES * KS + i)
            part = warpgroup_mma(left, xs.index(block).permute((1, 0)), zero, use_acc=False, is_async=True)
            f = fs.index(block).load(gl.SliceLayout(1, MMA))
            part = warpgroup_mma_wait(0, deps=[part])
            acc += part * gl.expand_dims(f, 1)
        if step + STAGES < BLOCKS // KS:
            gl.thread_barrier()  # all warps have read the stage
            _fetch(w, ws, bar, row, step + STAGES, KS, STAGES)
    gdc_wait()
    n = row + gl.arange(0, TALL, gl.SliceLayout(1, MMA))
    j = gl.arange(0, _SLOTS, gl.SliceLayout(0, MMA))
    gl.store(out_ptr + n[:, None] + j[None, :], acc.to(gl.bfloat16), mask=(j == 0)[None, :] & (n >= 0)[:, None])
    forget(bar, STAGES)
