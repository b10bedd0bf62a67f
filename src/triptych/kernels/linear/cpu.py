"""Linear maps for the CPU.

A few rows (decode) are bound by reading the weights: compiled dot products read them once, at two to three times the
speed of the library's product, which packs them first. Many rows (prefill) go to the library.

A BLAS may also sum a row's products in another order when the number of rows changes. The deterministic versions
compute every output as one dot product in one order, so a row's result never depends on its batch mates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from triptych.kernels.jit import kernel
from triptych.kernels.linear import ref
from triptych.kernels.parallel import over
from triptych.kernels.quant.matrices import Fp8Matrix, Fp8Rows, Matrix, quantize_rows

_FEW = 16  # rows up to which dot products win, measured on cold weights
_ROWS = 64  # least rows of a product worth a thread
_WEIGHTS = 1 << 17  # least weights of dot products worth a thread


def linear(x: Tensor | Fp8Rows, weight: Matrix) -> Tensor:
    """See ref.linear."""
    if isinstance(weight, Fp8Matrix) or isinstance(x, Fp8Rows):
        return ref.linear(x, weight)
    if weight.dtype != torch.float32:
        return ref.linear(x, weight)
    out = torch.empty(x.shape[0], weight.shape[0])
    if x.shape[0] <= _FEW:
        _few(_dots_blocked, x, weight, out)
    else:
        turned = weight.T
        over(x.shape[0], _ROWS, lambda first, last: torch.mm(x[first:last], turned, out=out[first:last]))
    return out


def linear_deterministic(x: Tensor | Fp8Rows, weight: Matrix) -> Tensor:
    """See ref.linear; rows are independent of each other."""
    if isinstance(weight, Fp8Matrix):
        x, weight = (x if isinstance(x, Fp8Rows) else quantize_rows(x)).dequantize(), weight.dequantize()
    assert isinstance(x, Tensor)
    out = torch.empty(x.shape[0], weight.shape[0])
    _few(_dots, x, weight.float(), out)
    return out


def grouped_linear(x: Tensor, weight: Matrix, *, rounds: bool = False) -> Tensor | Fp8Rows:
    """See ref.grouped_linear."""
    if isinstance(weight, Fp8Matrix) or x.shape[0] > _FEW or weight.dtype != torch.float32:
        return ref.grouped_linear(x, weight, rounds=rounds)
    return grouped_linear_deterministic(x, weight)


def grouped_linear_deterministic(x: Tensor, weight: Matrix, *, rounds: bool = False) -> Tensor:
    """See ref.grouped_linear; rows are independent of each other, and not rounded here."""
    weight = weight.dequantize() if isinstance(weight, Fp8Matrix) else weight
    groups, width, _ = weight.shape
    out = torch.empty(x.shape[0], groups * width)
    rows, matrices, result = x.contiguous().numpy(), weight.float().numpy(), out.numpy()
    least = 1 + _WEIGHTS // weight[0].numel()
    over(groups, least, lambda first, last: _grouped_dots(rows, matrices, first, last, result))
    return out


def _few(dots: Any, x: Tensor, weight: Tensor, out: Tensor) -> None:
    rows, matrix, result = x.contiguous().numpy(), weight.numpy(), out.numpy()
    least = 1 + _WEIGHTS // weight.shape[1]
    over(weight.shape[0], least, lambda first, last: dots(rows, matrix, first, last, result))


@kernel
def _dots(x, weight, first, last, out):  # type: ignore[no-untyped-def]
    for o in range(first, last):
        for r in range(x.shape[0]):
            total = np.float32(0)
            for i in range(weight.shape[1]):
                total += x[r, i] * weight[o, i]
            out[r, o] = total


@kernel
def _grouped_dots(x, weight, first, last, out):  # type: ignore[no-untyped-def]
    width = weight.shape[1]
    for g in range(first, last):
        for o in range(width):
            for r in range(x.shape[0]):
                total = np.float32(0)
                for i in range(weight.shape[2]):
                    total += x[r, g, i] * weight[g, o, i]
                out[r, g * width + o] = total


@kernel
def _dots_blocked(x, weight, first, last, out):  # type: ignore[no-untyped-def]
    """Four rows share each weight that is loaded."""
    rows = x.shape[0]
    whole = rows - rows % 4
    for o in range(first, last):
        for r in range(0, whole, 4):
            a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for i in range(weight.shape[1]):
                w = weight[o, i]
                a += x[r, i] * w
                b += x[r + 1, i] * w
                c += x[r + 2, i] * w
                d += x[r + 3, i] * w
            out[r, o], out[r + 1, o], out[r + 2, o], out[r + 3, o] = a, b, c, d
        for r in range(whole, rows):
            a = np.float32(0)
            for i in range(weight.shape[1]):
                a += x[r, i] * weight[o, i]
            out[r, o] = a
