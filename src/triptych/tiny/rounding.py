"""Weights as the checkpoint will store them, with gradients that ignore the rounding (reference section 5.2).

Values already on the grid stay where they are, so a checkpoint written from rounded weights loses nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 128
FP4_GROUP = 32


def e4m3_blocks(w: Tensor) -> Tensor:
    """w [R, C] rounded to e4m3 with one power-of-two scale per 128x128 block, float32."""
    rows, columns = w.shape
    padded = F.pad(w.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    amax = blocks.abs().amax((1, 3), keepdim=True).clamp_min(1e-12)
    scale = torch.exp2(torch.ceil(torch.log2(amax / 448)))
    out = (blocks / scale).to(torch.float8_e4m3fn).float() * scale
    return out.flatten(2, 3).flatten(0, 1)[:rows, :columns]


def e2m1_groups(w: Tensor) -> Tensor:
    """w [..., C] rounded to e2m1 with one power-of-two scale per 32 values along the last dim, float32."""
    groups = w.float().unflatten(-1, (-1, FP4_GROUP))
    amax = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12)
    scale = torch.exp2(torch.ceil(torch.log2(amax / 6)))
    x = (groups / scale).abs()
    # the spacing of e2m1 is 1/2 below 2, 1 below 4 and 2 up to 6
    step = torch.where(x < 2, 0.5, torch.where(x < 4, 1.0, 2.0))
    return (torch.round(x / step) * step * groups.sign() * scale).flatten(-2)


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
