"""Pooling of compressor rows compiled for the CPU: reads rows where they lie, in the step or in the ring."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from triptych.kernels.compress.ref import ABSENT, Compressor, CompressPlan
from triptych.kernels.jit import inline, kernel
from triptych.kernels.norm.cpu import inverse_rms, rotate


def compress(
    front: Tensor, start: int, ring: Tensor, plan: CompressPlan, weights: Compressor, angles: tuple[Tensor, Tensor]
) -> Tensor:
    """See ref.compress."""
    ape = weights.ape.numpy()
    entries = torch.empty(plan.src.shape[0], weights.norm.shape[0])
    rows, state = front.numpy(), ring.numpy()
    if len(entries):
        _pool(
            rows, start, state, plan.src.numpy(), ape, weights.norm.numpy(), weights.eps,
            angles[0].numpy(), angles[1].numpy(), weights.overlap, entries.numpy(),
        )  # fmt: skip
    _keep(rows, start, ape, plan.phase.numpy(), plan.keep_src.numpy(), plan.keep_dst.numpy(), state)
    return entries


@inline
def _source(front, start, ring, src, column, ape, ratio, k, gate_row):  # type: ignore[no-untyped-def]
    """Gates of source row k into gate_row; returns nothing. A step row still lacks its ape."""
    half = ape.shape[1]
    d = gate_row.shape[0]
    if src >= 0:
        at = start + half + column
        for i in range(d):
            gate_row[i] = front[src, at + i] + ape[k % ratio, column + i]
    elif src == ABSENT:
        for i in range(d):
            gate_row[i] = -np.inf
    else:
        for i in range(d):
            gate_row[i] = ring[-1 - src, half + column + i]


@kernel
def _pool(front, start, ring, plan, ape, norm, eps, cos, sin, overlap, out):  # type: ignore[no-untyped-def]
    ratio, d, sources = ape.shape[0], norm.shape[0], plan.shape[1]
    gates = np.empty((sources, d), np.float32)
    top = np.empty(d, np.float32)
    total = np.empty(d, np.float32)
    for e in range(plan.shape[0]):
        top[:] = -np.inf
        for k in range(sources):
            column = d if overlap and k >= ratio else 0
            _source(front, start, ring, plan[e, k], column, ape, ratio, k, gates[k])
            for i in range(d):
                top[i] = max(top[i], gates[k, i])
        total[:] = 0
        out[e, :] = 0
        for k in range(sources):
            src = plan[e, k]
            if src == ABSENT:
                continue
            column = d if overlap and k >= ratio else 0
            for i in range(d):
                gates[k, i] = np.float32(math.exp(gates[k, i] - top[i]))
                total[i] += gates[k, i]
            if src >= 0:
                for i in range(d):
                    out[e, i] += gates[k, i] * front[src, start + column + i]
            else:
                for i in range(d):
                    out[e, i] += gates[k, i] * ring[-1 - src, column + i]
        for i in range(d):
            out[e, i] /= total[i]
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
