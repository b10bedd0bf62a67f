"""Token-axis compression for NVIDIA GPUs: a program pools, norms and rotates one entry; another launch keeps rows.

The softmax runs per channel over the group's rows as they come, so a group of any size needs two vectors of state.
Rows are kept only after all entries have read the ring.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.compress.ref import ABSENT, Compressor, CompressPlan


def compress(
    front: Tensor, start: int, ring: Tensor, plan: CompressPlan, weights: Compressor, angles: tuple[Tensor, Tensor]
) -> Tensor:
    """See ref.compress."""
    half = weights.ape.shape[1]
    dim = weights.norm.shape[0]
    cos, sin = angles
    entries = torch.empty(len(plan.src), dim, device=front.device)
    columns = front[:, start:]
    if len(entries):
        pool = _pool if plan.src.shape[1] < 2 * _TILE or weights.overlap else _pool_tiles
        pool[(len(entries),)](
            *(columns, front.stride(0), ring, ring.stride(0), plan.src, plan.phase, weights.ape, weights.norm),
            *(cos.contiguous(), sin.contiguous(), entries, half, dim, 2 * cos.shape[1], weights.eps),
            GROUP=plan.src.shape[1],
            OVERLAP=weights.overlap,
            ABSENT_ROW=ABSENT,
            DIM=triton.next_power_of_2(dim),
            **({} if pool is _pool else {"TILE": _TILE, "num_warps": 8}),
        )
    if len(plan.keep_src):
        _keep[(len(plan.keep_src),)](
            *(columns, front.stride(0), ring, ring.stride(0), plan.keep_src, plan.keep_dst, plan.phase),
            *(weights.ape, half),
            HALF=triton.next_power_of_2(half),
        )
    return entries


_TILE = 16  # rows of a long group that are read at once


@triton.jit
def _pool(
    front_ptr,
    front_stride,
    ring_ptr,
    ring_stride,
    src_ptr,
    phase_ptr,
    ape_ptr,
    norm_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    half,
    dim,
    width,
    eps,
    GROUP: tl.constexpr,
    OVERLAP: tl.constexpr,
    ABSENT_ROW: tl.constexpr,
    DIM: tl.constexpr,
):
    e = tl.program_id(0).to(tl.int64)
    if tl.load(src_ptr + (e + 1) * GROUP - 1) == ABSENT_ROW:
        return
    d = tl.arange(0, DIM)
    inside = d < dim
    peak = tl.full([DIM], float("-inf"), tl.float32)
    weight = tl.zeros([DIM], tl.float32)
    total = tl.zeros([DIM], tl.float32)
    for i in range(GROUP):
        s = tl.load(src_ptr + e * GROUP + i)
        if s != ABSENT_ROW:
            column = d
            if OVERLAP:
                column = d + tl.where(i < 4, 0, dim)  # the A halves of the group before, the B halves of this one
            value, gate = _row(
                front_ptr, front_stride, ring_ptr, ring_stride, phase_ptr, ape_ptr, s, column, half, inside
            )
            highest = tl.maximum(peak, gate)
            shrink = tl.exp(peak - highest)
            p = tl.exp(gate - highest)
            weight = weight * shrink + p
            total = total * shrink + p * value
            peak = highest
    _finish(tl.where(inside, total / weight, 0.0), e, d, norm_ptr, cos_ptr, sin_ptr, out_ptr, dim, width, eps, DIM)


@triton.jit
def _finish(x, e, d, norm_ptr, cos_ptr, sin_ptr, out_ptr, dim, width, eps, DIM: tl.constexpr):
    """Norm, rotate and store entry e [DIM]."""
    inside = d < dim
    x = x * tl.rsqrt(tl.sum(x * x, 0) / dim + eps) * tl.load(norm_ptr + d, mask=inside, other=0.0)
    even, odd = tl.split(tl.reshape(x, [DIM // 2, 2]))
    pair = tl.arange(0, DIM // 2) - (dim - width) // 2
    turns = (pair >= 0) & (pair < width // 2)
    cos = tl.load(cos_ptr + e * (width // 2) + pair, mask=turns, other=1.0)
    sin = tl.load(sin_ptr + e * (width // 2) + pair, mask=turns, other=0.0)
    x = tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [DIM])
    tl.store(out_ptr + e * dim + d, x, mask=inside)


@triton.jit
def _pool_tiles(
    front_ptr,
    front_stride,
    ring_ptr,
    ring_stride,
    src_ptr,
    phase_ptr,
    ape_ptr,
    norm_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    half,
    dim,
    width,
    eps,
    GROUP: tl.constexpr,
    OVERLAP: tl.constexpr,
    ABSENT_ROW: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """As `_pool`, of long groups without overlap, which are always whole: TILE rows at a time.

    Where the next ones lie is looked up while these are on their way.
    """
    e = tl.program_id(0).to(tl.int64)
    if tl.load(src_ptr + (e + 1) * GROUP - 1) == ABSENT_ROW:
        return
    d = tl.arange(0, DIM)
    i = tl.arange(0, TILE)
    src_ptr += e * GROUP
    coming = tl.load(src_ptr + i)
    coming_phase = tl.load(phase_ptr + tl.maximum(coming, 0))
    peak = tl.full([DIM], float("-inf"), tl.float32)
    weight = tl.zeros([DIM], tl.float32)
    total = tl.zeros([DIM], tl.float32)
    for first in range(0, GROUP, TILE):
        s, phase = coming, coming_phase
        coming = tl.load(src_ptr + tl.minimum(first + TILE, GROUP - TILE) + i)
        now, inside = (s >= 0)[:, None], (d < dim)[None, :]
        here = front_ptr + tl.maximum(s, 0)[:, None] * front_stride + d[None, :]
        kept = ring_ptr + tl.maximum(-1 - s, 0)[:, None] * ring_stride + d[None, :]
        value = tl.load(here, mask=now & inside, other=0.0).to(tl.float32)
        value += tl.load(kept, mask=~now & inside, other=0.0)
        gate = tl.load(here + half, mask=now & inside, other=0.0).to(tl.float32)
        gate += tl.load(ape_ptr + phase[:, None] * half + d[None, :], mask=now & inside, other=0.0)
        gate += tl.load(kept + half, mask=~now & inside, other=0.0)
        coming_phase = tl.load(phase_ptr + tl.maximum(coming, 0))
        highest = tl.maximum(peak, tl.max(gate, 0))
        shrink = tl.exp(peak - highest)
        p = tl.exp(gate - highest[None, :])
        weight = weight * shrink + tl.sum(p, 0)
        total = total * shrink + tl.sum(p * value, 0)
        peak = highest
    x = tl.where(d < dim, total / weight, 0.0)
    _finish(x, e, d, norm_ptr, cos_ptr, sin_ptr, out_ptr, dim, width, eps, DIM)


@triton.jit
def _row(front_ptr, front_stride, ring_ptr, ring_stride, phase_ptr, ape_ptr, s, column, half, inside):
    """Value and gate of source row s: of this step, where the gate still lacks ape, or of the ring."""
    if s >= 0:
        here = front_ptr + s * front_stride + column
        value = tl.load(here, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(here + half, mask=inside, other=0.0).to(tl.float32)
        gate += tl.load(ape_ptr + tl.load(phase_ptr + s) * half + column, mask=inside, other=0.0)
    else:
        kept = ring_ptr + (-1 - s) * ring_stride + column
        value = tl.load(kept, mask=inside, other=0.0)
        gate = tl.load(kept + half, mask=inside, other=0.0)
    return value, gate


@triton.jit
def _keep(
    front_ptr,
    front_stride,
    ring_ptr,
    ring_stride,
    keep_src_ptr,
    keep_dst_ptr,
    phase_ptr,
    ape_ptr,
    half,
    HALF: tl.constexpr,
):
    i = tl.program_id(0)
    d = tl.arange(0, HALF)
    s = tl.load(keep_src_ptr + i)
    here = front_ptr + s * front_stride + d
    to = ring_ptr + tl.load(keep_dst_ptr + i) * ring_stride + d
    tl.store(to, tl.load(here, mask=d < half).to(tl.float32), mask=d < half)
    gate = tl.load(here + half, mask=d < half).to(tl.float32)
    tl.store(to + half, gate + tl.load(ape_ptr + tl.load(phase_ptr + s) * half + d, mask=d < half), mask=d < half)
