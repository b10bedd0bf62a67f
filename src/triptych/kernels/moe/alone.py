"""The router of a single row which collapses the streams itself: a site's second half is no launch of its own.

Programs are those of router.py, and one more for the maps of the site behind. Each collapses the whole row, which takes
less than a launch: it needs the norm of all columns, while its part of the gate is still on its way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.mhc.ref import Uncollapsed
from triptych.kernels.mhc.sites import keep_maps, maps_of, pick
from triptych.kernels.moe.ref import Router
from triptych.kernels.moe.router import choose, exact_products
from triptych.kernels.quant.e4m3 import scale_of
from triptych.kernels.quant.matrices import Fp8Rows

_SOME = 64  # experts of a program
_DEPTH = 128  # and columns
_WIDE = 512  # columns that a program rounds


def route_one(
    row: Uncollapsed, token_ids: Tensor, router: Router, counters: Tensor
) -> tuple[Tensor, Tensor, Tensor, Fp8Rows]:
    """What router.route_few gives, of one row that is still in its streams. Fills its post and comb."""
    streams, share, site, norm, post, comb = row
    dim, dev = streams.shape[2], streams.device
    experts, k = router.gate.shape[0], router.experts_per_token
    split = dim // _DEPTH
    part = torch.empty(split, experts, dtype=torch.float32, device=dev)
    weights = torch.empty(1, k, dtype=torch.float32, device=dev)
    tile = torch.empty(k, 3, dtype=torch.int32, device=dev)
    order = torch.empty(1, k, dtype=torch.int32, device=dev)
    values = torch.empty(1, dim, dtype=torch.float8_e4m3fn, device=dev)
    scales = torch.empty(dim // 128, 1, dtype=torch.float32, device=dev)
    hashed = router.tid2eid is not None
    parts, slices = triton.cdiv(experts, _SOME) * split, share.shape[1]
    score_one[(1 + parts + triton.cdiv(dim, _WIDE),)](
        *(streams, share, site.base, site.scale, norm, post, comb, router.gate, values, scales, part),
        *(router.bias if router.bias is not None else part, router.tid2eid if hashed else token_ids, token_ids),
        *(weights, tile, order, counters, router.scaling, slices, dim, site.eps, site.norm_eps),
        HASHED=hashed,
        COUNT=experts,
        EXPERTS=triton.next_power_of_2(experts),
        TOPK=k,
        SPLIT=split,
        SOME=_SOME,
        DEPTH=_DEPTH,
        WIDE=_WIDE,
        ITERS=site.iters,
        SLICES=triton.next_power_of_2(slices),
        MAPS=share.shape[2],
        DIM=triton.next_power_of_2(dim),
        num_warps=4,
    )
    return weights, tile, order, Fp8Rows(values, scales.T)


@triton.jit
def score_one(
    streams_ptr, share_ptr, base_ptr, scale_ptr, norm_ptr, post_ptr, comb_ptr, gate_ptr, values_ptr, scales_ptr,
    part_ptr, bias_ptr, table_ptr, token_ptr, weights_ptr, tile_ptr, order_ptr, count_ptr, scaling, slices, dim, eps,
    norm_eps,
    HASHED: tl.constexpr, COUNT: tl.constexpr, EXPERTS: tl.constexpr, TOPK: tl.constexpr, SPLIT: tl.constexpr,
    SOME: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr, ITERS: tl.constexpr, SLICES: tl.constexpr,
    MAPS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The first program fills post and comb, the next make shares of the logits, and the last of them what
    router.choose_rows does; the others round."""
    PARTS: tl.constexpr = SPLIT * ((COUNT + SOME - 1) // SOME)
    at = tl.program_id(0) - 1
    m = tl.arange(0, MAPS)
    base = tl.load(base_ptr + m, mask=m < 24, other=0.0)
    scale = tl.load(scale_ptr + tl.where(m < 4, 0, tl.where(m < 8, 1, 2)))
    if at < 0:
        z = maps_of(share_ptr, 0, slices, dim, norm_eps, 4, SLICES, MAPS) * scale + base
        keep_maps(z, 0, post_ptr, comb_ptr, eps, ITERS, MAPS)
    elif at < PARTS:
        e = at // SPLIT * SOME + tl.arange(0, SOME)
        columns = at % SPLIT * DEPTH + tl.arange(0, DEPTH)
        gate = tl.load(gate_ptr + e[:, None] * dim + columns[None, :], mask=(e < COUNT)[:, None], other=0.0)
        x = _collapsed(
            streams_ptr, share_ptr, base, scale, norm_ptr, columns, slices, dim, eps, norm_eps, SLICES, MAPS, DIM
        )
        x = tl.where((tl.arange(0, 16) == 0)[:, None], x[None, :], 0.0)  # a product has 16 rows
        logits = tl.sum(exact_products(gate.to(tl.float32), x), 1)
        tl.store(part_ptr + at % SPLIT * COUNT + e, logits, mask=e < COUNT)
        tl.debug_barrier()
        if tl.atomic_add(count_ptr, 1, sem="acq_rel") == PARTS - 1:
            choose(
                part_ptr, bias_ptr, table_ptr, token_ptr, weights_ptr, tile_ptr, order_ptr, count_ptr, 0, 1,
                scaling, HASHED, COUNT, EXPERTS, TOPK, SPLIT, True,
            )  # fmt: skip
            tl.store(count_ptr, 0)
    else:
        d = (at - PARTS) * WIDE + tl.arange(0, WIDE)
        some = _collapsed(
            streams_ptr, share_ptr, base, scale, norm_ptr, d, slices, dim, eps, norm_eps, SLICES, MAPS, DIM
        )
        _round(some, (at - PARTS) * WIDE, dim, values_ptr, scales_ptr, WIDE)


@triton.jit
def _round(x, first, dim, values_ptr, scales_ptr, WIDE: tl.constexpr):
    """x [WIDE], columns from `first` on, to e4m3 and power-of-two scales."""
    d = first + tl.arange(0, WIDE)
    g = first // 128 + tl.arange(0, WIDE // 128)
    x = tl.reshape(x, [WIDE // 128, 128])
    scale, inverse = scale_of(tl.max(tl.abs(x), 1))
    tl.store(values_ptr + d, tl.reshape((x * inverse[:, None]).to(tl.float8e4nv), [WIDE]), mask=d < dim)
    tl.store(scales_ptr + g, scale, mask=g * 128 < dim)


@triton.jit
def _collapsed(
    streams_ptr, share_ptr, base, scale, norm_ptr, d, slices, dim, eps, norm_eps,
    SLICES: tl.constexpr, MAPS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Columns d of the row as sites.mix gives it: float32 that bf16 holds. Reads all first."""
    all_d = tl.arange(0, DIM)
    a0, a1, a2, a3 = _streams(streams_ptr, all_d, dim)
    b0, b1, b2, b3 = _streams(streams_ptr, d, dim)
    norm = tl.load(norm_ptr + d, mask=d < dim, other=0.0)
    z = maps_of(share_ptr, 0, slices, dim, norm_eps, 4, SLICES, MAPS) * scale + base
    pre = tl.sigmoid(z) + eps
    p0, p1, p2, p3 = pick(pre, 0, MAPS), pick(pre, 1, MAPS), pick(pre, 2, MAPS), pick(pre, 3, MAPS)
    x = _weighed(p0, p1, p2, p3, a0, a1, a2, a3)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / dim + norm_eps)
    x = _weighed(p0, p1, p2, p3, b0, b1, b2, b3) * inverse * norm
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def _streams(streams_ptr, d, dim):
    """Dims d of all four."""
    here = streams_ptr + d
    x0 = tl.load(here, mask=d < dim, other=0.0)
    x1 = tl.load(here + dim, mask=d < dim, other=0.0)
    x2 = tl.load(here + 2 * dim, mask=d < dim, other=0.0)
    x3 = tl.load(here + 3 * dim, mask=d < dim, other=0.0)
    return x0, x1, x2, x3


@triton.jit
def _weighed(p0, p1, p2, p3, x0, x1, x2, x3):
    x = p0 * x0.to(tl.float32) + p1 * x1.to(tl.float32)
    x += p2 * x2.to(tl.float32)
    return x + p3 * x3.to(tl.float32)
