"""Routing and experts for NVIDIA GPUs.

Experts are a grouped product: the (row, expert) pairs sorted by expert, cut into tiles of pairs of one expert.

    pairs   e0 e0 e0 | e2 | e5 e5 e5 e5 e5 | ...        tile ends  [1, 1, 2, 2, 2, 4, ...]   for tiles of 4 pairs

A program finds its expert by counting tile ends, so the host need not know how many tiles there are: it launches as
many as there can be. Two launches: W13 with SwiGLU and the pair's weight, then W2; each row's pairs are then summed in
their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.gpu import is_hopper
from triptych.kernels.linear.triton import linear
from triptych.kernels.mhc.ref import Uncollapsed
from triptych.kernels.mhc.together import collapse
from triptych.kernels.moe import portable, ref
from triptych.kernels.moe.affinity import affinity
from triptych.kernels.moe.pairs import add_up, sorted_pairs, tile_of
from triptych.kernels.moe.ref import Experts, Rounding, Router
from triptych.kernels.moe.rows import moe_rows_on_gpu
from triptych.kernels.moe.sorted import experts_on_gpu
from triptych.kernels.quant.e4m3 import scale_of
from triptych.kernels.quant.matrices import Fp8Matrix, Fp8Rows, Matrix, Mxfp4Matrix
from triptych.kernels.quant.ref import fake_quant_fp8

_ROUNDED = 128  # rows from which on hidden values are rounded where they are made

FEW = 512
"""Rows up to which launches that stream every expert they need are the quicker way."""


def route(x: Tensor, token_ids: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """See ref.route."""
    return choose(_logits(x, router.gate), token_ids, router)


def choose(logits: Tensor, token_ids: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """Experts and weights, as ref.route gives them, from the gate's products [R, E] in float32."""
    rows, count = logits.shape
    k = router.experts_per_token
    ids = torch.empty(rows, k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(rows, k, device=logits.device)
    hashed = router.tid2eid is not None
    _route[(rows,)](
        *(logits, router.bias if router.bias is not None else logits, router.tid2eid if hashed else ids, token_ids),
        *(ids, weights, count, k, router.scaling),
        HASHED=hashed,
        EXPERTS=triton.next_power_of_2(count),
        K=triton.next_power_of_2(k),
        num_warps=1 if count <= 512 else 4,
    )
    return ids, weights


def _logits(x: Tensor, gate: Tensor) -> Tensor:
    """x gate^T in float32. Three bf16 numbers are a float32, and their products with bf16 rows are exact."""
    if not x.is_cuda or x.dtype != torch.bfloat16:
        return linear(x.float(), gate.float())
    high = gate.to(torch.bfloat16)
    rest = gate.float() - high
    middle = rest.to(torch.bfloat16)
    low = (rest - middle).to(torch.bfloat16)
    total = torch.mm(x, low.T, out_dtype=torch.float32)
    total += torch.mm(x, middle.T, out_dtype=torch.float32)
    return total.add_(torch.mm(x, high.T, out_dtype=torch.float32))


def experts(
    x: Tensor, ids: Tensor, weights: Tensor, moe: Experts, rounding: Rounding | None = None, tile: int | None = None
) -> Tensor:
    """See ref.experts. `tile`: pairs of a tile of dense weights, 64 or 16 by their number if not given."""
    if isinstance(moe.w13, Mxfp4Matrix):
        if not x.is_cuda or rounding is None:
            return ref.experts(x, ids, weights, moe, rounding)
        if moe.w13.tops is None:
            return portable.experts(x, ids, weights, moe)
        if _whole(moe):
            return experts_on_gpu(x, ids, weights, moe)
        # the reference waits for the GPU; released models have no such size
        return ref.experts(rounding(x.float()), ids, weights, moe, rounding).to(x.dtype)
    rows, k = ids.shape
    count, dim, inner = moe.w2.shape
    tile = tile or (16 if rows * k <= 16 * count else 64)
    pairs = sorted_pairs(ids, count, tile)
    hidden = torch.empty(rows * k, inner, device=x.device)
    narrow = moe.w13.dtype == torch.bfloat16
    shape = dict(PAIRS=tile, BLOCK=64, DEPTH=64, NARROW=narrow, num_warps=4, num_stages=3 if narrow else 2)
    experts_width = triton.next_power_of_2(count)
    x = x.contiguous()
    _up[(pairs.tiles, triton.cdiv(inner, 64))](
        *(x, moe.w13, weights.contiguous(), hidden, *pairs[:3], count, k, dim, inner, moe.limit),
        EXPERTS=experts_width,
        **shape,
    )
    if rounding is not None:
        hidden = rounding(hidden)
    each = torch.empty(rows * k, dim, device=x.device)
    _down[(pairs.tiles, triton.cdiv(dim, 64))](
        *(hidden, moe.w2, each, *pairs[:3], count, inner, dim), EXPERTS=experts_width, **shape
    )
    return add_up(each, rows, x.dtype)


def moe_rows(
    x: Tensor | Uncollapsed, token_ids: Tensor, router: Router, moe: Experts, shared: tuple[Matrix, Matrix]
) -> Tensor:
    """See ref.moe_rows. Experts in tiles, which are for Hopper, take two launches behind the router for few rows."""
    if isinstance(x, Uncollapsed):
        if isinstance(moe.w13, Mxfp4Matrix) and moe.w13.tops is not None:
            return moe_rows_on_gpu(x, token_ids, router, moe, shared)
        whole = collapse(x)
        assert isinstance(whole, Tensor)
        x = whole
    if not x.is_cuda or not isinstance(moe.w13, Mxfp4Matrix):
        return ref.moe_rows(x, token_ids, router, moe, shared)
    tiled = moe.w13.tops is not None
    if tiled and len(x) <= FEW:
        return moe_rows_on_gpu(x, token_ids, router, moe, shared)
    ids, weights = route(x, token_ids, router)
    beside = shared_expert(x, *shared, moe.limit)
    if tiled and _whole(moe):
        return experts_on_gpu(x, ids, weights, moe, beside)
    return experts(x, ids, weights, moe, fake_quant_fp8) + beside


def _whole(moe: Experts) -> bool:
    """Whether sorted.py can multiply them: in whole steps of 256 columns."""
    return not moe.w2.shape[1] % 256 and not moe.w2.shape[2] % 256


def shared_expert(x: Tensor, w13: Matrix, w2: Matrix, limit: float, rounding: Rounding | None = None) -> Tensor:
    """See ref.shared_expert. Of many rows the product rounds hidden values itself, and so what makes them may do it."""
    inner = w2.shape[1]
    wide = len(x) >= _ROUNDED and inner % 128 == 0
    if wide and rounding is None and isinstance(w2, Fp8Matrix) and is_hopper(x.device):
        return linear(_swiglu_rows(linear(x, w13), inner, limit), w2)
    hidden = swiglu(linear(x, w13), inner, limit, x.dtype)
    return linear(hidden if rounding is None else rounding(hidden), w2)


def swiglu(gate_up: Tensor, inner: int, limit: float, dtype: torch.dtype) -> Tensor:
    """See ref.swiglu; gate_up [R, 2 * inner] -> [R, inner] in `dtype`."""
    hidden = torch.empty(len(gate_up), inner, dtype=dtype, device=gate_up.device)
    _swiglu[(len(gate_up), triton.cdiv(inner, 1024))](gate_up, hidden, inner, limit, BLOCK=1024)
    return hidden


def _swiglu_rows(gate_up: Tensor, inner: int, limit: float) -> Fp8Rows:
    """`swiglu` rounded to e4m3, scales column by column as products of many rows read them; inner in whole groups."""
    rows = len(gate_up)
    values = torch.empty(rows, inner, dtype=torch.float8_e4m3fn, device=gate_up.device)
    scales = torch.empty(inner // 128, rows, device=gate_up.device)
    _swiglu_groups[(rows, triton.cdiv(inner, 1024))](gate_up, values, scales, inner, limit, GROUPS=8, num_warps=4)
    return Fp8Rows(values, scales.T)


@triton.jit
def _route(
    logits_ptr,
    bias_ptr,
    table_ptr,
    token_ptr,
    ids_ptr,
    weights_ptr,
    count,
    k,
    scaling,
    HASHED: tl.constexpr,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, EXPERTS)
    slot = tl.arange(0, K)
    x = tl.load(logits_ptr + r * count + e, mask=e < count, other=0.0)
    score = affinity(x)
    chosen = tl.zeros([K], tl.float32)
    ids = tl.zeros([K], tl.int64)
    if HASHED:
        line = table_ptr + tl.load(token_ptr + r) * k
        ids = tl.load(line + slot, mask=slot < k, other=0)
        picked = tl.load(logits_ptr + r * count + ids, mask=slot < k, other=0.0)
        chosen = tl.where(slot < k, affinity(picked), 0.0)
    else:
        left = score + tl.load(bias_ptr + e, mask=e < count, other=0.0)
        left = tl.where(e < count, left, float("-inf"))
        for i in range(k):
            best = tl.minimum(tl.argmax(left, 0), count - 1)  # where all are NaN any index may come back
            ids = tl.where(slot == i, best.to(tl.int64), ids)
            chosen = tl.where(slot == i, tl.sum(tl.where(e == best, score, 0.0), 0), chosen)
            left = tl.where(e == best, float("-inf"), left)
    weights = chosen * (scaling / (tl.sum(chosen, 0) + 1e-20))
    tl.store(ids_ptr + r * k + slot, ids, mask=slot < k)
    tl.store(weights_ptr + r * k + slot, weights, mask=slot < k)


@triton.jit
def _dot(a, b, acc, NARROW: tl.constexpr):
    if NARROW:
        return tl.dot(a.to(tl.bfloat16), b, acc)
    else:
        return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def _up(
    x_ptr,
    w13_ptr,
    weights_ptr,
    hidden_ptr,
    order_ptr,
    ends_ptr,
    tile_ends_ptr,
    count,
    k,
    dim,
    inner,
    limit,
    EXPERTS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    NARROW: tl.constexpr,
):
    expert, place, valid = tile_of(ends_ptr, tile_ends_ptr, count, PAIRS, EXPERTS)
    if expert < count:
        pair = tl.load(order_ptr + place, mask=valid, other=0)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        d = tl.arange(0, DEPTH)
        rows_ptr = x_ptr + (pair // k)[:, None] * dim + d[None, :]
        gate_ptr = w13_ptr + expert * 2 * inner * dim + n[None, :] * dim + d[:, None]
        gate = tl.zeros([PAIRS, BLOCK], tl.float32)
        up = tl.zeros([PAIRS, BLOCK], tl.float32)
        for at in range(0, dim, DEPTH):
            deep = at + d < dim
            x = tl.load(rows_ptr + at, mask=valid[:, None] & deep[None, :], other=0.0)
            mine = (n < inner)[None, :] & deep[:, None]
            gate = _dot(x, tl.load(gate_ptr + at, mask=mine, other=0.0), gate, NARROW)
            up = _dot(x, tl.load(gate_ptr + at + inner * dim, mask=mine, other=0.0), up, NARROW)
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        y = gate * tl.sigmoid(gate) * up * tl.load(weights_ptr + pair, mask=valid, other=0.0)[:, None]
        tl.store(hidden_ptr + pair[:, None] * inner + n[None, :], y, mask=valid[:, None] & (n < inner)[None, :])


@triton.jit
def _down(
    hidden_ptr,
    w2_ptr,
    out_ptr,
    order_ptr,
    ends_ptr,
    tile_ends_ptr,
    count,
    inner,
    dim,
    EXPERTS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    NARROW: tl.constexpr,
):
    expert, place, valid = tile_of(ends_ptr, tile_ends_ptr, count, PAIRS, EXPERTS)
    if expert < count:
        pair = tl.load(order_ptr + place, mask=valid, other=0)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        d = tl.arange(0, DEPTH)
        rows_ptr = hidden_ptr + pair[:, None] * inner + d[None, :]
        down_ptr = w2_ptr + expert * dim * inner + n[None, :] * inner + d[:, None]
        y = tl.zeros([PAIRS, BLOCK], tl.float32)
        for at in range(0, inner, DEPTH):
            deep = at + d < inner
            h = tl.load(rows_ptr + at, mask=valid[:, None] & deep[None, :], other=0.0)
            y = _dot(h, tl.load(down_ptr + at, mask=(n < dim)[None, :] & deep[:, None], other=0.0), y, NARROW)
        tl.store(out_ptr + pair[:, None] * dim + n[None, :], y, mask=valid[:, None] & (n < dim)[None, :])


@triton.jit
def _hidden(gate_up_ptr, n, inner, limit):
    """Hidden values n of a row."""
    gate = tl.load(gate_up_ptr + n, mask=n < inner, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + inner + n, mask=n < inner, other=0.0).to(tl.float32)
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return gate * tl.sigmoid(gate) * up


@triton.jit
def _swiglu(gate_up_ptr, out_ptr, inner, limit, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + r * inner + n, _hidden(gate_up_ptr + r * 2 * inner, n, inner, limit), mask=n < inner)


@triton.jit
def _swiglu_groups(gate_up_ptr, values_ptr, scales_ptr, inner, limit, GROUPS: tl.constexpr):
    """GROUPS groups of 128 hidden values of a row, rounded; scales [inner / 128, rows]."""
    r = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    n = g[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = _hidden(gate_up_ptr + r * 2 * inner, n, inner, limit)
    scale, inverse = scale_of(tl.max(tl.abs(x), 1))
    tl.store(values_ptr + r * inner + n, (x * inverse[:, None]).to(tl.float8e4nv), mask=n < inner)
    tl.store(scales_ptr + g * tl.num_programs(0) + r, scale, mask=g * 128 < inner)
