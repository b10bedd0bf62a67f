"""Launches the linear maps of few rows (few.py), whose rows come rounded, with scales row by row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from triptych.kernels.gpu import multiprocessors
from triptych.kernels.linear.few import products
from triptych.kernels.quant.matrices import BothRows, Fp8Matrix, Fp8Rows, FrontMatrix

_MOST = 32
_MOST_PAIRS = 0  # pairs lose a block of columns now and then: not used until that is found

_COUNTERS = 1 << 12


@dataclass(frozen=True, slots=True)
class Tiling:
    """Outputs of a program; blocks of 128 bytes of each weight row in a stage; stages."""

    tall: int
    blocks: int
    stages: int


PLAIN = Tiling(64, 2, 3)
PAIRS = Tiling(128, 2, 2)
PROGRAMS = 3.5
"""Programs on a multiprocessor from which on no more are made by sharing columns."""


class _Factors(NamedTuple):
    """What a launch multiplies: rows rounded, as they are, or both; weights [N, K] in FP8, and more of them in bf16."""

    rounded: Fp8Rows | None
    plain: Tensor | None
    weight: Fp8Matrix
    rest: Tensor | None = None


def serves(rows: int, *, pairs: bool = False) -> bool:
    """Whether these are the products of so many rows; `pairs`: that are not rounded."""
    return 0 < rows <= (_MOST_PAIRS if pairs else _MOST)


def product(x: Fp8Rows, weight: Fp8Matrix, out: Tensor, tiling: Tiling = PLAIN) -> Tensor:
    """x times weight [N, K] into out [rows, N]."""
    return _launch(_Factors(x, None, weight), out, None, weight.shape[0], tiling)


def front(x: BothRows, matrix: FrontMatrix, out: Tensor, tiling: Tiling = PLAIN) -> Tensor:
    """x times both matrices into out [rows, columns] float32: latent columns of rounded rows and rounded to bf16."""
    rest = matrix.rest if len(matrix.rest) else None
    return _launch(_Factors(x.rounded, x.plain, matrix.latent, rest), out, None, out.shape[1], tiling)


def grouped(
    x: Tensor, weight: Fp8Matrix, out: Tensor, scales: Tensor | None = None, tiling: Tiling | None = None
) -> Tensor:
    """x [rows, G * K] by matrices [G, N, K] into out [rows, G * N].

    With scales [rows, G * N / 128] out is rounded; N must then be a multiple of 128.
    """
    x = x.to(torch.bfloat16)
    x = x if x.stride(1) == 1 else x.contiguous()
    groups, rank, depth = weight.shape
    flat = Fp8Matrix(weight.values.view(groups * rank, depth), weight.scales.flatten(0, 1))
    return _launch(_Factors(None, x, flat), out, scales, rank, tiling or (PLAIN if rank % PAIRS.tall else PAIRS))


def _launch(given: _Factors, out: Tensor, scales: Tensor | None, group: int, tiling: Tiling) -> Tensor:
    """One launch of few.products; `group` outputs have the same columns of x."""
    x, plain, weight, rest = given
    rows, columns = out.shape
    latent, depth = weight.shape
    n = max(8, triton.next_power_of_2(2 * rows if x is None else rows))
    tall = tiling.tall
    tiles, more = latent // tall, triton.cdiv(columns - latent, tall)
    split = _parts(tiles + 2 * more, depth // 128, out.device)  # an output in bf16 takes twice the bytes
    steps = depth // 128 // split
    blocks = math.gcd(steps, tiling.blocks)
    programs = (tiles + 2 * more) * split
    part = torch.empty(programs * tall * n if split > 1 or more else 0, dtype=torch.float32, device=out.device)
    w = _blocks(weight.values, tall)
    products[(programs,)](
        *(w, weight.scales, w if rest is None else _blocks(rest, tall)),
        *((w, out) if x is None else (_blocks(x.values, n), x.scales.contiguous())),
        *((out, w) if plain is None else (plain, _blocks(plain, n))),
        *(out, out if scales is None else scales, part, _counters(out.device)),
        *(rows, 0 if plain is None else plain.stride(0)),
        K=depth,
        OUT=columns,
        LATENT=latent,
        GROUP=group,
        SHARE=min(group, 128),
        TALL=tall,
        SPLIT=split,
        N=n,
        KS=blocks,
        STAGES=min(tiling.stages, steps // blocks),
        PAIRS=x is None,
        ROUND=scales is not None,
        num_warps=4,
    )
    return out


def _parts(tiles: int, blocks: int, device: torch.device) -> int:
    """Into how many parts columns are cut, so that programs fill the GPU."""
    split = 1
    while tiles * split < PROGRAMS * multiprocessors(device) and blocks % (2 * split) == 0 and blocks // split > 4:
        split *= 2
    return split


def _blocks(matrix: Tensor, rows: int) -> TensorDescriptor:
    """To copy 128 bytes of each of `rows` rows of a matrix; rows that it lacks are zero."""
    size = matrix.element_size()
    return TensorDescriptor.from_tensor(matrix, [rows, 128 // size], gl.NVMMASharedLayout(128, 8 * size))


@cache
def _counters(device: torch.device) -> Tensor:
    """Zeros that every launch leaves zero. Made by the first call, which must not be one that is captured."""
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
