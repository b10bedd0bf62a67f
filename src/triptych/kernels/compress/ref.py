"""Token-axis compression: softmax pooling of group rows into one entry, in plain PyTorch.

Source: reference section 2.5 (report equations 9-12 and 20-23). A compressor row is [C | Z], float32: the value
and the gate of one token. CSA rows hold two halves of each, A for the next group's entry and B for their own:

    CSA  [ C_A | C_B | Z_A | Z_B ]  width 4 D        HCA  [ C | Z ]  width 2 D

    entry g of CSA pools        tokens  4g-4 .. 4g-1 (A halves)   4g .. 4g+3 (B halves)
    entry g of HCA pools        tokens  128g .. 128g+127
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from triptych.kernels.norm.ref import rms_norm, rope

ABSENT = -(2**62)  # a source row that does not exist: the A rows of entry 0


class CompressPlan(NamedTuple):
    """Which rows of a step pool into which entries; the same for every layer of one ratio.

    src [E, k] int64: k = 8 (CSA, the four A rows first) or 128 (HCA). s >= 0 is row s of this step, s < 0 is row
    -1-s of the flattened state rings, ABSENT no row; a group without its last row is none, and its entry means nothing.
    page, offset [E]: where the entry goes. phase [R] is position
    mod m of each row of the step. keep_src [K] rows of this step go to ring rows keep_dst [K] afterwards.
    """

    src: Tensor
    page: Tensor
    offset: Tensor
    phase: Tensor
    keep_src: Tensor
    keep_dst: Tensor


class Compressor(NamedTuple):
    """Weights of one compressor: ape [m, coff*D], norm [D], both float32; overlap is True for CSA (coff = 2)."""

    ape: Tensor
    norm: Tensor
    overlap: bool
    eps: float


def compress(
    front: Tensor, start: int, ring: Tensor, plan: CompressPlan, weights: Compressor, angles: tuple[Tensor, Tensor]
) -> Tensor:
    """Pool the groups that this step completes and store the step's last rows in the ring.

    front [R, F] holds this step's rows [C | Z] from column `start` on, Z still without ape; ring [N, 2*coff*D] is
    flat over slots. angles = (cos, sin) [E, rope/2] at the entries' first tokens. Returns entries [E, D], normed and
    rotated.
    """
    half = weights.ape.shape[1]
    value, gate = front[:, start : start + half], front[:, start + half : start + 2 * half]
    rows = torch.cat([value, gate + weights.ape[plan.phase]], dim=1)
    entries = _pool(rows, ring, plan.src, weights.overlap)
    ring[plan.keep_dst] = rows[plan.keep_src]
    return rope(rms_norm(entries, weights.norm, weights.eps), *angles)


def _pool(rows: Tensor, ring: Tensor, src: Tensor, overlap: bool) -> Tensor:
    """softmax(Z) . C over the source rows, per channel. Returns [E, D]."""
    from_step = (src >= 0).unsqueeze(-1)
    in_step = rows[src.clamp(min=0)]
    in_ring = ring[(-1 - src).clamp(min=0, max=ring.shape[0] - 1)]
    both = torch.where(from_step, in_step, in_ring)  # [E, k, width]
    half = both.shape[-1] // 2
    value, gate = both[..., :half], both[..., half:]
    if overlap:
        d = half // 2
        value = torch.cat([value[:, :4, :d], value[:, 4:, d:]], dim=1)
        gate = torch.cat([gate[:, :4, :d], gate[:, 4:, d:]], dim=1)
    absent = (src == ABSENT).unsqueeze(-1)
    value = value.masked_fill(absent, 0.0)
    gate = gate.masked_fill(absent, float("-inf"))
    return (torch.softmax(gate, dim=1) * value).sum(dim=1)
