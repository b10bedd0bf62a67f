"""Launches the linear maps of few rows (few.py), whose rows come rounded, with scales row by row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from triptych.kernels.gpu import multiprocessors
from triptych.kernels.linear.counters import counters
from triptych.kernels.linear.few import products
from triptych.kernels.quant.matrices import BothRows, Fp8Matrix, Fp8Rows, FrontMatrix

_MOST = 32


@dataclass(frozen=True, slots=True)
class Tiling:
    """Outputs of a program; blocks of 128 bytes of each weight row in a stage; stages."""

    tall: int
    blocks: int
    stages: int


TILING = Tiling(64, 2, 2)
PROGRAMS = 1.8
"""Programs on a multiprocessor from which on no more are made by sharing columns."""


class _Factors(NamedTuple):
    """What a launch multiplies: rounded rows by weights [N, K] in FP8, the same rows as they are by more in bf16."""

    rounded: Fp8Rows
    weight: Fp8Matrix
    plain: Tensor | None = None
    rest: Tensor | None = None


def serves(rows: int) -> bool:
    """Whether these are the products of so many rows."""
    return 0 < rows <= _MOST


def product(x: Fp8Rows, weight: Fp8Matrix, out: Tensor, tiling: Tiling = TILING) -> Tensor:
    """x times weight [N, K] into out [rows, N]."""
    return _launch(_Factors(x, weight), out, tiling)


def front(x: BothRows, matrix: FrontMatrix, out: Tensor, tiling: Tiling = TILING) -> Tensor:
    """x times both matrices into out [rows, columns] float32: latent columns of rounded rows and rounded to bf16."""
    more = (x.plain, matrix.rest) if len(matrix.rest) else (None, None)
    return _launch(_Factors(x.rounded, matrix.latent, *more), out, tiling)


def _launch(given: _Factors, out: Tensor, tiling: Tiling) -> Tensor:
    """One launch of few.products."""
    x, weight, plain, rest = given
    rows, columns = out.shape
    latent, depth = weight.shape
    n, tall = max(8, triton.next_power_of_2(rows)), tiling.tall
    tiles, more = latent // tall, triton.cdiv(columns - latent, tall)
    split = parts(tiles + 2 * more, depth // 128, out.device)  # an output in bf16 takes twice the bytes
    steps = depth // 128 // split
    blocks = math.gcd(steps, tiling.blocks)
    programs = (tiles + 2 * more) * split
    part = torch.empty(programs * tall * n if split > 1 or more else 0, dtype=torch.float32, device=out.device)
    w = blocks_of(weight.values, tall)
    products[(programs,)](
        *(w, weight.scales, w if rest is None else blocks_of(rest, tall)),
        *(blocks_of(x.values, n), x.scales.contiguous(), w if plain is None else blocks_of(plain, n)),
        *(out, part, counters(out.device), rows),
        K=depth,
        OUT=columns,
        LATENT=latent,
        TALL=tall,
        SPLIT=split,
        N=n,
        KS=blocks,
        STAGES=min(tiling.stages, steps // blocks),
        num_warps=4,
    )
    return out


def parts(tiles: int, blocks: int, device: torch.device) -> int:
    """Into how many parts columns are cut, so that programs fill the GPU."""
    split = 1
    while tiles * split < PROGRAMS * multiprocessors(device) and blocks % (2 * split) == 0 and blocks // split > 4:
        split *= 2
    return split


def blocks_of(matrix: Tensor, rows: int) -> TensorDescriptor:
    """To copy 128 bytes of each of `rows` rows of a matrix; rows that it lacks are zero."""
    size = matrix.element_size()
    return TensorDescriptor.from_tensor(matrix, [rows, 128 // size], gl.NVMMASharedLayout(128, 8 * size))
