"""Manifold-constrained hyper-connections in plain PyTorch: the truth that faster versions are checked against.

Source: reference section 2.2 (report section 2.2). All maps are computed in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from triptych.kernels.norm.ref import rms_norm


class MhcSite(NamedTuple):
    """Weights of one site. fn [(2+n)n, n*d], base [(2+n)n], scale [3], all float32; eps and iterations of Sinkhorn."""

    fn: Tensor
    base: Tensor
    scale: Tensor
    iters: int
    eps: float
    norm_eps: float


class MhcHead(NamedTuple):
    """Weights of the final collapse. fn [n, n*d], base [n], scale [1], all float32."""

    fn: Tensor
    base: Tensor
    scale: Tensor
    eps: float
    norm_eps: float


def mhc_pre(streams: Tensor, site: MhcSite, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Collapse `streams` [R, n, d] into a sub-layer's normed input.

    Returns x [R, d] = RMSNorm(sum_j pre_j X_j; norm), post [R, n] and the mixing matrix comb [R, n, n].
    """
    n = streams.shape[1]
    z = _projected(streams, site.fn, site.norm_eps)
    scale = torch.cat([site.scale[:1].expand(n), site.scale[1:2].expand(n), site.scale[2:].expand(n * n)])
    z = z * scale + site.base
    pre = torch.sigmoid(z[:, :n]) + site.eps
    post = 2 * torch.sigmoid(z[:, n : 2 * n])
    comb = sinkhorn(z[:, 2 * n :].view(-1, n, n), site.iters, site.eps)
    collapsed = (pre.unsqueeze(-1) * streams).sum(dim=1)
    return rms_norm(collapsed, norm, site.norm_eps), post, comb


def mhc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Expand a sub-layer's output y [R, d] back: X'_k = post_k y + sum_j comb_jk X_j. Returns [R, n, d].

    The sum runs over the FIRST index of comb: it is doubly stochastic but not symmetric.
    """
    return post.unsqueeze(-1) * y.unsqueeze(1) + torch.matmul(comb.transpose(1, 2), streams)


def mhc_head(streams: Tensor, head: MhcHead) -> Tensor:
    """Collapse the last streams [R, n, d] to the hidden state [R, d]; no softmax, no Sinkhorn."""
    z = _projected(streams, head.fn, head.norm_eps) * head.scale + head.base
    return ((torch.sigmoid(z) + head.eps).unsqueeze(-1) * streams).sum(dim=1)


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """Doubly stochastic matrices [R, n, n] from logits: softmax over rows, then `iters` column normalisations
    with `iters - 1` row normalisations between them, in exactly this order."""
    m = torch.softmax(logits, dim=-1) + eps
    m = m / (m.sum(dim=1, keepdim=True) + eps)
    for _ in range(iters - 1):
        m = m / (m.sum(dim=2, keepdim=True) + eps)
        m = m / (m.sum(dim=1, keepdim=True) + eps)
    return m


def _projected(streams: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """fn . vec(X) / rms(vec(X)): the norm is over all n*d values jointly and has no weight."""
    flat = streams.flatten(1).to(fn.dtype)
    return torch.nn.functional.linear(flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps), fn)
