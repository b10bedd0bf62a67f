"""Launches the mixture of experts of few rows: the router, and experts in one launch or two."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from triptych.kernels.mhc.ref import Uncollapsed
from triptych.kernels.moe import few, joined
from triptych.kernels.moe.ref import Experts, Router
from triptych.kernels.moe.router import route_few
from triptych.kernels.moe.shared import gates_and_ups, parts_of, plain
from triptych.kernels.moe.tiled import TILE_BYTES, blocks_of, descriptors
from triptych.kernels.moe.together import route_together
from triptych.kernels.quant.matrices import Fp8Matrix, Fp8Rows, Matrix, Mxfp4Matrix

_PAIRS = 8
"""Pairs of one expert that a program multiplies by; those beyond them are another program's."""

_TOGETHER = 8
"""Rows up to which there is one launch. It multiplies the shared expert by eight at most."""

_FEW_PAIRS = 2
"""Pairs of one expert then: few experts have more, and with less room for them there are more programs at once."""

_MANY = 192
"""Rows from which on what a program does once for its pairs' rows, half of its time, is shared by several pieces."""

_SHARED_ROWS = 64
"""Rows that a program of the shared expert multiplies by, at most."""

_BLOCK_BYTES = 64 * 128
"""A block of 64 rows and 128 columns of the shared expert."""

_COUNTERS = 1 << 16
"""Counters of each launch: it needs one a tile and 128 hidden columns, or one a row and 64 output columns."""


class Tiling(NamedTuple):
    """Of a launch, at most: tiles of 64 weight rows at a time, blocks of 128 columns a stage, stages, and how often a
    program has so many rows, one after the other."""

    tiles: int
    blocks: int
    stages: int
    run: int = 1


FEW = Tiling(1, 4, 2)
"""More stages, or more rows a program, leave room for fewer programs on a multiprocessor, and were slower."""

MANY = Tiling(1, 4, 2, run=4)
"""Longer runs share what is left at the end less evenly. With 16 pairs a program there would be fewer, and slower."""

ONE = Tiling(1, 2, 5)
"""Of a single row, for whose programs of the first matrices there is room all at once."""


class Routed(NamedTuple):
    """What the router says: weights [rows, k] float32, tiles of pairs, and rows rounded to e4m3; see router.py."""

    weights: Tensor
    tile: Tensor
    order: Tensor
    x: Fp8Rows


class Matrices(NamedTuple):
    """A layer's experts in tiles and its shared one in FP8."""

    w13: Mxfp4Matrix
    w2: Mxfp4Matrix
    shared13: Fp8Matrix
    shared2: Fp8Matrix
    limit: float


def moe_rows_on_gpu(
    x: Tensor | Uncollapsed, token_ids: Tensor, router: Router, moe: Experts, shared: tuple[Matrix, Matrix]
) -> Tensor:
    """See ref.moe_rows; x bfloat16, 1 to some hundred rows, experts in tiles. Neither synchronises nor depends on what
    is routed."""
    (w13, w2, limit), (shared13, shared2) = moe, shared
    assert isinstance(w13, Mxfp4Matrix) and isinstance(w2, Mxfp4Matrix)
    assert w13.tops is not None and w13.paired and w2.tops is not None, "experts are not in tiles"
    assert isinstance(shared13, Fp8Matrix) and isinstance(shared2, Fp8Matrix)
    matrices, counters = Matrices(w13, w2, shared13, shared2, limit), _counters(w2.values.device)
    if isinstance(x, Uncollapsed):
        assert len(x.streams) == 1, "of more rows that router's tiles have more pairs than a program takes"
        return _at_once(Routed(*route_together(x, token_ids, router)), matrices)
    rows, k, count = len(x), router.experts_per_token, w2.shape[0]
    most = _PAIRS if rows > _TOGETHER else min(rows, _FEW_PAIRS)
    tiles = min(rows * k, rows * k // most + min(rows * k, count))
    routed = Routed(*route_few(x.contiguous(), token_ids, router, most, tiles, counters[0]))
    return _in_turn(routed, matrices) if rows > _TOGETHER else _at_once(routed, matrices)


def _at_once(routed: Routed, moe: Matrices) -> Tensor:
    """All of it in one launch: see joined.py. A tile has one pair of a single row, of more up to two."""
    rows, dim = routed.x.values.shape
    k, inner, tiles, dev = routed.weights.shape[1], moe.w2.shape[2], len(routed.tile), routed.tile.device
    columns = math.gcd(dim, inner)
    usual = ONE if rows == 1 else FEW
    blocks, parts = blocks_of(columns, usual.blocks), parts_of(columns)
    stages = min(usual.stages, columns // 128 // blocks)
    shared_stages = max(1, min(stages * blocks * TILE_BYTES // _BLOCK_BYTES, columns // 128 // parts))
    hidden = torch.empty(rows * k, inner, dtype=torch.float32, device=dev)
    sums = torch.empty(parts, 2, rows, inner, dtype=torch.float32, device=dev)
    each = torch.empty((k + parts) * rows, dim, dtype=torch.float32, device=dev)
    out = torch.empty(rows, dim, dtype=torch.bfloat16, device=dev)
    _, ready, counted = _counters(dev)
    joined.experts[((parts + tiles) * (inner // 32 + dim // 64),)](
        *(_bytes(routed.x.values), routed.x.scales, routed.tile, routed.order, routed.weights),
        *(*descriptors(moe.w13, 1, blocks), moe.w13.tops, *descriptors(moe.w2, 1, blocks), moe.w2.tops),
        *(gates_and_ups(moe.shared13.values), moe.shared13.scales, plain(moe.shared2.values, 64), moe.shared2.scales),
        *(hidden, sums, each, out, ready, counted, rows, rows * k, tiles, moe.limit),
        **dict(DIM=dim, INNER=inner, TOPK=k, PAIRS=min(_FEW_PAIRS, rows), TALL=triton.next_power_of_2(rows)),
        **dict(KS=blocks, STAGES=stages, PARTS=parts, SHARED_STAGES=shared_stages),
        num_warps=4,
        maxnreg=128 if rows == 1 else 96,  # as many programs as there is shared memory for
    )
    return out


def _in_turn(routed: Routed, moe: Matrices) -> Tensor:
    """First matrices, then second ones: see few.py."""
    rows, dim = routed.x.values.shape
    k, count, inner, tiles = routed.weights.shape[1], moe.w2.shape[0], moe.w2.shape[2], len(routed.tile)
    pairs, dev = rows * k, routed.tile.device
    tall = max(8, min(_SHARED_ROWS, triton.next_power_of_2(rows)))
    extra, most = triton.cdiv(rows, tall), min(tiles, _expected(rows, k, count))
    _, *counters = _counters(dev)
    sums = torch.empty(parts_of(dim), 2, rows, inner, dtype=torch.float32, device=dev)
    hidden = torch.empty(pairs, inner, dtype=torch.float32, device=dev)
    hq = torch.empty(pairs + rows, inner, dtype=torch.float8_e4m3fn, device=dev)
    hs = torch.empty(inner // 128, pairs + rows, dtype=torch.float32, device=dev)
    usual = MANY if rows >= _MANY else FEW
    shape = dict(DIM=dim, INNER=inner, TOPK=k, SHARED_ROWS=tall)
    tiling, shape_up = _stages(usual, dim, tall, inner // 32)
    few.up[(extra * parts_of(dim) * inner // 32 + most * inner // (32 * tiling.tiles * tiling.run),)](
        *(_bytes(routed.x.values), routed.x.scales, routed.tile, routed.order, routed.weights),
        *(*descriptors(moe.w13, tiling.tiles, tiling.blocks), moe.w13.tops, plain(routed.x.values, tall)),
        *(gates_and_ups(moe.shared13.values), moe.shared13.scales, sums, hidden, _bytes(hq), hs),
        *(counters[0], rows, pairs, tiles, moe.limit, extra),
        **shape,
        **shape_up,
    )
    each = torch.empty(pairs + parts_of(inner) * rows, dim, dtype=torch.float32, device=dev)
    out = torch.empty(rows, dim, dtype=torch.bfloat16, device=dev)
    tiling, shape_down = _stages(usual, inner, tall, dim // 64)
    few.down[(extra * parts_of(inner) * dim // 64 + most * dim // (64 * tiling.tiles * tiling.run),)](
        *(_bytes(hq), hs, routed.tile, routed.order),
        *(*descriptors(moe.w2, tiling.tiles, tiling.blocks), moe.w2.tops),
        *(plain(hq[pairs:], tall), plain(moe.shared2.values, 64), moe.shared2.scales),
        *(each, out, counters[1], rows, pairs, tiles, extra),
        **shape,
        **shape_down,
    )
    return out


def _stages(most: Tiling, columns: int, tall: int, pieces: int) -> tuple[Tiling, dict[str, int]]:
    """A launch's tiling of matrices of so many columns and pieces of 64 rows. The shared expert's stages, of 64 rows of
    weights and `tall` of x, take no more shared memory than those of the others, their eight rows and the scales of
    these, if that is enough for two."""
    blocks = blocks_of(columns, most.blocks)
    run = math.gcd(most.run, pieces // most.tiles)
    tiling = Tiling(most.tiles, blocks, min(most.stages, columns // 128 // blocks), run)
    memory = columns * _PAIRS + columns // 4 + tiling.stages * blocks * most.tiles * TILE_BYTES
    parts = parts_of(columns)
    shared = min(max(2, memory // ((64 + tall) * 128)), columns // 128 // parts)
    meta = dict(RUN=run, TILES=most.tiles, KS=blocks, STAGES=tiling.stages, PARTS=parts, SHARED_STAGES=shared)
    return tiling, dict(num_warps=4 * most.tiles, maxnreg=_registers(memory), **meta)


def _registers(memory: int) -> int:
    """Of each of a program's four warps' threads, so that not they decide how many a multiprocessor has of it."""
    return 128 if memory * 4 < 220_000 else 168


def _expected(rows: int, k: int, experts: int) -> int:
    """For how many tiles programs start: for about as many as there are if all experts are equally likely.

    Tiles beyond them wait for programs that are done; programs beyond the tiles end at once, but take time to start.
    """
    return math.ceil(1.03 * experts * (1 - (1 - k / experts) ** rows)) + rows * k // (_PAIRS * 2)


@cache
def _counters(device: torch.device) -> Tensor:
    """Zeros that every launch leaves zero. Made by the first call, which must not be one that is captured."""
    return torch.zeros(3, _COUNTERS, dtype=torch.int32, device=device)


def _bytes(values: Tensor) -> Tensor:
    return values.view(torch.uint8)
