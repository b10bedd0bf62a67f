"""Launches the mixture of experts of few rows: router, up, down. See router.py and few.py."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from triptych.kernels.moe import few
from triptych.kernels.moe.ref import Experts, Router
from triptych.kernels.moe.router import route_few
from triptych.kernels.moe.tiled import blocks_of, descriptors
from triptych.kernels.quant.matrices import Fp8Matrix, Matrix, Mxfp4Matrix

_PAIRS = 8
"""Pairs of one expert that a program multiplies by; those beyond them are another program's."""

_COUNTERS = 1 << 15
"""Counters of each launch: it needs one a tile and 128 hidden columns, or one a row and 64 output columns."""


class Tiling(NamedTuple):
    """Of a launch: tiles of 64 weight rows a program, blocks of 128 columns a stage, stages, at most."""

    tiles: int
    blocks: int
    stages: int


_BESIDE = 96
"""Rows up to which the shared expert rides along, eight at a time; of more, its weights would be read too often."""

UP = DOWN = Tiling(1, 4, 2)
"""More stages, or more rows a program, leave room for fewer programs on a multiprocessor, and were slower."""


def moe_rows_on_gpu(
    x: Tensor, token_ids: Tensor, router: Router, moe: Experts, shared: tuple[Matrix, Matrix]
) -> Tensor:
    """See ref.moe_rows; x bfloat16, 1 to some hundred rows, experts in tiles. Neither synchronises nor depends on what
    is routed."""
    w13, w2 = moe.w13, moe.w2
    shared13, shared2 = shared
    assert isinstance(w13, Mxfp4Matrix) and isinstance(w2, Mxfp4Matrix)
    assert w13.tops is not None and w13.paired and w2.tops is not None, "experts are not in tiles"
    assert isinstance(shared13, Fp8Matrix) and isinstance(shared2, Fp8Matrix)
    rows, dim = x.shape
    inner, k = w2.shape[2], router.experts_per_token
    pairs, dev = rows * k, x.device
    tiles = min(pairs, pairs // _PAIRS + min(pairs, w2.shape[0]))
    x = x.contiguous()
    apart = _apart(x, shared, moe.limit) if rows > _BESIDE else None
    extra = triton.cdiv(rows, _PAIRS) if apart is None else 0
    most = extra + min(tiles, _expected(rows, k, w2.shape[0]))
    counters = _counters(dev)
    weights, tile, order, xq, xs = route_few(x, token_ids, router, _PAIRS, tiles, counters[0])
    hidden = torch.empty(pairs + rows, inner, dtype=torch.float32, device=dev)
    hq = torch.empty(pairs, inner, dtype=torch.uint8, device=dev)
    sq = torch.empty(rows, inner, dtype=torch.float16, device=dev)
    hs = torch.empty(pairs + rows, inner // 128, dtype=torch.float32, device=dev)
    shape = dict(DIM=dim, INNER=inner, TOPK=k)
    tiling = UP
    blocks = blocks_of(dim, tiling.blocks)
    few.up[(most * inner // (32 * tiling.tiles),)](
        *(xq, xs, tile, order, weights, *descriptors(w13, tiling.tiles, blocks), w13.tops),
        *(_words(shared13.values), shared13.scales, hidden, hq, sq, hs, counters[1]),
        *(rows, pairs, tiles, moe.limit, extra),
        KS=blocks,
        STAGES=min(tiling.stages, dim // 128 // blocks),
        TILES=tiling.tiles,
        num_warps=4 * tiling.tiles,
        **shape,
    )
    each = torch.empty(pairs + rows, dim, dtype=torch.float32, device=dev)
    out = torch.empty_like(x)
    tiling = DOWN
    blocks = blocks_of(inner, tiling.blocks)
    few.down[(most * dim // (64 * tiling.tiles),)](
        *(hq, sq, hs, tile, order, *descriptors(w2, tiling.tiles, blocks), w2.tops),
        *(_words(shared2.values), shared2.scales, x if apart is None else apart),
        *(each, out, counters[2], rows, pairs, tiles, extra),
        APART=apart is not None,
        KS=blocks,
        STAGES=min(tiling.stages, inner // 128 // blocks),
        TILES=tiling.tiles,
        num_warps=4 * tiling.tiles,
        **shape,
    )
    return out


def _apart(x: Tensor, shared: tuple[Matrix, Matrix], limit: float) -> Tensor:
    """The shared expert's output [rows, dim] bfloat16, by products of all rows."""
    from triptych.kernels.moe.triton import shared_expert

    return shared_expert(x, *shared, limit)


def _expected(rows: int, k: int, experts: int) -> int:
    """For how many tiles programs start: for about as many as there are if all experts are equally likely.

    Tiles beyond them wait for programs that are done; programs beyond the tiles end at once, but take time to start.
    """
    return math.ceil(1.03 * experts * (1 - (1 - k / experts) ** rows)) + rows * k // (_PAIRS * 2)


@cache
def _counters(device: torch.device) -> Tensor:
    """Zeros that every launch leaves zero. Made by the first call, which must not be one that is captured."""
    return torch.zeros(3, _COUNTERS, dtype=torch.int32, device=device)


def _words(values: Tensor) -> Tensor:
    return values.view(torch.int32)
