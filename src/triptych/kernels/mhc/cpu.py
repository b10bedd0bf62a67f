"""Hyper-connections compiled for the CPU: one pass per site instead of some 130 small tensor operations.

Only the projection stays a matrix product. Sinkhorn's 4x4 matrix lives in registers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triptych.kernels.jit import inline, kernel
from triptych.kernels.linear.cpu import linear, linear_deterministic
from triptych.kernels.mhc import ref
from triptych.kernels.mhc.ref import MhcHead, MhcSite
from triptych.kernels.parallel import over

_ROWS = 64  # least rows worth a thread
_N = 4  # streams of every released model; other counts take the reference


def mhc_pre(streams: Tensor, site: MhcSite, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ref.mhc_pre."""
    return _pre(streams, site, norm, linear)


def mhc_pre_deterministic(streams: Tensor, site: MhcSite, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mhc_pre whose rows do not depend on their batch mates."""
    return _pre(streams, site, norm, linear_deterministic)


def mhc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """See ref.mhc_post."""
    if streams.shape[1] != _N:
        return ref.mhc_post(y, streams, post, comb)
    out = torch.empty_like(streams)
    views = (y.numpy(), streams.numpy(), post.numpy(), comb.numpy(), out.numpy())
    over(len(y), _ROWS, lambda first, last: _post_rows(*(view[first:last] for view in views)))
    return out


def mhc_head(streams: Tensor, head: MhcHead) -> Tensor:
    """See ref.mhc_head."""
    return _collapsed(streams, head, linear)


def mhc_head_deterministic(streams: Tensor, head: MhcHead) -> Tensor:
    """See ref.mhc_head; rows are independent of each other."""
    return _collapsed(streams, head, linear_deterministic)


def _collapsed(streams: Tensor, head: MhcHead, product: Any) -> Tensor:
    out = torch.empty(streams.shape[0], streams.shape[2])
    z = product(streams.flatten(1), head.fn)
    weights = (head.scale.numpy(), head.base.numpy(), head.eps, head.norm_eps)
    _head_rows(streams.numpy(), z.numpy(), *weights, out.numpy())
    return out


def _pre(streams: Tensor, site: MhcSite, norm: Tensor, product: Any) -> tuple[Tensor, Tensor, Tensor]:
    if streams.shape[1] != _N:
        return ref.mhc_pre(streams, site, norm)
    rows, n, d = streams.shape
    z = product(streams.view(rows, n * d), site.fn)
    x = torch.empty(rows, d)
    post = torch.empty(rows, n)
    comb = torch.empty(rows, n, n)
    rows_of = (streams.numpy(), z.numpy(), x.numpy(), post.numpy(), comb.numpy())
    weights = (site.scale.numpy(), site.base.numpy(), norm.numpy(), site.iters, site.eps, site.norm_eps)
    over(rows, _ROWS, lambda first, last: _pre_rows(*(view[first:last] for view in rows_of), *weights))
    return x, post, comb


@inline
def _sigmoid(v):  # type: ignore[no-untyped-def]
    return np.float32(1) / (np.float32(1) + np.float32(math.exp(-v)))


@inline
def _sinkhorn(m, iters, eps):  # type: ignore[no-untyped-def]
    for j in range(4):
        top = max(max(m[j, 0], m[j, 1]), max(m[j, 2], m[j, 3]))
        for k in range(4):
            m[j, k] = np.float32(math.exp(m[j, k] - top))
        total = m[j, 0] + m[j, 1] + m[j, 2] + m[j, 3]
        for k in range(4):
            m[j, k] = m[j, k] / total + eps
    for step in range(iters):
        if step > 0:
            for j in range(4):
                total = m[j, 0] + m[j, 1] + m[j, 2] + m[j, 3] + eps
                for k in range(4):
                    m[j, k] /= total
        for k in range(4):
            total = m[0, k] + m[1, k] + m[2, k] + m[3, k] + eps
            for j in range(4):
                m[j, k] /= total


@kernel
def _pre_rows(streams, z, x, post, comb, scale, base, norm, iters, eps, norm_eps):  # type: ignore[no-untyped-def]
    d = streams.shape[2]
    for r in range(streams.shape[0]):
        squares = np.float32(0)
        for j in range(4):
            for i in range(d):
                squares += streams[r, j, i] * streams[r, j, i]
        rho = np.float32(1.0 / math.sqrt(squares / (4 * d) + norm_eps))
        for j in range(4):
            post[r, j] = np.float32(2) * _sigmoid(z[r, 4 + j] * rho * scale[1] + base[4 + j])
            for k in range(4):
                comb[r, j, k] = z[r, 8 + 4 * j + k] * rho * scale[2] + base[8 + 4 * j + k]
        _sinkhorn(comb[r], iters, np.float32(eps))
        p0 = _sigmoid(z[r, 0] * rho * scale[0] + base[0]) + np.float32(eps)
        p1 = _sigmoid(z[r, 1] * rho * scale[0] + base[1]) + np.float32(eps)
        p2 = _sigmoid(z[r, 2] * rho * scale[0] + base[2]) + np.float32(eps)
        p3 = _sigmoid(z[r, 3] * rho * scale[0] + base[3]) + np.float32(eps)
        squares = np.float32(0)
        for i in range(d):
            v = p0 * streams[r, 0, i] + p1 * streams[r, 1, i] + p2 * streams[r, 2, i] + p3 * streams[r, 3, i]
            x[r, i] = v
            squares += v * v
        inverse = np.float32(1.0 / math.sqrt(squares / d + norm_eps))
        for i in range(d):
            x[r, i] = x[r, i] * inverse * norm[i]


@kernel
def _head_rows(streams, z, scale, base, eps, norm_eps, out):  # type: ignore[no-untyped-def]
    n, d = streams.shape[1], streams.shape[2]
    for r in range(streams.shape[0]):
        squares = np.float32(0)
        for j in range(n):
            for i in range(d):
                squares += streams[r, j, i] * streams[r, j, i]
        rho = np.float32(1.0 / math.sqrt(squares / (n * d) + norm_eps))
        out[r] = 0
        for j in range(n):
            weight = _sigmoid(z[r, j] * rho * scale[0] + base[j]) + np.float32(eps)
            for i in range(d):
                out[r, i] += weight * streams[r, j, i]


@kernel
def _post_rows(y, streams, post, comb, out):  # type: ignore[no-untyped-def]
    for r in range(streams.shape[0]):
        for k in range(4):
            m0, m1, m2, m3, p = comb[r, 0, k], comb[r, 1, k], comb[r, 2, k], comb[r, 3, k], post[r, k]
            for i in range(y.shape[1]):
                mixed = m0 * streams[r, 0, i] + m1 * streams[r, 1, i] + m2 * streams[r, 2, i] + m3 * streams[r, 3, i]
                out[r, k, i] = p * y[r, i] + mixed
