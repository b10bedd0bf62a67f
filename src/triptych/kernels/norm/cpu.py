"""Norms and rotations of the attention front end compiled for the CPU: one pass per row."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from triptych.kernels.jit import inline, kernel
from triptych.kernels.norm import ref
from triptych.kernels.parallel import over

Angles = tuple[Tensor, Tensor]
_ROWS = 64  # least rows worth a thread


def latent_rows(
    front: Tensor,
    q_lora: int,
    norms: tuple[Tensor, Tensor],
    angles: Angles,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """See ref.latent_rows."""
    qr = torch.empty(front.shape[0], q_lora)
    kv = torch.empty(front.shape[0], norms[1].shape[0])
    rows = (front.numpy(), angles[0].numpy(), angles[1].numpy(), qr.numpy(), kv.numpy())
    weights = (norms[0].numpy(), norms[1].numpy(), eps)
    over(len(qr), _ROWS, lambda first, last: _latent(*(view[first:last] for view in rows), *weights))
    return (qr, kv) if dtype is None else (qr.to(dtype), kv.to(dtype))


def query_rows(heads: Tensor, count: int, dim: int, angles: Angles, eps: float) -> Tensor:
    """See ref.query_rows."""
    q = torch.empty(heads.shape[0], count, dim)
    rows = (heads.numpy(), angles[0].numpy(), angles[1].numpy(), q.numpy())
    over(len(q), _ROWS, lambda first, last: _heads(*(view[first:last] for view in rows), 0, eps, True))
    return q


def index_query_rows(heads: Tensor, count: int, dim: int, angles: Angles) -> Tensor:
    """See ref.index_query_rows."""
    q = torch.empty(heads.shape[0], count, dim)
    start = heads.shape[1] - count * dim
    _heads(heads.numpy(), angles[0].numpy(), angles[1].numpy(), q.numpy(), start, 0.0, False)
    return q


def derotate(x: Tensor, angles: Angles) -> Tensor:
    """See ref.derotate; works in place."""
    _rotate_back(x.numpy(), angles[0].numpy(), angles[1].numpy())
    return x


def rms_norm_deterministic(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See ref.rms_norm; rows are independent of each other. Runs once a step, for sampled rows only."""
    return torch.cat([ref.rms_norm(row, weight, eps) for row in x.split(1)])


@inline
def rotate(row, cos, sin):  # type: ignore[no-untyped-def]
    """Rotate the trailing pairs of one vector in place."""
    start = row.shape[0] - 2 * cos.shape[0]
    for p in range(cos.shape[0]):
        even, odd = row[start + 2 * p], row[start + 2 * p + 1]
        row[start + 2 * p] = even * cos[p] - odd * sin[p]
        row[start + 2 * p + 1] = odd * cos[p] + even * sin[p]


@inline
def inverse_rms(row, eps):  # type: ignore[no-untyped-def]
    """1 / rms of one vector."""
    squares = np.float32(0)
    for i in range(row.shape[0]):
        squares += row[i] * row[i]
    return np.float32(1.0 / math.sqrt(squares / row.shape[0] + eps))


@kernel
def _latent(front, cos, sin, qr, kv, q_norm, kv_norm, eps):  # type: ignore[no-untyped-def]
    q_lora, c = qr.shape[1], kv.shape[1]
    for r in range(front.shape[0]):
        scale = inverse_rms(front[r, :q_lora], eps)
        for i in range(q_lora):
            qr[r, i] = front[r, i] * scale * q_norm[i]
        scale = inverse_rms(front[r, q_lora : q_lora + c], eps)
        for i in range(c):
            kv[r, i] = front[r, q_lora + i] * scale * kv_norm[i]
        rotate(kv[r], cos[r], sin[r])


@kernel
def _heads(heads, cos, sin, out, start, eps, normed):  # type: ignore[no-untyped-def]
    count, dim = out.shape[1], out.shape[2]
    for r in range(out.shape[0]):
        for h in range(count):
            at = start + h * dim
            scale = inverse_rms(heads[r, at : at + dim], eps) if normed else np.float32(1)
            for i in range(dim):
                out[r, h, i] = heads[r, at + i] * scale
            rotate(out[r, h], cos[r], sin[r])


@kernel
def _rotate_back(x, cos, sin):  # type: ignore[no-untyped-def]
    for r in range(x.shape[0]):
        for h in range(x.shape[1]):
            rotate(x[r, h], cos[r], -sin[r])
