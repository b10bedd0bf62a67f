"""Matrices in the formats in which they are released, and rows quantised to multiply them.

All of them are containers of tensors; what they stand for is `dequantize`. Sources: reference sections 2.9 and 5.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.kernels.quant.ref import (
    ACTIVATION_FLOOR,
    FP8_BLOCK,
    FP8_MAX,
    dequantize_mxfp4,
    e8m0_decode,
    scale_codes,
    to_groups,
)


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """values [.., N, K] float8_e4m3fn times scales [.., ceil(N/128), ceil(K/128)], float32 powers of two."""

    values: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        """[.., N, K]."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    def rows(self, start: int, stop: int) -> Fp8Matrix:
        """Rows [start, stop) of a matrix [N, K] as a view; `start` is a multiple of 128."""
        assert start % FP8_BLOCK == 0, start
        return Fp8Matrix(self.values[start:stop], self.scales[start // FP8_BLOCK : -(-stop // FP8_BLOCK)])

    def dequantize(self) -> Tensor:
        """float32 [.., N, K]."""
        tall = self.scales.repeat_interleave(FP8_BLOCK, -2)[..., : self.shape[-2], :]
        return self.values.float() * tall.repeat_interleave(FP8_BLOCK, -1)[..., : self.shape[-1]]


@dataclass(frozen=True, slots=True)
class Mxfp4Matrix:
    """values [.., N, K/2] uint8, two e2m1 a byte, even columns low; scales [.., N, K/32] uint8 e8m0 codes."""

    values: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        """[.., N, K], K counting elements."""
        return torch.Size((*self.values.shape[:-1], 2 * self.values.shape[-1]))

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    def one(self, expert: int) -> Mxfp4Matrix:
        """One matrix of a stack."""
        return Mxfp4Matrix(self.values[expert], self.scales[expert])

    def dequantize(self) -> Tensor:
        """float32 [.., N, K]."""
        return dequantize_mxfp4(self.values, self.scales)


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """Activations: values [R, K] float8_e4m3fn times scales [R, ceil(K/128)], float32 powers of two."""

    values: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        """[R, K]."""
        return self.values.shape

    def dequantize(self) -> Tensor:
        """float32 [R, K]."""
        return self.values.float() * self.scales.repeat_interleave(FP8_BLOCK, -1)[..., : self.shape[-1]]


@dataclass(frozen=True, slots=True)
class FrontMatrix:
    """The front projections: `latent` [q_lora + c, d] as FP8, the compressors and indexer weights [.., d] in bf16."""

    latent: Fp8Matrix
    rest: Tensor

    @property
    def shape(self) -> torch.Size:
        """[columns of both, d]."""
        return torch.Size((self.latent.shape[0] + self.rest.shape[0], self.rest.shape[1]))

    @property
    def nbytes(self) -> int:
        """Bytes of both parts."""
        return self.latent.nbytes + self.rest.nbytes


Matrix = Tensor | Fp8Matrix


def quantize_rows(x: Tensor) -> Fp8Rows:
    """x [R, K] in e4m3 with one ue8m0 scale per 128 columns, as native numerics quantise inputs of linears.

    Source: reference section 2.9.
    """
    groups = to_groups(x.float(), FP8_BLOCK)
    scales = e8m0_decode(scale_codes(groups.abs().amax(-1), FP8_MAX, ACTIVATION_FLOOR))
    values = (groups / scales[..., None]).clamp(-FP8_MAX, FP8_MAX).flatten(-2)[..., : x.shape[-1]]
    return Fp8Rows(values.to(torch.float8_e4m3fn), scales)
