"""RMSNorm and interleaved rotary embedding on the trailing dims, in plain PyTorch.

Source: reference sections 2.3 and 2.4.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) over the last dim, times weight if there is one; computed in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed if weight is None else normed * weight).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last 2*p dims of x [R, ..., c] by angles given as cos, sin [R, p]; pair i is dims (2i, 2i+1).

    Pass -sin to rotate back.
    """
    width = 2 * cos.shape[-1]
    shape = (x.shape[0], *([1] * (x.dim() - 2)), cos.shape[-1])
    cos, sin = cos.view(shape), sin.view(shape)
    even, odd = x[..., -width::2], x[..., x.shape[-1] - width + 1 :: 2]
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([x[..., :-width], rotated.to(x.dtype)], dim=-1)


def latent_rows(
    qa: Tensor, kv: Tensor, norms: tuple[Tensor, Tensor], angles: tuple[Tensor, Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    """Low-rank query rows and window rows of the attention front end.

    qa [R, q_lora] and kv [R, c] are projections; norms = (q_norm, kv_norm); angles = (cos, sin) [R, rope/2].
    Returns qr [R, q_lora] (normed) and the window rows [R, c] (normed, rotated).
    """
    return rms_norm(qa, norms[0], eps), rope(rms_norm(kv, norms[1], eps), *angles)


def query_rows(q: Tensor, angles: tuple[Tensor, Tensor], eps: float) -> Tensor:
    """Heads q [R, H, c] after the per-head norm without weight, then rotated. May work in place."""
    return rope(rms_norm(q, None, eps), *angles)


def rope_rows(x: Tensor, angles: tuple[Tensor, Tensor], inverse: bool = False) -> Tensor:
    """Heads x [R, H, c] rotated at the row's position, or rotated back (`inverse`). May work in place."""
    cos, sin = angles
    return rope(x, cos, -sin if inverse else sin)
