"""Pooling of compressor rows compiled for the CPU: reads rows where they lie, in the step or in the ring."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from triptych.kernels.compress.ref import ABSENT, Compressor, CompressPlan
from triptych.kernels.jit import inline, kernel
from triptych.kernels.norm.cpu import inverse_rms, rotate
from triptych.kernels.parallel import over


def compress(
    front: Tensor, start: int, ring: Tensor, plan: CompressPlan, weights: Compressor, angles: tuple[Tensor, Tensor]
) -> Tensor:
    """See ref.compress."""
    ape = weights.ape.numpy()
    entries = torch.empty(plan.src.shape[0], weights.norm.shape[0])
    rows, state = front.numpy(), ring.numpy()
    if len(entries):
        weight = (ape, weights.norm.numpy(), weights.eps, weights.overlap)
        each = (plan.src.numpy(), angles[0].numpy(), angles[1].numpy(), entries.numpy())
        over(len(entries), 32, lambda a, b: _pool(rows, start, state, *weight, *(view[a:b] for view in each)))
    _keep(rows, start, ape, plan.phase.numpy(), plan.keep_src.numpy(), plan.keep_dst.numpy(), state)
    return entries


@inline
def _gates(front, start, ring, src, column, ape, phase, out):  # type: ignore[no-untyped-def]
    """Gates of one source row; a row of this step still lacks its ape."""
    half = ape.shape[1]
    if src == ABSENT:
        out[:] = -np.inf
    elif src >= 0:
        for i in range(out.shape[0]):
            out[i] = front[src, start + half + column + i] + ape[phase, column + i]
    else:
        for i in range(out.shape[0]):
            out[i] = ring[-1 - src, half + column + i]


@inline
def _add_weighted(front, start, ring, src, column, weights, out):  # type: ignore[no-untyped-def]
    """out += weights * value of one source row, per channel."""
    if src >= 0:
        for i in range(out.shape[0]):
            out[i] += weights[i] * front[src, start + column + i]
    elif src != ABSENT:  # its weights are zero, but it has no values to multiply
        for i in range(out.shape[0]):
            out[i] += weights[i] * ring[-1 - src, column + i]


@inline
def _softmax_rows(gates):  # type: ignore[no-untyped-def]
    """Softmax over the rows of gates [k, d], per channel, in place."""
    top = gates[0].copy()
    for k in range(1, gates.shape[0]):
        for i in range(gates.shape[1]):
            top[i] = max(top[i], gates[k, i])
    total = np.zeros_like(top)
    for k in range(gates.shape[0]):
        for i in range(gates.shape[1]):
            gates[k, i] = np.float32(math.exp(gates[k, i] - top[i]))
            total[i] += gates[k, i]
    for k in range(gates.shape[0]):
        for i in range(gates.shape[1]):
            gates[k, i] /= total[i]


@kernel
def _pool(front, start, ring, ape, norm, eps, overlap, plan, cos, sin, out):  # type: ignore[no-untyped-def]
    ratio, d = ape.shape[0], norm.shape[0]
    gates = np.empty((plan.shape[1], d), np.float32)
    for e in range(plan.shape[0]):
        for k in range(plan.shape[1]):
            column = d if overlap and k >= ratio else 0
            _gates(front, start, ring, plan[e, k], column, ape, k % ratio, gates[k])
        _softmax_rows(gates)
        out[e, :] = 0
        for k in range(plan.shape[1]):
            column = d if overlap and k >= ratio else 0
            _add_weighted(front, start, ring, plan[e, k], column, gates[k], out[e])
        scale = inverse_rms(out[e], eps)
        for i in range(d):
            out[e, i] = out[e, i] * scale * norm[i]
        rotate(out[e], cos[e], sin[e])


@kernel
def _keep(front, start, ape, phase, src, dst, ring):  # type: ignore[no-untyped-def]
    half = ape.shape[1]
    for n in range(src.shape[0]):
        row = src[n]
        for i in range(half):
            ring[dst[n], i] = front[row, start + i]
            ring[dst[n], half + i] = front[row, start + half + i] + ape[phase[row], i]
