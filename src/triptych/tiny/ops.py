"""The small operations of the training net, differentiable and batched over rows.

They compute what `triptych.kernels.*.ref` computes (reference sections 2.2, 2.4, 2.5, 2.7); a test holds them to it.
Rows are flattened tokens, so that one compiled version of each serves every sequence length of a training run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

GRADIENT_ITERS = 4  # Sinkhorn iterations that gradients pass through; the earlier ones only set the starting point


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last dim, computed in float32, returned in the dtype of `x`."""
    wide = x.float()
    out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (out if weight is None else out * weight.float()).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last 2p dims of `x` [..., c] as interleaved pairs by angles cos, sin [..., p]."""
    width = 2 * cos.shape[-1]
    head, tail = x[..., :-width], x[..., -width:].float().unflatten(-1, (-1, 2))
    even, odd = tail.unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    return torch.cat([head, turned.to(x.dtype)], dim=-1)


class HcMaps(NamedTuple):
    """What one mHC site derives from the streams: x [T, d], post [T, n] and comb [T, n, n]."""

    x: Tensor
    post: Tensor
    comb: Tensor


class HcSite(NamedTuple):
    """Weights and constants of one mHC site; see kernels.mhc.ref.MhcSite."""

    fn: Tensor
    base: Tensor
    scale: Tensor
    norm: Tensor
    iters: int
    eps: float
    norm_eps: float


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """Doubly stochastic matrices [T, n, n]; gradients pass through the last GRADIENT_ITERS iterations only.

    The iteration multiplies rows and columns; where it has converged, its derivative is that of the last iterations.
    """
    start = torch.softmax(logits, dim=-1) + eps
    with torch.no_grad():
        free = max(iters - GRADIENT_ITERS, 1)
        m = start / (start.sum(1, keepdim=True) + eps)
        for _ in range(free - 1):
            m = m / (m.sum(2, keepdim=True) + eps)
            m = m / (m.sum(1, keepdim=True) + eps)
        scaling = m / start
    m = start * scaling
    for _ in range(iters - free):
        m = m / (m.sum(2, keepdim=True) + eps)
        m = m / (m.sum(1, keepdim=True) + eps)
    return m


def hc_pre(streams: Tensor, site: HcSite) -> HcMaps:
    """Collapse `streams` [T, n, d] into the normed input of a sub-layer, and derive how its output expands."""
    n = streams.shape[1]
    z = _projected(streams, site.fn, site.norm_eps)
    pre = torch.sigmoid(z[:, :n] * site.scale[0] + site.base[:n]) + site.eps
    post = 2 * torch.sigmoid(z[:, n : 2 * n] * site.scale[1] + site.base[n : 2 * n])
    comb = sinkhorn((z[:, 2 * n :] * site.scale[2] + site.base[2 * n :]).view(-1, n, n), site.iters, site.eps)
    x = (pre.unsqueeze(-1) * streams.float()).sum(1)
    return HcMaps(rms_norm(x.to(streams.dtype), site.norm, site.norm_eps), post, comb)


def hc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """X'_k = post_k y + sum_j comb_jk X_j, back in the dtype of `streams` [T, n, d]."""
    wide = streams.float()
    mixed = (comb.unsqueeze(-1) * wide.unsqueeze(2)).sum(1)
    return (post.unsqueeze(-1) * y.float().unsqueeze(1) + mixed).to(streams.dtype)


def hc_head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float) -> Tensor:
    """Collapse the last streams [T, n, d] to [T, d]."""
    weight = torch.sigmoid(_projected(streams, fn, norm_eps) * scale + base) + eps
    return (weight.unsqueeze(-1) * streams.float()).sum(1).to(streams.dtype)


def _projected(streams: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    flat = streams.flatten(1)
    rho = torch.rsqrt(flat.float().square().mean(-1, keepdim=True) + norm_eps)
    return F.linear(flat, fn.to(flat.dtype)).float() * rho


def expert_hidden(h: Tensor, gains: Tensor, limit: float) -> Tensor:
    """Gated hidden values [T, e, I] of all experts from h [T, 2, e, I], times each token's expert gains [T, e]."""
    gate, up = h.float().unbind(1)
    hidden = F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    return (hidden * gains.unsqueeze(-1)).to(h.dtype)


def index_scores(dots: Tensor, weights: Tensor) -> Tensor:
    """Lightning indexer: sum over heads of weight [..., h] times ReLU of the dot products [..., h, k]."""
    return (torch.relu(dots.float()) * weights.float().unsqueeze(-1)).sum(-2)


def block_scores(dots: Tensor, weights: Tensor) -> Tensor:
    """`index_scores` of one block of queries, float32 [B, S, k], head by head so that it compiles to one pass."""
    total = torch.relu(dots[:, :, 0].float()) * weights[:, :, 0, None].float()
    for head in range(1, dots.shape[2]):
        total = total + torch.relu(dots[:, :, head].float()) * weights[:, :, head, None].float()
    return total


class Ops:
    """The operations above, compiled when `fused`; the eager ones serve the CPU and odd shapes.

    `scoring` compiles what scores a block of queries against every entry, for any shape.
    """

    def __init__(self, fused: bool, *, scoring: bool = False) -> None:
        def ready(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, dynamic=False) if fused else function

        self.rms_norm = ready(rms_norm)
        self.rotate = ready(rotate)
        self.hc_pre = ready(hc_pre)
        self.hc_post = ready(hc_post)
        self.hc_head = ready(hc_head)
        self.expert_hidden = ready(expert_hidden)
        self.index_scores = ready(index_scores)
        self.block_scores = torch.compile(block_scores, dynamic=True) if scoring else block_scores
