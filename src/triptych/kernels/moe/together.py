"""The router of few rows in the launch of the site before it (mhc/together.py): choice and the experts' lists.

    program (slice of 512 dims, share)   its slice of the collapsed rows, as e4m3, and of the logits of a sixteenth of
                                         the experts their sums over it
    one more a row                       post and comb of the site
    the last                             of everybody's sums the experts of all rows

An expert's pairs, one a row at most, are a tile.
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
)
from triptych.kernels.moe.affinity import affinity
from triptych.kernels.moe.ref import Router
from triptych.kernels.quant.matrices import Fp8Rows


def route_together(row: Uncollapsed, token_ids: Tensor, router: Router) -> tuple[Tensor, Tensor, Tensor, Fp8Rows]:
    """What router.route_few gives, of few rows whose site has not run. Fills their streams, post and comb."""
    rows, _, dim = row.streams.shape
    dev = row.streams.device
    experts, k = router.gate.shape[0], router.experts_per_token
    weights = torch.empty(rows, k, dtype=torch.float32, device=dev)
    tile = torch.empty(rows * k, 3, dtype=torch.int32, device=dev)
    order = torch.empty(rows * k, rows, dtype=torch.int32, device=dev)
    values = torch.empty(rows, dim, dtype=torch.float8_e4m3fn, device=dev)
    scales = torch.empty(dim // 128, rows, dtype=torch.float32, device=dev)
    hashed = router.tid2eid is not None
    site_and_router[(dim // WIDE.value * SHARES.value + rows + 1,)](
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
    """[rows, experts, columns]: a warp has every fourth expert."""
    return gl.BlockedLayout([1, 1, 4], [1, 1, 32], [1, 4, 1], [2, 1, 0])


@gluon.constexpr_function
def _parts_layout():
    """[rows, slices, experts]: a warp has every fourth slice, and every warp all experts of their sums."""
    return gl.BlockedLayout([1, 1, 2], [1, 1, 32], [1, 4, 1], [2, 1, 0])


@gluon.constexpr_function
def _pairs_layout():
    """[pairs, pairs]."""
    return gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])


@gluon.jit(do_not_specialize=["rows"])
def site_and_router(
    y_ptr, before_ptr, post_ptr, comb_ptr, streams_ptr, new_post_ptr, new_comb_ptr, fn_ptr, base_ptr, scale_ptr,
    norm_ptr, meet_ptr, launch_ptr, gate_ptr, bias_ptr, table_ptr, token_ptr, weights_ptr, tile_ptr, order_ptr,
    values_ptr, scales_ptr, scaling, rows, dim, eps, norm_eps,
    ITERS: gl.constexpr, HASHED: gl.constexpr, COUNT: gl.constexpr, EXPERTS: gl.constexpr, EACH: gl.constexpr,
    TOPK: gl.constexpr, ROWS: gl.constexpr, SLICES: gl.constexpr,
):  # fmt: skip
    """weights [rows, TOPK], tile [rows * TOPK, 3], order [rows * TOPK, rows], e4m3 values [rows, dim] and scales
    [dim / 128, rows]; new streams, post and comb."""
    launch = begin(launch_ptr)
    slices = dim // WIDE
    piece, share = gl.program_id(0) // SHARES, gl.program_id(0) % SHARES
    logits_ptr = meet_ptr + PLACES * slices * rows
    if piece < slices:
        beside, wanted = _gate(gate_ptr, piece, share, dim, COUNT, EACH)
        x, gate, known = collapsed(
            y_ptr, before_ptr, post_ptr, comb_ptr, streams_ptr, fn_ptr, base_ptr, scale_ptr, norm_ptr, meet_ptr,
            launch_ptr, beside, wanted, launch, piece, share, rows, dim, eps, norm_eps, False, ROWS, SLICES,
        )  # fmt: skip
        _tell_logits(x, gate, logits_ptr, launch, piece, share, rows, slices, COUNT, EACH, ROWS)
        end(launch_ptr, launch, known)
        put_rounded(x, values_ptr, scales_ptr, 1, rows, piece, share, rows, dim, ROWS)
    elif share < rows:
        end(launch_ptr, launch, count(launch_ptr, launch))
        keep_maps(
            new_post_ptr, new_comb_ptr, base_ptr, scale_ptr, meet_ptr, launch, share, rows, dim, eps, norm_eps, ITERS,
            SLICES,
        )  # fmt: skip
    else:
        end(launch_ptr, launch, count(launch_ptr, launch))
        ids = _choose(
            logits_ptr, launch, bias_ptr, table_ptr, token_ptr, weights_ptr, scaling, rows, slices, HASHED, COUNT,
            EXPERTS, TOPK, ROWS, SLICES,
        )  # fmt: skip
        _list(ids, tile_ptr, order_ptr, rows, TOPK, ROWS)


@gluon.jit
def _gate(gate_ptr, piece, share, dim, COUNT: gl.constexpr, EACH: gl.constexpr):
    """Where a slice of the share's experts' weights [EACH, WIDE] lies, and of which there are any."""
    G: gl.constexpr = gl.SliceLayout(0, _gate_layout())
    e = share * EACH + gl.arange(0, EACH, gl.SliceLayout(1, G))
    d = piece * WIDE + gl.arange(0, WIDE, gl.SliceLayout(0, G))
    return gate_ptr + e[:, None] * dim + d[None, :], (e < COUNT)[:, None] & (d < dim)[None, :]


@gluon.jit
def _tell_logits(
    x, gate, logits_ptr, launch, piece, share, rows, slices, COUNT: gl.constexpr, EACH: gl.constexpr, ROWS: gl.constexpr
):
    """What the slice x of rows adds to the logits of the share's experts."""
    G: gl.constexpr = _gate_layout()
    each = gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, G)), 1).to(gl.float32)
    part = gl.sum(gl.expand_dims(gate.to(gl.float32), 0) * each, 2)
    r = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, G)))[:, None]
    e = share * EACH + gl.arange(0, EACH, gl.SliceLayout(0, gl.SliceLayout(2, G)))[None, :]
    tell(logits_ptr + (r * slices + piece) * COUNT + e, part, launch, (r < rows) & (e < COUNT))


@gluon.jit
def _choose(
    logits_ptr, launch, bias_ptr, table_ptr, token_ptr, weights_ptr, scaling, rows, slices,
    HASHED: gl.constexpr, COUNT: gl.constexpr, EXPERTS: gl.constexpr, TOPK: gl.constexpr, ROWS: gl.constexpr,
    SLICES: gl.constexpr,
):  # fmt: skip
    """Experts [ROWS, 8] of all rows; stores their weights. Scores are compared as integers, NaN above all."""
    P: gl.constexpr = _parts_layout()
    R: gl.constexpr = gl.SliceLayout(1, P)
    LOWEST: gl.constexpr = -0x80000000
    e = gl.arange(0, EXPERTS, gl.SliceLayout(0, R))[None, :]
    slot = gl.arange(0, 8, gl.SliceLayout(0, R))[None, :]
    r = gl.arange(0, ROWS, gl.SliceLayout(1, R))[:, None]
    keep = (slot < TOPK) & (r < rows)
    bias = gl.zeros([1, EXPERTS], gl.float32, R)
    ids = gl.zeros([ROWS, 8], gl.int32, R)
    if HASHED:
        token = gl.load(token_ptr + r, mask=r < rows, other=0)
        ids = gl.load(table_ptr + token * TOPK + slot, mask=keep, other=0).to(gl.int32)
    else:
        bias = gl.load(bias_ptr + e, mask=e < COUNT, other=0.0)
    at_r = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, R))[:, None], 1)
    at_s = gl.expand_dims(gl.arange(0, SLICES, gl.SliceLayout(0, gl.SliceLayout(2, P)))[None, :], 2)
    at_e = gl.expand_dims(e, 1)
    there = (at_r < rows) & (at_s < slices) & (at_e < COUNT)
    logits = gl.sum(gathered(logits_ptr, (at_r * slices + at_s) * COUNT + at_e, there, launch), 1)
    score = affinity(logits)
    key = (score + bias).to(gl.int32, bitcast=True)
    key = gl.where(key < 0, key ^ 0x7FFFFFFF, key)
    key = gl.where(e < COUNT, gl.where(logits == logits, key, 0x7FFFFFFF), LOWEST)
    score = gl.where(logits == logits, score, float("nan")).to(gl.int32, bitcast=True)
    chosen = gl.zeros([ROWS, 8], gl.int32, R)
    for i in gl.static_range(TOPK):
        if HASHED:
            best = gl.sum(gl.where(slot == i, ids, 0), 1)[:, None]
        else:
            highest = key == gl.max(key, 1)[:, None]
            best = gl.min(gl.where(highest, e, COUNT - 1), 1)[:, None]
            ids = gl.where(slot == i, best, ids)
        chosen = gl.where(slot == i, gl.max(gl.where(e == best, score, 0), 1)[:, None], chosen)
        key = gl.where(e == best, LOWEST, key)
    weight = chosen.to(gl.float32, bitcast=True)
    weight = weight * (scaling / (gl.sum(weight, 1) + 1e-20))[:, None]
    gl.store(weights_ptr + r * TOPK + slot, weight, mask=keep)
    return ids


@gluon.jit
def _list(ids, tile_ptr, order_ptr, rows, TOPK: gl.constexpr, ROWS: gl.constexpr):
    """Tiles of the pairs of each expert in ids [ROWS, 8], and -1 behind them."""
    Q: gl.constexpr = _pairs_layout()
    N: gl.constexpr = ROWS * 8
    ids = gl.reshape(ids, [N])
    one = gl.convert_layout(ids, gl.SliceLayout(1, Q))[:, None]
    p = gl.arange(0, N, gl.SliceLayout(1, Q))[:, None]
    q = gl.arange(0, N, gl.SliceLayout(0, Q))[None, :]
    there = (p % 8 < TOPK) & (p // 8 < rows)
    same = there & (q % 8 < TOPK) & (q // 8 < rows) & (one == gl.convert_layout(ids, gl.SliceLayout(0, Q))[None, :])
    rank = gl.sum((same & (q < p)).to(gl.int32), 1)[:, None]
    first = gl.min(gl.where(same, q, N - 1), 1)[:, None]
    gl.store(order_ptr + (first // 8 * TOPK + first % 8) * rows + rank, p // 8 * TOPK + p % 8, mask=there)
    leads = there & (rank == 0)
    others = (gl.sum((same & (p < q)).to(gl.int32), 0) == 0)[None, :] & (q % 8 < TOPK) & (q // 8 < rows)
    at = tile_ptr + gl.sum((others & (q < p)).to(gl.int32), 1)[:, None] * 3
    gl.store(at, one, mask=leads)
    gl.store(at + 1, (p // 8 * TOPK + p % 8) * rows, mask=leads)
    gl.store(at + 2, gl.sum(same.to(gl.int32), 1)[:, None], mask=leads)
    used = gl.sum(gl.sum(leads.to(gl.int32), 1), 0)
    gl.store(tile_ptr + p * 3, p * 0 - 1, mask=(p >= used) & (p < rows * TOPK))
