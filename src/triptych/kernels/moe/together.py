"""The router of a single row in the launch of the site before it (mhc/together.py): choice and the experts' lists.

program (slice of 512 dims, share)   its slice of the collapsed row, as e4m3, and of the logits of a sixteenth of
                                     the experts their sums over it
one more                             post and comb of the site
the last                             of everybody's sums the experts
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triptych.kernels.mhc.meeting import begin, count, end, gathered, tell
from triptych.kernels.mhc.ref import Uncollapsed
from triptych.kernels.mhc.together import (
    PLACES,
    SHARES,
    WIDE,
    collapsed,
    keep_maps,
    pointers,
    put_rounded,
    shape_of,
    sizes,
    told_layout,
)
from triptych.kernels.moe.affinity import affinity
from triptych.kernels.moe.ref import Router
from triptych.kernels.quant.matrices import Fp8Rows

_SLOTS = gl.constexpr(8)  # experts of a row, at most


def route_together(row: Uncollapsed, token_ids: Tensor, router: Router) -> tuple[Tensor, Tensor, Tensor, Fp8Rows]:
    """What router.route_few gives, of a row whose site has not run. Fills its streams, post and comb."""
    dim, dev = row.streams.shape[2], row.streams.device
    experts, k = router.gate.shape[0], router.experts_per_token
    assert k <= _SLOTS.value
    weights = torch.empty(1, k, dtype=torch.float32, device=dev)
    tile = torch.empty(k, 3, dtype=torch.int32, device=dev)
    order = torch.empty(1, k, dtype=torch.int32, device=dev)
    values = torch.empty(1, dim, dtype=torch.float8_e4m3fn, device=dev)
    scales = torch.empty(dim // 128, 1, dtype=torch.float32, device=dev)
    hashed = router.tid2eid is not None
    site_and_router[(dim // WIDE.value * SHARES.value + 2,)](
        *(*pointers(row), router.gate, router.bias if router.bias is not None else weights),
        *(router.tid2eid if hashed else token_ids, token_ids, weights, tile, order, values, scales),
        *(router.scaling, *sizes(row)),
        HASHED=hashed,
        COUNT=experts,
        EXPERTS=triton.next_power_of_2(experts),
        EACH=triton.next_power_of_2(triton.cdiv(experts, SHARES.value)),
        TOPK=k,
        **shape_of(row),
    )
    return weights, tile, order, Fp8Rows(values, scales.T)


@gluon.constexpr_function
def _gate_layout():
    """[experts, columns]: a warp has every fourth expert."""
    return gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])


@gluon.jit
def site_and_router(
    y_ptr, before_ptr, post_ptr, comb_ptr, streams_ptr, new_post_ptr, new_comb_ptr, fn_ptr, base_ptr, scale_ptr,
    norm_ptr, meet_ptr, launch_ptr, gate_ptr, bias_ptr, table_ptr, token_ptr, weights_ptr, tile_ptr, order_ptr,
    values_ptr, scales_ptr, scaling, dim, eps, norm_eps,
    ITERS: gl.constexpr, HASHED: gl.constexpr, COUNT: gl.constexpr, EXPERTS: gl.constexpr, EACH: gl.constexpr,
    TOPK: gl.constexpr, SLICES: gl.constexpr,
):  # fmt: skip
    """weights [TOPK], tile [TOPK, 3], order [TOPK], e4m3 values [dim] and scales [dim / 128]; new streams, post and
    comb."""
    launch = begin(launch_ptr)
    slices = dim // WIDE
    piece, share = gl.program_id(0) // SHARES, gl.program_id(0) % SHARES
    logits_ptr = meet_ptr + PLACES * slices
    if piece < slices:
        e = share * EACH + gl.arange(0, EACH, gl.SliceLayout(1, _gate_layout()))
        d = piece * WIDE + gl.arange(0, WIDE, gl.SliceLayout(0, _gate_layout()))
        wanted = (e < COUNT)[:, None] & (d < dim)[None, :]
        x, gate, known = collapsed(
            y_ptr, before_ptr, post_ptr, comb_ptr, streams_ptr, fn_ptr, base_ptr, scale_ptr, norm_ptr, meet_ptr,
            launch_ptr, gate_ptr + e[:, None] * dim + d[None, :], wanted, launch, piece, share, dim, eps, norm_eps,
            False, SLICES,
        )  # fmt: skip
        columns = gl.convert_layout(x, gl.SliceLayout(0, _gate_layout())).to(gl.float32)
        part = gl.sum(gate.to(gl.float32) * columns[None, :], 1)
        tell(logits_ptr + piece * COUNT + e, part, launch, e < COUNT)
        end(launch_ptr, launch, known)
        put_rounded(x, values_ptr, scales_ptr, piece, share)
    elif share == 0:
        end(launch_ptr, launch, count(launch_ptr, launch))
        keep_maps(new_post_ptr, new_comb_ptr, base_ptr, scale_ptr, meet_ptr, launch, dim, eps, norm_eps, ITERS, SLICES)
    else:
        end(launch_ptr, launch, count(launch_ptr, launch))
        _choose(
            logits_ptr, launch, bias_ptr, table_ptr, token_ptr, weights_ptr, tile_ptr, order_ptr, scaling, slices,
            HASHED, COUNT, EXPERTS, TOPK, SLICES,
        )  # fmt: skip


@gluon.jit
def _choose(
    logits_ptr, launch, bias_ptr, table_ptr, token_ptr, weights_ptr, tile_ptr, order_ptr, scaling, slices,
    HASHED: gl.constexpr, COUNT: gl.constexpr, EXPERTS: gl.constexpr, TOPK: gl.constexpr, SLICES: gl.constexpr,
):  # fmt: skip
    """The experts, their weights, and a tile of one pair of each. Scores are compared as integers, NaN above all."""
    P: gl.constexpr = told_layout()
    LOWEST: gl.constexpr = -0x80000000
    e = gl.arange(0, EXPERTS, gl.SliceLayout(0, P))
    slot = gl.arange(0, _SLOTS, gl.SliceLayout(0, P))
    keep = slot < TOPK
    bias = gl.zeros([EXPERTS], gl.float32, gl.SliceLayout(0, P))
    ids = slot * 0
    chosen = slot * 0
    if HASHED:
        ids = gl.load(table_ptr + gl.load(token_ptr) * TOPK + slot, mask=keep, other=0).to(gl.int32)
    else:
        bias = gl.load(bias_ptr + e, mask=e < COUNT, other=0.0)
    s = gl.arange(0, SLICES, gl.SliceLayout(1, P))[:, None]
    there = (s < slices) & (e < COUNT)[None, :]
    logits = gl.sum(gathered(logits_ptr, s * COUNT + e[None, :], there, launch), 0)
    score = affinity(logits)
    key = (score + bias).to(gl.int32, bitcast=True)
    key = gl.where(key < 0, key ^ 0x7FFFFFFF, key)
    key = gl.where(e < COUNT, gl.where(logits == logits, key, 0x7FFFFFFF), LOWEST)
    score = gl.where(logits == logits, score, float("nan")).to(gl.int32, bitcast=True)
    for i in gl.static_range(TOPK):
        if HASHED:
            best = gl.sum(gl.where(slot == i, ids, 0), 0)
        else:
            best = gl.min(gl.where(key == gl.max(key, 0), e, COUNT - 1), 0)
            ids = gl.where(slot == i, best, ids)
        chosen = gl.where(slot == i, gl.max(gl.where(e == best, score, 0), 0), chosen)
        key = gl.where(e == best, LOWEST, key)
    weight = chosen.to(gl.float32, bitcast=True)
    gl.store(weights_ptr + slot, weight * (scaling / (gl.sum(weight, 0) + 1e-20)), mask=keep)
    gl.store(tile_ptr + slot * 3, ids, mask=keep)
    gl.store(tile_ptr + slot * 3 + 1, slot, mask=keep)
    gl.store(tile_ptr + slot * 3 + 2, slot * 0 + 1, mask=keep)
    gl.store(order_ptr + slot, slot, mask=keep)
