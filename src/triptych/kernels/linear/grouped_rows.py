"""Launches the grouped linear maps of rows that are not rounded (grouped.py)."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from triptych.kernels.gpu import multiprocessors
from triptych.kernels.linear.counters import counters
from triptych.kernels.linear.few_rows import blocks_of
from triptych.kernels.linear.grouped import products
from triptych.kernels.quant.matrices import Fp8Matrix

_MOST = 1024
_TALL = 128
"""Most rows of a tile."""


def serves(rows: int, weight: Fp8Matrix) -> bool:
    """Whether these are the products of so many rows; of more, the library's take less."""
    return 0 < rows <= _MOST and weight.shape[-2] % 128 == 0


def product(x: Tensor, weight: Fp8Matrix, out: Tensor, scales: Tensor | None = None) -> None:
    """x [rows, G * K] bf16, not rounded, by matrices [G, N, K] into out [rows, G * N]; rounded, if there are `scales`,
    which may lie either way."""
    rows, columns = out.shape
    rank, depth = weight.shape[1:]
    n = min(_TALL, max(32, triton.next_power_of_2(rows)))
    tiles, blocks = columns // 128 * triton.cdiv(rows, n), depth // 128
    split = parts(tiles, blocks, out.device)
    strides = (0, 0) if scales is None else scales.stride()
    part = torch.empty(tiles * split * n * 128 if split > 1 else 0, dtype=torch.float32, device=out.device)
    products[(tiles * split,)](
        *(blocks_of(weight.values.view(columns, depth), 128), weight.scales, _blocks(x, n)),
        *(out, out if scales is None else scales, part, counters(out.device), rows, *strides),
        K=depth,
        OUT=columns,
        GROUP=rank,
        SPLIT=split,
        N=n,
        STAGES=stages(n),
        ROUND=scales is not None,
        num_warps=4,
    )


def parts(tiles: int, blocks: int, device: torch.device) -> int:
    """Into how many parts columns are cut: as many programs as the GPU has room for at once."""
    split = 1
    while 2 * tiles * split <= multiprocessors(device) and blocks % (2 * split) == 0:
        split *= 2
    return split


def stages(n: int) -> int:
    """Of tiles of n rows; measured on an H200, where more are no better."""
    return 4 if n == _TALL else 6


def _blocks(x: Tensor, rows: int) -> TensorDescriptor:
    """To copy blocks of 128 columns of up to `rows` rows of x; rows that it lacks are zero."""
    return TensorDescriptor.from_tensor(x, [rows, 128], gl.NVMMASharedLayout(128, 16))
