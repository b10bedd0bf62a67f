"""Rotation angles. Source: reference section 2.4."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from triptych.config import ModelShape, Yarn


class Angles(NamedTuple):
    """cos and sin [R, rope/2], float32."""

    cos: Tensor
    sin: Tensor


def frequencies(dim: int, theta: float, yarn: Yarn | None) -> Tensor:
    """Rotation per position of each of the dim/2 pairs, float32; long wavelengths stretched if `yarn`."""
    base = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if yarn is None:
        return base

    def pair_at(turns: float) -> float:
        """The (fractional) dim whose wave makes `turns` turns over the original context."""
        return dim * math.log(yarn.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_at(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_at(yarn.beta_slow)), dim - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return base / yarn.factor * ramp + base * (1 - ramp)


class RopeTables:
    """The two rotations of a model: `main` for SWA layers and MTP, `compress` for CSA and HCA layers."""

    def __init__(self, shape: ModelShape, device: torch.device | None = None) -> None:
        self.main = frequencies(shape.rope_dim, shape.rope_theta, None).to(device)
        self.compress = frequencies(shape.rope_dim, shape.compress_rope_theta, shape.yarn).to(device)

    def main_angles(self, positions: Tensor) -> Angles:
        """Angles of plain rope at positions [R]."""
        return _angles(self.main, positions)

    def compress_angles(self, positions: Tensor) -> Angles:
        """Angles of compress rope at positions [R]."""
        return _angles(self.compress, positions)


def _angles(freq: Tensor, positions: Tensor) -> Angles:
    # float32 on purpose: the reference and Transformers round the product in float32 too
    angle = positions.float().unsqueeze(1) * freq
    return Angles(angle.cos(), angle.sin())
