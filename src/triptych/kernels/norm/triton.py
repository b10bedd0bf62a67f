"""Norms and rotations for NVIDIA GPUs: one program for each vector that is normed, one pass over it.

A rotation needs each dim's partner; it is loaded beside it, from the cache line that is there anyway.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.front.store import power_of_two, round_fp4


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See ref.rms_norm; x [..., d] in float32 or a narrower type."""
    flat = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(flat)
    _vectors(flat, (len(flat), 1, flat.shape[1]), out, weight, None, eps)
    return out.view(x.shape)


def latent_rows(
    front: Tensor,
    q_lora: int,
    norms: tuple[Tensor, Tensor],
    angles: tuple[Tensor, Tensor],
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """See ref.latent_rows."""
    rows, dim = len(front), norms[1].shape[0]
    kind = dtype or front.dtype
    qr, kv = front.new_empty(rows, q_lora, dtype=kind), front.new_empty(rows, dim, dtype=kind)
    _latent[(rows, 2)](
        *(front, front.stride(0), qr, kv, norms[0], norms[1], angles[0], angles[1], q_lora, dim),
        *(2 * angles[0].shape[1], eps),
        QUERY=triton.next_power_of_2(q_lora),
        DIM=triton.next_power_of_2(dim),
    )
    return qr, kv


def query_rows(heads: Tensor, count: int, dim: int, angles: tuple[Tensor, Tensor], eps: float) -> Tensor:
    """See ref.query_rows."""
    out = heads.new_empty(len(heads), count, dim)
    _vectors(heads, (len(heads), count, dim), out, None, angles, eps)
    return out


def index_query_rows(heads: Tensor, count: int, dim: int, angles: tuple[Tensor, Tensor]) -> Tensor:
    """See ref.index_query_rows."""
    tail = heads[:, -count * dim :]
    out = heads.new_empty(len(heads), count, dim)
    _vectors(tail, (len(heads), count, dim), out, None, angles)
    return out


def index_round(x: Tensor) -> Tensor:
    """See ref.index_round; Di a power of two."""
    flat = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(flat)
    dim = flat.shape[1]
    assert dim & (dim - 1) == 0, "the Hadamard rotation needs a power of two"
    if len(flat):
        _index_round[(triton.cdiv(len(flat), _ROUNDED),)](
            *(flat, flat.stride(0), out, len(flat)),
            ROWS=_ROUNDED,
            DIM=dim,
            STEPS=dim.bit_length() - 1,
            ROOT=math.sqrt(dim),
            GROUP=min(dim, 32),
            num_warps=4,
        )
    return out.view(x.shape)


_ROUNDED = 16  # vectors that one program rounds


def derotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """See ref.derotate."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _vectors(x, (x.shape[0], x.shape[1], x.shape[2]), out, None, angles, back=True)
    return out


def _vectors(
    x: Tensor,
    size: tuple[int, int, int],
    out: Tensor,
    weight: Tensor | None = None,
    angles: tuple[Tensor, Tensor] | None = None,
    eps: float | None = None,
    back: bool = False,
) -> None:
    """Norm (if there is an `eps`) and rotate vectors of `dim` values, which follow each other in rows of x.

    size = (rows, heads, dim); fills out [rows, heads, dim].
    """
    rows, heads, dim = size
    cos, sin = (x, x) if angles is None else angles
    if not rows:
        return
    if weight is None and angles is not None and dim & (dim - 1) == 0 and heads >= _HEADS:
        _heads_rope[(rows, triton.cdiv(heads, _HEADS))](
            *(x, x.stride(0), out, cos, sin, heads, -1.0 if back else 1.0, eps or 0.0),
            NORM=eps is not None,
            WIDTH=2 * cos.shape[1],
            HEADS=_HEADS,
            DIM=dim,
            num_warps=4,
        )
        return
    _norm_rope[(rows, heads)](
        *(x, x.stride(0), out, x if weight is None else weight, cos, sin, dim),
        *(0 if angles is None else 2 * cos.shape[1], -1.0 if back else 1.0, eps or 0.0),
        NORM=eps is not None,
        WEIGHT=weight is not None,
        ROPE=angles is not None,
        DIM=triton.next_power_of_2(dim),
    )


_HEADS = 8  # vectors of a row that one program norms and rotates where there are that many


@triton.jit
def _heads_rope(
    x_ptr,
    stride,
    out_ptr,
    cos_ptr,
    sin_ptr,
    heads,
    sign,
    eps,
    NORM: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    """As `_norm_rope` for several vectors of a row, whose number of dims is a power of two."""
    r = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at = h[:, None] * DIM + tl.arange(0, DIM)[None, :]
    x = tl.load(x_ptr + r * stride + at, mask=(h < heads)[:, None], other=0.0).to(tl.float32)
    if NORM:
        x = x * tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None]
    pair = tl.arange(0, DIM // 2) - (DIM - WIDTH) // 2
    turns = pair >= 0
    cos = tl.load(cos_ptr + r * (WIDTH // 2) + pair, mask=turns, other=1.0)[None, :]
    sin = tl.load(sin_ptr + r * (WIDTH // 2) + pair, mask=turns, other=0.0)[None, :] * sign
    even, odd = tl.split(tl.reshape(x, [HEADS, DIM // 2, 2]))
    x = tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [HEADS, DIM])
    tl.store(out_ptr + r * heads * DIM + at, x.to(out_ptr.dtype.element_ty), mask=(h < heads)[:, None])


@triton.jit
def _turned(x, partner, cos_ptr, sin_ptr, d, dim, width, sign):
    """The last `width` of `dim` values rotated; pair i is dims (2i, 2i+1) of them."""
    at = d - (dim - width)
    turns = (at >= 0) & (d < dim)
    cos = tl.load(cos_ptr + at // 2, mask=turns, other=1.0)
    sin = tl.load(sin_ptr + at // 2, mask=turns, other=0.0) * sign
    return x * cos + tl.where(at % 2 == 0, -partner, partner) * sin


@triton.jit
def _partners(d, dim, width):
    """Index of each dim's partner; itself where it does not rotate."""
    at = d - (dim - width)
    return tl.where(at >= 0, dim - width + (at ^ 1), d)


@triton.jit
def _norm_rope(
    x_ptr,
    stride,
    out_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    dim,
    width,
    sign,
    eps,
    NORM: tl.constexpr,
    WEIGHT: tl.constexpr,
    ROPE: tl.constexpr,
    DIM: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    d = tl.arange(0, DIM)
    here = x_ptr + r * stride + h * dim
    x = tl.load(here + d, mask=d < dim, other=0.0).to(tl.float32)
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 0) / dim + eps)
    x = x * scale
    if WEIGHT:
        x = x * tl.load(weight_ptr + d, mask=d < dim, other=0.0)
    if ROPE:
        p = _partners(d, dim, width)
        partner = tl.load(here + p, mask=p < dim, other=0.0).to(tl.float32) * scale
        if WEIGHT:
            partner = partner * tl.load(weight_ptr + p, mask=p < dim, other=0.0)
        x = _turned(x, partner, cos_ptr + r * (width // 2), sin_ptr + r * (width // 2), d, dim, width, sign)
    tl.store(out_ptr + (r * tl.num_programs(1) + h) * dim + d, x, mask=d < dim)


@triton.jit
def _index_round(
    x_ptr,
    stride,
    out_ptr,
    rows,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    STEPS: tl.constexpr,
    ROOT: tl.constexpr,
    GROUP: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DIM)
    live = (r < rows)[:, None]
    x = tl.load(x_ptr + r[:, None] * stride + d[None, :], mask=live, other=0.0).to(tl.bfloat16).to(tl.float32)
    for _ in tl.static_range(STEPS):  # each turns the index by one bit
        a, b = tl.split(tl.reshape(x, [ROWS, DIM // 2, 2]))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [ROWS, DIM])
    x = tl.div_rn(x, tl.full([ROWS, DIM], ROOT, tl.float32)).to(tl.bfloat16).to(tl.float32)
    grid, code = round_fp4(tl.reshape(x, [ROWS * (DIM // GROUP), GROUP]))
    x = tl.reshape(grid * power_of_two(code)[:, None], [ROWS, DIM])
    tl.store(out_ptr + r[:, None] * DIM + d[None, :], x.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _latent(
    front_ptr,
    stride,
    query_ptr,
    kv_ptr,
    query_norm_ptr,
    kv_norm_ptr,
    cos_ptr,
    sin_ptr,
    query,
    dim,
    width,
    eps,
    QUERY: tl.constexpr,
    DIM: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    here = front_ptr + r * stride
    if tl.program_id(1) == 0:
        i = tl.arange(0, QUERY)
        low = tl.load(here + i, mask=i < query, other=0.0).to(tl.float32)
        low = low * tl.rsqrt(tl.sum(low * low, 0) / query + eps)
        low = low * tl.load(query_norm_ptr + i, mask=i < query, other=0.0)
        tl.store(query_ptr + r * query + i, low, mask=i < query)
    else:
        d = tl.arange(0, DIM)
        p = _partners(d, dim, width)
        x = tl.load(here + query + d, mask=d < dim, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 0) / dim + eps)
        x = x * scale * tl.load(kv_norm_ptr + d, mask=d < dim, other=0.0)
        partner = tl.load(here + query + p, mask=p < dim, other=0.0).to(tl.float32)
        partner = partner * scale * tl.load(kv_norm_ptr + p, mask=p < dim, other=0.0)
        x = _turned(x, partner, cos_ptr + r * (width // 2), sin_ptr + r * (width // 2), d, dim, width, 1.0)
        tl.store(kv_ptr + r * dim + d, x, mask=d < dim)
