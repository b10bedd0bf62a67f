"""Pairs of a row and an expert, sorted by expert and cut into tiles of one expert, for experts in plain Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Pairs(NamedTuple):
    """Pairs sorted by expert: order [P], and per expert the end of its pairs and of its tiles [E]; most tiles."""

    order: Tensor
    ends: Tensor
    tile_ends: Tensor
    tiles: int


def sorted_pairs(ids: Tensor, count: int, tile: int) -> Pairs:
    """The pairs of ids [R, k] of `count` experts, and how many tiles of `tile` pairs there can be."""
    if 0 < ids.numel() <= _FEW:
        return _few_pairs(ids.flatten(), count, tile)
    flat, order = torch.sort(ids.flatten(), stable=True)
    ends = torch.searchsorted(flat, torch.arange(count, device=ids.device), right=True)
    sizes = torch.diff(ends, prepend=ends.new_zeros(1))
    tile_ends = torch.cumsum((sizes + tile - 1) // tile, 0)
    return Pairs(order, ends, tile_ends, min(len(flat), len(flat) // tile + count))


_FEW = 512  # pairs that one program compares with each other sooner than the library has sorted them


def _few_pairs(flat: Tensor, count: int, tile: int) -> Pairs:
    """`sorted_pairs` in one launch."""
    pairs = len(flat)
    order, ends, tile_ends = flat.new_empty(pairs), flat.new_empty(count), flat.new_empty(count)
    width = triton.next_power_of_2(pairs)
    _sort[(1,)](
        *(flat, order, ends, tile_ends, pairs, count),
        TILE=tile,
        PAIRS=width,
        EXPERTS=triton.next_power_of_2(count),
        SOME=16,
        num_warps=8,
    )
    return Pairs(order, ends, tile_ends, min(pairs, pairs // tile + count))


def add_up(each: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Sums [rows, d] of each row's pairs, in their order, from float32 each [rows * k, d]."""
    dim = each.shape[1]
    out = torch.empty(rows, dim, dtype=dtype, device=each.device)
    if rows:
        _add_up[(rows, triton.cdiv(dim, 1024))](each, out, dim, K=len(each) // rows, BLOCK=1024, num_warps=4)
    return out


@triton.jit
def _sort(
    ids_ptr, order_ptr, ends_ptr, tile_ends_ptr, pairs, count,
    TILE: tl.constexpr, PAIRS: tl.constexpr, EXPERTS: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """A pair's place is the number of those before it: of a lower expert, or of its own and earlier."""
    i = tl.arange(0, PAIRS)
    e = tl.arange(0, EXPERTS)
    mine = tl.load(ids_ptr + i, mask=i < pairs, other=0).to(tl.int32)
    place = tl.zeros([PAIRS], tl.int32)
    ends, sizes = tl.zeros([EXPERTS], tl.int32), tl.zeros([EXPERTS], tl.int32)
    for first in range(0, pairs, SOME):
        j = first + tl.arange(0, SOME)
        other = tl.load(ids_ptr + j, mask=j < pairs, other=1 << 30).to(tl.int32)
        earlier = (other[None, :] == mine[:, None]) & (j[None, :] < i[:, None])
        place += tl.sum(((other[None, :] < mine[:, None]) | earlier).to(tl.int32), 1)
        ends += tl.sum((other[None, :] <= e[:, None]).to(tl.int32), 1)
        sizes += tl.sum((other[None, :] == e[:, None]).to(tl.int32), 1)
    tl.store(order_ptr + place, i.to(tl.int64), mask=i < pairs)
    tl.store(ends_ptr + e, ends.to(tl.int64), mask=e < count)
    tl.store(tile_ends_ptr + e, tl.cumsum((sizes + TILE - 1) // TILE, 0).to(tl.int64), mask=e < count)


@triton.jit
def tile_of(ends_ptr, tile_ends_ptr, count, PAIRS: tl.constexpr, EXPERTS: tl.constexpr):
    """Expert of this program's tile (count if there is none) and its places in the sorted pairs, with validity."""
    at = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    tile_ends = tl.load(tile_ends_ptr + e, mask=e < count, other=1 << 60)
    expert = tl.sum(((tile_ends <= at) & (e < count)).to(tl.int32), 0)
    before = tl.maximum(tl.max(tl.where(tile_ends <= at, tile_ends, 0), 0), 0)
    known = expert < count
    end = tl.load(ends_ptr + expert, mask=known, other=0)
    start = tl.load(ends_ptr + expert - 1, mask=known & (expert > 0), other=0)
    place = start + (at - before) * PAIRS + tl.arange(0, PAIRS)
    return expert.to(tl.int64), place, place < end


@triton.jit
def _add_up(each_ptr, out_ptr, dim, K: tl.constexpr, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(K):
        total += tl.load(each_ptr + (r * K + slot) * dim + d, mask=d < dim, other=0.0)
    tl.store(out_ptr + r * dim + d, total.to(out_ptr.dtype.element_ty), mask=d < dim)
