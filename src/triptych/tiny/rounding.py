"""Weights as the checkpoint will store them, with gradients that ignore the rounding (reference section 5.2).

Values already on the grid stay where they are, so a checkpoint written from rounded weights loses nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.kernels.quant import ref as quant


def e4m3_blocks(w: Tensor) -> Tensor:
    """w [R, C] rounded to e4m3 with one power-of-two scale per 128x128 block, float32."""
    return quant.dequantize_fp8(*quant.quantize_fp8(w.float()))


def e2m1_groups(w: Tensor) -> Tensor:
    """w [..., C] rounded to e2m1 with one power-of-two scale per 32 values along the last dim, float32."""
    return quant.fake_quant_fp4(w.float())


def _through(w: Tensor, rounded: Tensor) -> Tensor:
    return w + (rounded - w).detach()


def round_linear(w: Tensor) -> Tensor:
    """A linear's weight [R, C] in FP8, straight-through."""
    with torch.no_grad():
        rounded = e4m3_blocks(w)
    return _through(w, rounded)


def round_experts(w: Tensor) -> Tensor:
    """Stacked experts [E+1, R, C]: the routed ones in MXFP4, the last (shared) one in FP8, straight-through."""
    with torch.no_grad():
        rounded = torch.cat([e2m1_groups(w[:-1]), e4m3_blocks(w[-1]).unsqueeze(0)])
    return _through(w, rounded)
