"""Manifold-constrained hyper-connections in plain PyTorch: the truth that faster versions are checked against.

Source: reference section 2.2 (report section 2.2). All maps are computed in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from triptych.kernels.norm.ref import rms_norm
from triptych.kernels.quant.matrices import BothRows, quantize_rows


class MhcSite(NamedTuple):
    """Weights of one site. fn [(2+n)n, n*d], base [(2+n)n], scale [3], all float32; eps and iterations of Sinkhorn.

    rounds: products read x rounded, too; whole sites may hand over BothRows. leaves: a mixture of experts reads x and
    can run the site itself; whole sites may hand over Uncollapsed.
    """

    fn: Tensor
    base: Tensor
    scale: Tensor
    iters: int
    eps: float
    norm_eps: float
    rounds: bool = False
    leaves: bool = False


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


# -- whole sites, for decode rows: what a block leaves behind, then what the next one reads


class Residual(NamedTuple):
    """What a site leaves for the one after it: streams [R, n, d], post [R, n] and comb [R, n, n] (both float32)."""

    streams: Tensor
    post: Tensor
    comb: Tensor


class Uncollapsed(NamedTuple):
    """A site that has not run yet: whoever reads its x runs it, from what came before, `y` and `before`.

    streams, post and comb are still empty, and filled then.
    """

    y: Tensor
    before: Residual
    site: MhcSite
    norm: Tensor
    streams: Tensor
    post: Tensor
    comb: Tensor


SiteRows = tuple[Tensor | BothRows | Uncollapsed, Tensor, Tensor, Tensor]
"""x, and the Residual's three."""


def mhc_rows(y: Tensor, before: Residual, site: MhcSite, norm: Tensor) -> SiteRows:
    """From the output y [R, d] of one block to the input of the next: expand, then collapse and norm.

    Returns x [R, d], streams [R, n, d], post and comb. Streams and x have the dtype of `before.streams`, to which they
    are rounded (native numerics: bf16); everything between is float32.
    """
    streams = mhc_post(y.float(), before.streams.float(), before.post, before.comb).to(before.streams.dtype)
    return _next(streams, site, norm)


def mhc_first(token_ids: Tensor, embed: Tensor, site: MhcSite, norm: Tensor) -> SiteRows:
    """The first site: streams are copies of the embeddings of token_ids [R], rounded to bf16 where embed [V, d] is.

    Returns what `mhc_rows` does.
    """
    return _next(embed[token_ids].unsqueeze(1).repeat(1, site.fn.shape[1] // embed.shape[1], 1), site, norm)


def mhc_last(y: Tensor, before: Residual, head: MhcHead, norm: Tensor) -> Tensor:
    """After the last block: expand, collapse with the head's weights, norm. Returns [R, d] in the streams' dtype."""
    dtype = before.streams.dtype
    streams = mhc_post(y.float(), before.streams.float(), before.post, before.comb).to(dtype)
    hidden = mhc_head(streams.float(), head).to(dtype)
    return rms_norm(hidden, norm, head.norm_eps)


def _next(streams: Tensor, site: MhcSite, norm: Tensor) -> SiteRows:
    x, post, comb = mhc_pre(streams.float(), site, norm)
    x = x.to(streams.dtype)
    return BothRows(x, quantize_rows(x)) if site.rounds else x, streams, post, comb
