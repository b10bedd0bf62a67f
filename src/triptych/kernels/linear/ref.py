"""Dense and grouped linear maps in plain PyTorch. y = x W^T with W stored [out, in]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.norm.ref import rms_norm
from triptych.kernels.quant.matrices import BothRows, Fp8Matrix, Fp8Rows, FrontMatrix, Matrix, Unnormed, quantize_rows


def normed(x: Unnormed) -> Tensor:
    """A row that was left to its product, normed: bf16 [1, K]."""
    return rms_norm(x.columns.to(torch.bfloat16).float(), x.norm, x.eps).to(torch.bfloat16)


def linear(x: Tensor | Fp8Rows | Unnormed, weight: Matrix) -> Tensor:
    """x [R, in], weight [out, in] -> [R, out] in x's dtype; weights of another dtype multiply in theirs.

    An Fp8Matrix multiplies rows quantised in groups of 128 (reference section 2.9); Fp8Rows and Unnormed give bf16.
    """
    x = normed(x) if isinstance(x, Unnormed) else x
    if isinstance(weight, Fp8Matrix):
        rows = x if isinstance(x, Fp8Rows) else quantize_rows(x)
        y = F.linear(rows.dequantize(), weight.dequantize())
        return y.to(x.dtype if isinstance(x, Tensor) else torch.bfloat16)
    assert isinstance(x, Tensor)
    if weight.dtype == x.dtype:
        return F.linear(x, weight)
    return F.linear(x.to(weight.dtype), weight).to(x.dtype)


def front_linear(x: Tensor | BothRows, front: FrontMatrix) -> Tensor:
    """x [R, d] times all front projections -> float32 [R, columns], the latent columns rounded to bf16.

    Only the latent's input is quantised; the compressors keep float32 (reference sections 2.5 and 2.9).
    """
    rows, x = (x.rounded, x.plain) if isinstance(x, BothRows) else (x.float(), x)
    latent = linear(rows, front.latent).to(torch.bfloat16).float()
    return torch.cat([latent, F.linear(x.float(), front.rest.float())], dim=1)


def grouped_linear(x: Tensor, weight: Matrix, *, rounds: bool = False) -> Tensor | Fp8Rows:
    """Each group of inputs by its own matrix: x [R, G, in], weight [G, out, in] -> [R, G * out].

    No input is quantised here, whatever the weights are. Source: reference sections 2.3 and 2.9. `rounds`: the product
    that reads the result would round it, and it may come as Fp8Rows.
    """
    dense = weight.dequantize() if isinstance(weight, Fp8Matrix) else weight
    y = torch.bmm(x.transpose(0, 1).to(dense.dtype), dense.transpose(1, 2))  # [G, R, out]
    y = y.transpose(0, 1).flatten(1).to(x.dtype)
    return quantize_rows(y) if rounds else y
