"""Launches the linear maps of dozens of rounded rows with many outputs of few columns (wide.py)."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import triton
from torch import Tensor

from triptych.kernels.gpu import multiprocessors
from triptych.kernels.linear.few_rows import blocks_of
from triptych.kernels.linear.wide import products
from triptych.kernels.quant.matrices import Fp8Matrix, Fp8Rows

_MOST = 128
_EVEN = 0.9  # part of the multiprocessors that are busy
_MEMORY = 222 << 10
"""Bytes of shared memory for rows, scales, weights and outputs on their way."""


class Plan(NamedTuple):
    """How tiles are shared out: programs, places in either of a program's rings, half of its blocks of scales."""

    programs: int
    stages: int
    many: int


def serves(rows: int, weight: Fp8Matrix) -> bool:
    """Whether these are the products of so many rounded rows: with few columns, of which all rows fit beside weights
    on their way, and at least two tiles for each multiprocessor."""
    outputs, columns = weight.shape[-2:]
    most = multiprocessors(weight.values.device)
    if not 0 < rows <= _MOST or outputs < 2 * 64 * most or outputs % 128 or columns % 256:
        return False
    return planned(outputs, columns, height(rows), most).stages >= 4


def suits_library(weight: Fp8Matrix) -> bool:
    """Whether tiles of 128 outputs, as the library's are, keep nearly all multiprocessors busy to the end; measured
    with 65 to 128 rows on an H200, where this kernel is the faster one if not."""
    tiles, most = weight.shape[-2] // 128, multiprocessors(weight.values.device)
    return tiles >= _EVEN * most * -(-tiles // most)


def product(x: Fp8Rows, weight: Fp8Matrix, out: Tensor) -> Tensor:
    """x times weight [N, K] into out [rows, N] bf16."""
    rows, columns = out.shape
    depth, n = weight.shape[1], height(rows)
    plan = planned(columns, depth, n, multiprocessors(out.device))
    products[(plan.programs,)](
        *(blocks_of(weight.values, 64), weight.scales, blocks_of(x.values, n), x.scales, out, rows, *x.scales.stride()),
        K=depth,
        OUT=columns,
        N=n,
        STAGES=plan.stages,
        MANY=plan.many,
        num_warps=4,
    )
    return out


def height(rows: int) -> int:
    """Rows of a product."""
    return int(max(16, triton.next_power_of_2(rows)))


@cache
def planned(columns: int, depth: int, n: int, most: int) -> Plan:
    """For n rows and `most` multiprocessors, of which some have nothing to do where all others have as many tiles."""
    tiles, blocks = columns // 64, depth // 128
    each = -(-tiles // most)
    many = triton.next_power_of_2((each // 2 + 1) * blocks) // 2
    room = _MEMORY - n * (depth + 8 * many + 64)
    return Plan(-(-tiles // each), min(8, room // (2 * 64 * 128)), many)
