"""Linear maps for the CPU. The library's products are fast; deterministic mode needs row-independent ones.

A BLAS may sum a row's products in another order when the number of rows changes. The deterministic versions
compute every output as one dot product in one order, so a row's result never depends on its batch mates.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from triptych.kernels.jit import kernel


def linear_deterministic(x: Tensor, weight: Tensor) -> Tensor:
    """See ref.linear; rows are independent of each other."""
    out = torch.empty(x.shape[0], weight.shape[0])
    _dots(x.contiguous().numpy(), weight.float().numpy(), out.numpy())
    return out


def grouped_linear_deterministic(x: Tensor, weight: Tensor) -> Tensor:
    """See ref.grouped_linear; rows are independent of each other."""
    groups = [linear_deterministic(x[:, g], weight[g]) for g in range(weight.shape[0])]
    return torch.cat(groups, dim=1)


@kernel
def _dots(x, weight, out):  # type: ignore[no-untyped-def]
    for o in range(weight.shape[0]):
        for r in range(x.shape[0]):
            total = np.float32(0)
            for i in range(weight.shape[1]):
                total += x[r, i] * weight[o, i]
            out[r, o] = total
