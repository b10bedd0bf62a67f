"""Linear maps of deterministic mode: one size of tiles for any number of rows, so a row's bits are its own."""

from __future__ import annotations

from torch import Tensor

from triptych.kernels.linear import portable
from triptych.kernels.linear.portable import FIXED_ROWS
from triptych.kernels.quant.matrices import BothRows, Fp8Rows, FrontMatrix, Matrix, Unnormed


def linear(x: Tensor | Fp8Rows | Unnormed, weight: Matrix) -> Tensor:
    """See ref.linear."""
    return portable.linear(x, weight, FIXED_ROWS)


def front_linear(x: Tensor | BothRows, front: FrontMatrix) -> Tensor:
    """See ref.front_linear."""
    return portable.front_linear(x, front, FIXED_ROWS)


def grouped_linear(x: Tensor, weight: Matrix, *, rounds: bool = False) -> Tensor:
    """See ref.grouped_linear; the result is not rounded here."""
    return portable.grouped_linear(x, weight, FIXED_ROWS)
