"""Launches the linear maps of dozens of rows (dozens.py)."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from triptych.kernels.gpu import multiprocessors
from triptych.kernels.linear.counters import counters
from triptych.kernels.linear.dozens import line_of, products
from triptych.kernels.linear.few_rows import blocks_of
from triptych.kernels.quant.matrices import BothRows, Fp8Matrix, Fp8Rows, FrontMatrix

_MOST = 128
_COLUMNS = 4096
_LOADS = 32  # of scales by a thread at once
_MEMORY = 224 << 10
"""Bytes of shared memory for the ring and scales."""


class Tiling(NamedTuple):
    """Outputs of a tile; blocks of 128 columns of a stage; whether a tile is computed as W x^T."""

    tall: int
    deep: int
    turned: bool


class _Factors(NamedTuple):
    """What a launch multiplies: e4m3 rows by weights [N, K], the same rows as they are by more in bf16."""

    values: Tensor
    scales: Tensor
    weight: Fp8Matrix
    plain: Tensor | None = None
    rest: Tensor | None = None


class Plan(NamedTuple):
    """How stages are shared out: programs, most of one program, most programs that share a tile."""

    programs: int
    stages: int
    sharers: int

    def chunks(self, tiling: Tiling, n: int) -> tuple[int, int]:
        """Blocks of a program whose scales for n rows a warpgroup brings at once, and how many times."""
        blocks = self.stages * tiling.deep
        chunk = min(triton.next_power_of_2(-(-blocks // 2)), _LOADS * 128 // n)
        return chunk, -(-blocks // chunk)

    def places(self, tiling: Tiling, n: int) -> int:
        """Of the ring, beside the scales, for n rows."""
        chunk, chunks = self.chunks(tiling, n)
        room = _MEMORY - chunk * chunks * 4 * n
        return min(self.stages, room // (tiling.deep * 128 * (tiling.tall + n)))


def serves(rows: int, weight: Fp8Matrix) -> bool:
    """Whether these are the products of so many rounded rows.

    With few columns the outputs would take the time, and many rows of very many are the library's."""
    outputs, columns = weight.shape[-2:]
    fits = 0 < rows <= _MOST and outputs % 128 == 0
    return fits and columns >= _COLUMNS and (rows <= 64 or columns <= 2 * _COLUMNS)


def tiling_of(rows: int, weight: tuple[int, int], columns: int, most: int) -> Tiling:
    """Of rounded rows, an FP8 matrix [N, K], `columns` outputs and `most` multiprocessors; measured on an H200.

    Narrow tiles read rows more often, and are better only where each program then has whole ones."""
    latent, depth = weight
    blocks = depth // 128
    narrow = Tiling(32, math.gcd(4, blocks), False)
    if rows <= 64 and planned(depth, latent, columns, most, narrow).sharers == 1:
        return narrow
    return Tiling(64, math.gcd(2, blocks), rows <= 64)


def product(x: Fp8Rows, weight: Fp8Matrix, out: Tensor, tiling: Tiling | None = None) -> Tensor:
    """x times weight [N, K] into out [rows, N]."""
    _launch(_Factors(x.values, x.scales, weight), out, tiling)
    return out


def front(x: BothRows, matrix: FrontMatrix, out: Tensor, tiling: Tiling | None = None) -> Tensor:
    """x times both matrices into out [rows, columns] float32: latent columns of rounded rows and rounded to bf16."""
    more = (x.plain, matrix.rest) if len(matrix.rest) else ()
    _launch(_Factors(x.rounded.values, x.rounded.scales, matrix.latent, *more), out, tiling)
    return out


def _launch(given: _Factors, out: Tensor, tiling: Tiling | None) -> None:
    """One launch of dozens.products."""
    weight = given.weight
    rows, columns = out.shape
    latent, depth = weight.shape
    most = multiprocessors(out.device)
    tiling = tiling or tiling_of(rows, (latent, depth), columns, most)
    n = max(32 if tiling.turned else 64, triton.next_power_of_2(rows))
    plan = planned(depth, latent, columns, most, tiling)
    chunk, chunks = plan.chunks(tiling, n)
    floats = plan.programs * 2 * tiling.tall * n if plan.sharers > 1 else 0
    part = torch.empty(floats, dtype=torch.float32, device=out.device)
    w, x = blocks_of(weight.values, tiling.tall), blocks_of(given.values, n)
    rest = w if given.rest is None else blocks_of(given.rest, tiling.tall)
    plain = x if given.plain is None else blocks_of(given.plain, n)
    products[(plan.programs,)](
        *(w, weight.scales, rest, x, given.scales, plain),
        *(out, part, counters(out.device), rows, *given.scales.stride()),
        K=depth,
        OUT=columns,
        LATENT=latent,
        N=n,
        STAGES=plan.places(tiling, n),
        DEEP=tiling.deep,
        TALL=tiling.tall,
        CHUNK=chunk,
        CHUNKS=chunks,
        SHARERS=plan.sharers,
        TURNED=tiling.turned,
        num_warps=4,
    )


@cache
def planned(depth: int, latent: int, columns: int, most: int, tiling: Tiling) -> Plan:
    """A program for each of `most` multiprocessors, or a few less if each then has the same part of a tile."""
    first, stages = line_of.fn(depth, latent, columns, tiling.tall, tiling.deep)
    each = depth // 128 // tiling.deep
    programs = min(most, stages)
    for part in range(1, each + 1):
        even = stages * part // each
        if each % part == 0 and 0.9 * most < even <= most:
            programs = even
    sharers, at = 0, 0
    while at < stages:
        past = at + (each if at < first else 2 * each)
        sharers = max(sharers, (past * programs - 1) // stages - ((at + 1) * programs - 1) // stages + 1)
        at = past
    return Plan(programs, triton.cdiv(stages, programs), sharers)
