"""RMSNorm and interleaved rotary embedding on the trailing dims, in plain PyTorch.

Source: reference sections 2.3 and 2.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.kernels.quant import ref as quant


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
    front: Tensor,
    q_lora: int,
    norms: tuple[Tensor, Tensor],
    angles: tuple[Tensor, Tensor],
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Low-rank query rows and window rows of the attention front end.

    front [R, F] starts with the query projection [q_lora] and the window projection [c]; norms = (q_norm, kv_norm);
    angles = (cos, sin) [R, rope/2]. Returns qr [R, q_lora] (normed) and the window rows [R, c] (normed, rotated), in
    front's dtype or in `dtype`.
    """
    kv = front[:, q_lora : q_lora + norms[1].shape[0]]
    qr, kv = rms_norm(front[:, :q_lora], norms[0], eps), rope(rms_norm(kv, norms[1], eps), *angles)
    return qr.to(dtype or front.dtype), kv.to(dtype or front.dtype)


def query_rows(heads: Tensor, count: int, dim: int, angles: tuple[Tensor, Tensor], eps: float) -> Tensor:
    """Queries [R, count, dim] from the first columns of heads [R, Q]: normed per head without weight, then rotated."""
    q = heads[:, : count * dim].unflatten(1, (count, dim))
    return rope(rms_norm(q, None, eps), *angles)


def index_query_rows(heads: Tensor, count: int, dim: int, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Index queries [R, count, dim] from the last count*dim columns of heads [R, Q], rotated; no norm."""
    return rope(heads[:, -count * dim :].unflatten(1, (count, dim)), *angles)


def index_round(x: Tensor) -> Tensor:
    """Index queries or keys x [..., Di] in float32 or bf16 as native numerics round them: Hadamard rotation, e2m1.

    In x's dtype, which holds the values exactly. Source: reference section 2.9.
    """
    wide = x.to(torch.bfloat16).float()
    return quant.fake_quant_fp4(quant.hadamard(wide).to(torch.bfloat16).float(), 32).to(x.dtype)


def derotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Attention outputs x [R, H, c] rotated back at the query's position. May work in place."""
    return rope(x, angles[0], -angles[1])
