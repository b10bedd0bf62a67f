"""Experts of many rows from released weights: pairs placed by expert, rounded, multiplied (many.py), added up.

Where a pair stands among those of its expert depends on who came first, and no result on that: its products are its
own, and a row's are added in the order of its choices.
"""

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
    place, gates, inputs, pieces = place_and_round(x, ids, weights, count)
    hidden = torch.empty(pairs, inner, dtype=HIDDEN, device=dev)
    for some in pieces:
        _launch(many.up, inputs, w13, some, gates, w13.tops, hidden, moe.limit)
    inputs = _room(pairs, inner, dev)
    _round_hidden[(pairs, triton.cdiv(inner, 1024))](hidden, *inputs, inner, inputs[1].shape[1], GROUPS=8, num_warps=4)
    del hidden
    each = torch.empty(pairs, dim, dtype=EACH, device=dev)
    for some in pieces:
        _launch(many.down, inputs, w2, some, w2.tops, each)
    out = torch.empty(rows, dim, dtype=x.dtype, device=dev)
    _add_up[(rows, triton.cdiv(dim, 1024))](
        *(each, place, x if beside is None else beside, out, dim),
        K=k,
        BESIDE=beside is not None,
        BLOCK=1024,
        num_warps=4,
    )
    return out


def place_and_round(
    x: Tensor, ids: Tensor, weights: Tensor, count: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], tuple[_Pieces, _Pieces]]:
    """Places of the pairs ids [R, k] when sorted by expert, int32; and by place their weights, their rows of x [R, d]
    in e4m3 and scales, see _room, and pieces of an expert's pairs."""
    rows, k = ids.shape
    dim, dev = x.shape[1], x.device
    ids = ids.contiguous()
    ranks, starts, pieces = _places(ids, count)
    place = torch.empty(rows, k, dtype=torch.int32, device=dev)
    gates = torch.empty(rows * k, dtype=torch.float32, device=dev)
    inputs = _room(rows * k, dim, dev)
    _round_placed[(rows, triton.cdiv(dim, 1024))](
        *(x.contiguous(), ids, ranks, starts, weights.contiguous(), place, gates, *inputs, dim, inputs[1].shape[1]),
        K=k,
        GROUPS=8,
        num_warps=4,
    )
    return place, gates, inputs, pieces


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


def _places(ids: Tensor, count: int) -> tuple[Tensor, Tensor, tuple[_Pieces, _Pieces]]:
    """Ranks of the pairs ids [R, k] among those of their experts, the experts' first places, and wide and narrow pieces
    of the pairs so sorted; a narrow one is the rest of an expert's."""
    pairs, dev = ids.numel(), ids.device
    counts = torch.zeros(count, dtype=torch.int32, device=dev)
    ranks, starts = torch.empty(pairs, dtype=torch.int32, device=dev), torch.empty_like(counts)
    _rank[(triton.cdiv(pairs, 256),)](ids, counts, ranks, pairs, BLOCK=256, num_warps=4)
    wide = _Pieces(_WIDE, counts.new_empty(min(pairs, pairs // _WIDE + count), 3), counts.new_empty(1))
    narrow = _Pieces(_WIDE // 2, counts.new_empty(min(pairs, count), 3), counts.new_empty(1))
    _cut[(1,)](
        *(counts, starts, *wide[1:], *narrow[1:], count),
        EXPERTS=triton.next_power_of_2(count),
        WIDE=_WIDE,
        num_warps=4,
    )
    return ranks, starts, (wide, narrow)


def _room(pairs: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For pairs' rows in e4m3, columns in the order of many.py, and scales [width / 128, 128 or more beyond pairs]."""
    values = torch.empty(pairs, width, dtype=torch.float8_e4m3fn, device=device)
    padded = -(-pairs // 128) * 128 + 128
    return values, torch.empty(width // 128, padded, dtype=torch.float32, device=device)


@triton.jit
def _rank(ids_ptr, counts_ptr, ranks_ptr, pairs, BLOCK: tl.constexpr):
    """How many of its expert came before each pair; counts [experts], zero before, are how many there are."""
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + p, mask=p < pairs, other=0)
    tl.store(ranks_ptr + p, tl.atomic_add(counts_ptr + ids, 1, mask=p < pairs, sem="relaxed"), mask=p < pairs)


@triton.jit
def _cut(
    counts_ptr, starts_ptr, wide_ptr, wides_ptr, narrow_ptr, narrows_ptr, count,
    EXPERTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Experts' first places, and pieces of up to WIDE pairs or, of what is left of an expert, of up to half as many."""
    e = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + e, mask=e < count, other=0)
    starts = tl.cumsum(counts, 0) - counts
    tl.store(starts_ptr + e, starts, mask=e < count)
    rest = counts % WIDE
    narrow = ((rest > 0) & (rest <= WIDE // 2)).to(tl.int32)
    wide = (counts + WIDE - 1) // WIDE - narrow
    at = tl.cumsum(wide, 0) - wide
    for i in range(tl.max(wide, 0)):
        entry = wide_ptr + (at + i) * 3
        tl.store(entry, e, mask=i < wide)
        tl.store(entry + 1, starts + i * WIDE, mask=i < wide)
        tl.store(entry + 2, tl.minimum(counts - i * WIDE, WIDE), mask=i < wide)
    entry = narrow_ptr + (tl.cumsum(narrow, 0) - narrow) * 3
    tl.store(entry, e, mask=narrow > 0)
    tl.store(entry + 1, starts + wide * WIDE, mask=narrow > 0)
    tl.store(entry + 2, rest, mask=narrow > 0)
    tl.store(wides_ptr, tl.sum(wide, 0))
    tl.store(narrows_ptr, tl.sum(narrow, 0))


@triton.jit
def _round_placed(
    x_ptr, ids_ptr, ranks_ptr, starts_ptr, weights_ptr, place_ptr, gates_ptr, values_ptr, scales_ptr, width, padded,
    K: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Some groups of 128 columns of a row, rounded, to the places of its K pairs, and which these are."""
    row = tl.program_id(0)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    values, scale = _rounded(x_ptr + row.to(tl.int64) * width, g, width)
    for s in tl.static_range(K):
        pair = row * K + s
        place = tl.load(starts_ptr + tl.load(ids_ptr + pair)) + tl.load(ranks_ptr + pair)
        _put(values, scale, values_ptr, scales_ptr, place, g, width, padded)
        if tl.program_id(1) == 0:
            tl.store(place_ptr + pair, place)
            tl.store(gates_ptr + place, tl.load(weights_ptr + pair).to(tl.float32))


@triton.jit
def _round_hidden(h_ptr, values_ptr, scales_ptr, width, padded, GROUPS: tl.constexpr):
    """Some groups of 128 columns of a pair's hidden values, rounded."""
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    values, scale = _rounded(h_ptr + tl.program_id(0).to(tl.int64) * width, g, width)
    _put(values, scale, values_ptr, scales_ptr, tl.program_id(0), g, width, padded)


@triton.jit
def _rounded(x_ptr, g, width):
    """Groups g [G] of 128 columns: e4m3 [G, 128] and scales [G]."""
    at = g[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + at, mask=at < width, other=0.0).to(tl.float32)
    scale, inverse = scale_of(tl.max(tl.abs(x), 1))
    return (x * inverse[:, None]).to(tl.float8e4nv), scale


@triton.jit
def _put(values, scale, values_ptr, scales_ptr, place, g, width, padded):
    """Groups g of a row to where many.py reads row `place`, in slots."""
    d = tl.arange(0, 128)
    slot = d // 8 % 4 * 32 + d // 4 % 2 * 16 + d // 32 * 4 + d % 4
    at = values_ptr + place.to(tl.int64) * width + g[:, None] * 128 + slot[None, :]
    tl.store(at, values, mask=(g * 128 < width)[:, None] & (d >= 0)[None, :])
    tl.store(scales_ptr + g * padded + place, scale, mask=g * 128 < width)


@triton.jit
def _add_up(each_ptr, place_ptr, beside_ptr, out_ptr, dim, K: tl.constexpr, BESIDE: tl.constexpr, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(K):
        at = tl.load(place_ptr + r * K + s).to(tl.int64) * dim + d
        total += tl.load(each_ptr + at, mask=d < dim, other=0.0).to(tl.float32)
    if BESIDE:
        total += tl.load(beside_ptr + r * dim + d, mask=d < dim, other=0.0).to(tl.float32)
    tl.store(out_ptr + r * dim + d, total.to(out_ptr.dtype.element_ty), mask=d < dim)
