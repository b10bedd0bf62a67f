"""Experts of many rows from released weights: pairs sorted by expert, rounded, multiplied (many.py), added up."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from triptych.kernels.gpu import multiprocessors
from triptych.kernels.moe import many
from triptych.kernels.moe.ref import Experts
from triptych.kernels.moe.tiled import blocks_of, descriptors
from triptych.kernels.quant.e4m3 import scale_of
from triptych.kernels.quant.matrices import Mxfp4Matrix


class Tiling(NamedTuple):
    """Of a launch: blocks of 128 columns a stage, tiles of 64 weight rows, programs a multiprocessor; stages of wide
    pieces, of 128 pairs, and of narrow ones, of 64."""

    blocks: int
    tiles: int
    programs: int
    wide: int
    narrow: int


TILING = Tiling(2, 1, 2, 2, 3)
HIDDEN = torch.float32
"""What hidden values are kept in until they are rounded."""

EACH = torch.bfloat16
"""What a pair's outputs are kept in until they are added up, in float32."""

_WIDE = 128


class _Pieces(NamedTuple):
    """`width` pairs or fewer of one expert each: [.., 3] int32 (expert, first pair, pairs), and how many [1] int32."""

    width: int
    table: Tensor
    total: Tensor


def experts_on_gpu(x: Tensor, ids: Tensor, weights: Tensor, moe: Experts, beside: Tensor | None = None) -> Tensor:
    """See ref.experts, in native numerics, experts in tiles; `beside` [R, d] is added. Does not synchronise.

    Takes per pair: 1 byte a column of x, 5 of the hidden values, 2 of the output.
    """
    w13, w2 = moe.w13, moe.w2
    assert isinstance(w13, Mxfp4Matrix) and isinstance(w2, Mxfp4Matrix)
    assert w13.tops is not None and w13.paired and w2.tops is not None, "experts are not in tiles"
    rows, k = ids.shape
    count, dim, inner = w2.shape
    pairs, dev = rows * k, x.device
    flat, order = torch.sort(ids.flatten(), stable=True)
    pieces = _pieces(flat, count)
    gates = weights.flatten()[order].float()
    padded = -(-pairs // 128) * 128 + 128
    inputs = _rounded(x.contiguous(), order, pairs, padded, k)
    hidden = torch.empty(pairs, inner, dtype=HIDDEN, device=dev)
    for some in pieces:
        _launch(many.up, inputs, w13, some, gates, w13.tops, hidden, moe.limit)
    inputs = _rounded(hidden, order, pairs, padded, 0)
    del hidden
    each = torch.empty(pairs, dim, dtype=EACH, device=dev)
    for some in pieces:
        _launch(many.down, inputs, w2, some, w2.tops, each)
    place = torch.empty_like(order)
    place[order] = torch.arange(pairs, device=dev)
    out = torch.empty(rows, dim, dtype=x.dtype, device=dev)
    _add_up[(rows, triton.cdiv(dim, 1024))](
        *(each, place, x if beside is None else beside, out, dim),
        K=k,
        BESIDE=beside is not None,
        BLOCK=1024,
        num_warps=4,
    )
    return out


def _launch(kernel: Any, inputs: tuple[Tensor, Tensor], matrix: Mxfp4Matrix, pieces: _Pieces, *rest: Any) -> None:
    x, scales = inputs
    columns = matrix.shape[2]
    blocks = blocks_of(columns, TILING.blocks)
    stages = TILING.wide if pieces.width == _WIDE else TILING.narrow
    kernel[(TILING.programs * multiprocessors(x.device),)](
        TensorDescriptor.from_tensor(x, [pieces.width, 128], gl.NVMMASharedLayout(128, 8)),
        *(*descriptors(matrix, TILING.tiles, blocks), scales, scales.shape[1], pieces.table, pieces.total, *rest),
        ROWS=matrix.shape[1],
        K=columns,
        N=pieces.width,
        KS=blocks,
        TILES=TILING.tiles,
        STAGES=min(stages, columns // 128 // blocks),
        num_warps=4 * TILING.tiles,
    )


def _pieces(flat: Tensor, count: int) -> tuple[_Pieces, _Pieces]:
    """Wide and narrow pieces of sorted experts `flat` [pairs]; a narrow one is the rest of an expert's."""
    pairs, dev = len(flat), flat.device
    ends = torch.searchsorted(flat, torch.arange(count, device=dev), right=True)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    rest = (ends - starts) % _WIDE
    narrow = ((rest > 0) & (rest <= _WIDE // 2)).long()
    wide = (ends - starts + _WIDE - 1) // _WIDE - narrow
    return (
        _table(_WIDE, starts, ends, wide, min(pairs, pairs // _WIDE + count)),
        _table(_WIDE // 2, starts + wide * _WIDE, ends, narrow, min(pairs, count)),
    )


def _table(width: int, starts: Tensor, ends: Tensor, pieces: Tensor, most: int) -> _Pieces:
    """`pieces` [experts] of each expert from `starts` on, no more than `most` of all."""
    piece_ends = torch.cumsum(pieces, 0)
    t = torch.arange(most, device=starts.device)
    expert = torch.searchsorted(piece_ends, t, right=True).clamp(max=len(starts) - 1)
    first = starts[expert] + (t - (piece_ends - pieces)[expert]) * width
    size = (ends[expert] - first).clamp(max=width)
    return _Pieces(width, torch.stack([expert, first, size], 1).to(torch.int32), piece_ends[-1:].to(torch.int32))


def _rounded(x: Tensor, order: Tensor, pairs: int, padded: int, k: int) -> tuple[Tensor, Tensor]:
    """Rows of the sorted pairs in e4m3, columns in the order of many.py, and scales [width / 128, padded].

    With k = 0 x has the sorted pairs' rows already.
    """
    width = x.shape[1]
    values = torch.empty(pairs, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(width // 128, padded, dtype=torch.float32, device=x.device)
    _round_sorted[(pairs, triton.cdiv(width, 1024))](
        x, order, values, scales, width, padded, K=k, GROUPS=8, num_warps=4
    )
    return values, scales


@triton.jit
def _round_sorted(x_ptr, order_ptr, values_ptr, scales_ptr, width, padded, K: tl.constexpr, GROUPS: tl.constexpr):
    p = tl.program_id(0).to(tl.int64)
    row = p
    if K > 0:
        row = tl.load(order_ptr + p) // K
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    d = tl.arange(0, 128)
    there = (g * 128 < width)[:, None] & (d >= 0)[None, :]
    x = tl.load(x_ptr + row * width + g[:, None] * 128 + d[None, :], mask=there, other=0.0).to(tl.float32)
    scale, inverse = scale_of(tl.max(tl.abs(x), 1))
    slot = d // 8 % 4 * 32 + d // 4 % 2 * 16 + d // 32 * 4 + d % 4
    at = values_ptr + p * width + g[:, None] * 128 + slot[None, :]
    tl.store(at, (x * inverse[:, None]).to(tl.float8e4nv), mask=there)
    tl.store(scales_ptr + g * padded + p, scale, mask=g * 128 < width)


@triton.jit
def _add_up(each_ptr, place_ptr, beside_ptr, out_ptr, dim, K: tl.constexpr, BESIDE: tl.constexpr, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(K):
        total += tl.load(each_ptr + tl.load(place_ptr + r * K + s) * dim + d, mask=d < dim, other=0.0).to(tl.float32)
    if BESIDE:
        total += tl.load(beside_ptr + r * dim + d, mask=d < dim, other=0.0).to(tl.float32)
    tl.store(out_ptr + r * dim + d, total.to(out_ptr.dtype.element_ty), mask=d < dim)
