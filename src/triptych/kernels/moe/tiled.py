"""How kernels are told of experts in tiles (quant/tiles.py)."""

from __future__ import annotations

import math

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from triptych.kernels.quant.matrices import Mxfp4Matrix
from triptych.kernels.quant.tiles import TILE_ROWS

TILE_BYTES = 64 * (64 + 4)
"""A tile of 64 rows and 128 columns with its scales."""


def blocks_of(columns: int, most: int) -> int:
    """Blocks of 128 columns a stage: 4, 2 or 1, a divisor of all of them."""
    return math.gcd(columns // 128, most)


def descriptors(matrix: Mxfp4Matrix, tiles: int, blocks: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Of values and scales in tiles, to copy `blocks` blocks of `tiles` tiles at once."""
    rows, columns = matrix.shape[0] * matrix.shape[1] // TILE_ROWS, matrix.shape[2] // 128
    values, scales = matrix.values.view(rows, columns * 32, 128), matrix.scales.view(rows, columns * 2, 128)
    swizzled, plain = gl.NVMMASharedLayout(128, 8, rank=3), gl.NVMMASharedLayout(0, 8, rank=3)
    return (
        TensorDescriptor.from_tensor(values, [tiles, blocks * 32, 128], swizzled),
        TensorDescriptor.from_tensor(scales, [tiles, blocks * 2, 128], swizzled if blocks == 4 else plain),
    )
