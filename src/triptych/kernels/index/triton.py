"""The indexer for NVIDIA GPUs: scores tile by tile, the k-th highest of each row, then the chosen ids in order.

scores  [R, T]        one program per row and stretch of entries; a key is read once for all index heads
k-th highest [R]      torch.topk
ids     [R, k]        tiles count what is above it and what equals it, then write their ids; of equals the lower
                      ids are taken until k are there, which is the reference's rule
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.quant.formats import PackedRows
from triptych.kernels.select_rows.triton import select_packed

_TILE = 128  # entries of one product
_STRETCH = 4  # tiles of one program, for which it loads its queries once
SCORES = 1 << 28  # bytes of scores alive at once
_COUNTED = 2048  # scores that one program of the selection looks at


def index_scores(q: Tensor, weights: Tensor, keys: PagedEntries) -> Tensor:
    """See ref.index_scores."""
    total = keys.most if keys.most is not None else int(keys.visible.max())
    rows, heads, dim = q.shape
    scores = torch.empty(rows, total, device=q.device)
    pool, table = keys.dense, keys.page_table
    narrow = pool.dtype == torch.bfloat16
    _scores[(rows, triton.cdiv(total, _TILE * _STRETCH))](
        *(q, *q.stride()[:2], weights, weights.stride(0), weights.stride(1)),
        *(pool, pool.stride(0), pool.stride(1), table, table.stride(0), keys.seq, keys.visible),
        *(scores, total, heads, dim),
        PER_PAGE=pool.shape[1],
        HEADS=max(16, triton.next_power_of_2(heads)),
        DIM=max(16, triton.next_power_of_2(dim)),
        TILE=_TILE,
        STRETCH=_STRETCH,
        NARROW=narrow,
        num_warps=4,
        num_stages=3 if narrow else 1,
    )
    return scores


def select_entries(q: Tensor, weights: Tensor, keys: PagedEntries, topk: int) -> Tensor:
    """See ref.select_entries. Some rows at a time, so that their scores take at most a quarter of a gigabyte."""
    if isinstance(keys.pool, PackedRows):
        return select_packed(q, weights, keys, topk)
    most = keys.most if keys.most is not None else int(keys.visible.max())
    keys = keys._replace(most=most)
    rows, k = len(q), min(topk, most)
    step = max(1, SCORES // (4 * max(most, 1)))
    if step >= rows:
        return highest(index_scores(q, weights, keys), keys.visible, k)
    out = torch.empty(rows, k, dtype=torch.int64, device=q.device)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        some = keys._replace(seq=keys.seq[part], visible=keys.visible[part])
        out[part] = highest(index_scores(q[part], weights[part], some), some.visible, k)
    return out


def select_entries_deterministic(q: Tensor, weights: Tensor, keys: PagedEntries, topk: int) -> Tensor:
    """See ref.select_entries; a row's scores do not depend on how many rows there are."""
    if isinstance(keys.pool, PackedRows):
        return select_packed(q, weights, keys, topk, fixed=True)
    return select_entries(q, weights, keys, topk)


def highest(scores: Tensor, visible: Tensor, k: int) -> Tensor:
    """Ids [R, k] int64, ascending, of the k highest of the first visible[r] scores of each row, padded with -1."""
    rows, total = scores.shape
    out = torch.full((rows, k), -1, dtype=torch.int64, device=scores.device)
    if not k:
        return out
    tiles = triton.cdiv(total, _COUNTED)
    hist = torch.zeros(4, rows, 256, dtype=torch.int32, device=scores.device)
    counts = torch.empty(2, rows, tiles, dtype=torch.int32, device=scores.device)
    for digit in range(4):
        _histogram[(rows, tiles)](scores, visible, hist, rows, total, k, DIGIT=digit, TILE=_COUNTED)
    _count[(rows, tiles)](scores, visible, hist, counts, rows, total, tiles, k, TILE=_COUNTED)
    many = triton.next_power_of_2(tiles)
    _write[(rows, tiles)](scores, visible, hist, counts, out, rows, total, tiles, k, TILE=_COUNTED, TILES=many)
    return out


@triton.jit
def _scores(
    q_ptr,
    q_row,
    q_head,
    weight_ptr,
    weight_row,
    weight_head,
    pool_ptr,
    pool_page,
    pool_entry,
    table_ptr,
    table_stride,
    seq_ptr,
    visible_ptr,
    out_ptr,
    total,
    heads,
    dim,
    PER_PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    STRETCH: tl.constexpr,
    NARROW: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * TILE * STRETCH
    h = tl.arange(0, HEADS)
    d = tl.arange(0, DIM)
    kind: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
    mine = (h < heads)[:, None] & (d < dim)[None, :]
    q = tl.load(q_ptr + r * q_row + h[:, None] * q_head + d[None, :], mask=mine, other=0.0).to(kind)
    weight = tl.load(weight_ptr + r * weight_row + h * weight_head, mask=h < heads, other=0.0).to(tl.float32)
    visible = tl.load(visible_ptr + r).to(tl.int32)
    line = table_ptr + tl.load(seq_ptr + r) * table_stride
    for step in range(STRETCH):
        g = start + step * TILE + tl.arange(0, TILE)
        seen = g < visible
        page = tl.load(line + g // PER_PAGE, mask=seen, other=0)
        place = pool_ptr + page * pool_page + (g % PER_PAGE) * pool_entry
        k = tl.load(place[:, None] + d[None, :], mask=seen[:, None] & (d < dim)[None, :], other=0.0).to(kind)
        s = tl.dot(k, tl.trans(q)) if NARROW else tl.dot(k, tl.trans(q), input_precision="tf32x3")
        s = tl.sum(tl.maximum(s, 0.0, propagate_nan=tl.PropagateNan.ALL) * weight[None, :], 1)
        tl.store(out_ptr + r * total + g, tl.where(seen, s, float("-inf")), mask=g < total)


@triton.jit
def _ordered(scores_ptr, visible_ptr, r, total, TILE: tl.constexpr):
    """This program's ids, which of them the row sees, and their scores as integers of the same order; -0 is 0."""
    g = tl.program_id(1) * TILE + tl.arange(0, TILE)
    seen = (g < total) & (g < tl.load(visible_ptr + r))
    s = tl.load(scores_ptr + r * total + g, mask=seen, other=0.0)
    bits = tl.where(s == 0.0, 0.0, s).to(tl.int32, bitcast=True)
    return g, seen, bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _narrowed(hist_ptr, visible_ptr, r, rows, k, DIGITS: tl.constexpr):
    """The first DIGITS digits of the k-th highest, as a prefix, and how many are wanted of those that begin with it."""
    b = tl.arange(0, 256)
    prefix = tl.full([], 0, tl.int32)
    left = tl.minimum(k, tl.load(visible_ptr + r).to(tl.int32))
    for digit in tl.static_range(DIGITS):
        h = tl.load(hist_ptr + (digit * rows + r) * 256 + b)
        from_here = tl.sum(h, 0) - tl.cumsum(h, 0) + h
        at = tl.maximum(tl.max(tl.where(from_here >= left, b, 0), 0), 0)
        left -= tl.sum(tl.where(b > at, h, 0), 0)
        prefix = at - 128 if digit == 0 else (prefix << 8) | at
    return prefix, left


@triton.jit
def _histogram(scores_ptr, visible_ptr, hist_ptr, rows, total, k, DIGIT: tl.constexpr, TILE: tl.constexpr):
    """Count the next 8 bits, from the highest on, of the scores that begin as the k-th highest does."""
    r = tl.program_id(0).to(tl.int64)
    _, counted, key = _ordered(scores_ptr, visible_ptr, r, total, TILE)
    if DIGIT == 0:
        digit = (key >> 24) + 128
    else:
        prefix, _ = _narrowed(hist_ptr, visible_ptr, r, rows, k, DIGIT)
        counted = counted & ((key >> (32 - 8 * DIGIT)) == prefix)
        digit = (key >> (24 - 8 * DIGIT)) & 255
    found = tl.histogram(digit, 256, mask=counted)
    b = tl.arange(0, 256)
    tl.atomic_add(hist_ptr + (DIGIT * rows + r) * 256 + b, found, mask=found > 0, sem="relaxed")


@triton.jit
def _count(scores_ptr, visible_ptr, hist_ptr, counts_ptr, rows, total, tiles, k, TILE: tl.constexpr):
    """counts[0] above and counts[1] equal to the k-th highest, of each tile of each row."""
    r = tl.program_id(0).to(tl.int64)
    _, seen, key = _ordered(scores_ptr, visible_ptr, r, total, TILE)
    least, _ = _narrowed(hist_ptr, visible_ptr, r, rows, k, 4)
    here = counts_ptr + r * tiles + tl.program_id(1)
    tl.store(here, tl.sum((seen & (key > least)).to(tl.int32), 0))
    tl.store(here + rows * tiles, tl.sum((seen & (key == least)).to(tl.int32), 0))


@triton.jit
def _write(
    scores_ptr,
    visible_ptr,
    hist_ptr,
    counts_ptr,
    out_ptr,
    rows,
    total,
    tiles,
    k,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, TILES)
    g, seen, key = _ordered(scores_ptr, visible_ptr, r, total, TILE)
    least, wanted = _narrowed(hist_ptr, visible_ptr, r, rows, k, 4)
    earlier = t < tl.program_id(1)
    above = tl.sum(tl.load(counts_ptr + r * tiles + t, mask=earlier, other=0), 0)
    equal = tl.sum(tl.load(counts_ptr + (rows + r) * tiles + t, mask=earlier, other=0), 0)
    ties = (seen & (key == least)).to(tl.int32)
    rank = equal + tl.cumsum(ties, 0) - ties
    taken = (seen & (key > least)) | ((ties > 0) & (rank < wanted))
    flags = taken.to(tl.int32)
    place = above + tl.minimum(equal, wanted) + tl.cumsum(flags, 0) - flags
    tl.store(out_ptr + r * k + place, g.to(tl.int64), mask=taken & (place < k))
