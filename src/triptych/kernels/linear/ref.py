"""Dense and grouped linear maps in plain PyTorch. y = x W^T with W stored [out, in]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [R, in], weight [out, in] -> [R, out] in x's dtype; weights of another dtype multiply in theirs."""
    if weight.dtype == x.dtype:
        return F.linear(x, weight)
    return F.linear(x.to(weight.dtype), weight).to(x.dtype)


def grouped_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Each group of inputs by its own matrix: x [R, G, in], weight [G, out, in] -> [R, G * out].

    Source: reference section 2.3, grouped output projection.
    """
    y = torch.bmm(x.transpose(0, 1).to(weight.dtype), weight.transpose(1, 2))  # [G, R, out]
    return y.transpose(0, 1).flatten(1).to(x.dtype)
