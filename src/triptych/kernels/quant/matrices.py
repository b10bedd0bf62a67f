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
from triptych.kernels.quant.tiles import (
    TILE_COLUMNS,
    TILE_ROWS,
    tile_scales,
    tile_values,
    untile_scales,
    untile_values,
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
    """values [.., N, K/2] uint8, two e2m1 a byte, even columns low; scales [.., N, K/32] uint8 e8m0 codes.

    With `tops`, the largest code of each row [.., N] uint8, the bytes of values and scales are in the order of tiles.py
    instead; `paired` says that a tile has rows of both halves.
    """

    values: Tensor
    scales: Tensor
    tops: Tensor | None = None
    paired: bool = False

    @property
    def shape(self) -> torch.Size:
        """[.., N, K], K counting elements."""
        return torch.Size((*self.values.shape[:-1], 2 * self.values.shape[-1]))

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes + (0 if self.tops is None else self.tops.nbytes)

    def one(self, expert: int) -> Mxfp4Matrix:
        """One matrix of a stack."""
        tops = None if self.tops is None else self.tops[expert]
        return Mxfp4Matrix(self.values[expert], self.scales[expert], tops, self.paired)

    def in_tiles(self, paired: bool) -> Mxfp4Matrix:
        """A stack [E, N, K] in the order of tiles.py, in the same memory: this object is none any more.

        N is a multiple of 64, K of 128.
        """
        assert self.tops is None and not self.shape[1] % TILE_ROWS and not self.shape[2] % TILE_COLUMNS, self.shape
        tops = torch.empty(self.shape[:2], dtype=torch.uint8, device=self.values.device)
        tiled = Mxfp4Matrix(self.values, self.scales, tops, paired)
        tiled.tile()
        return tiled

    def tile(self) -> None:
        """Bring a stack whose memory was filled as released into tiles, in place."""
        assert self.tops is not None
        for expert in range(len(self.values)):
            self.values[expert] = tile_values(self.values[expert], self.paired)
            self.scales[expert], self.tops[expert] = tile_scales(self.scales[expert], self.paired)

    def dequantize(self) -> Tensor:
        """float32 [.., N, K]."""
        if self.tops is None:
            return dequantize_mxfp4(self.values, self.scales)
        if self.values.dim() > 2:
            return torch.stack([self.one(i).dequantize() for i in range(len(self.values))])
        scales = untile_scales(self.scales, self.tops, self.paired)
        return dequantize_mxfp4(untile_values(self.values, self.paired), scales)


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
class BothRows:
    """Activations that some products read as they are and others rounded: plain [R, K], and the same rows rounded."""

    plain: Tensor
    rounded: Fp8Rows

    @property
    def shape(self) -> torch.Size:
        """[R, K]."""
        return self.plain.shape


@dataclass(frozen=True, slots=True)
class Unnormed:
    """A row that its product norms and rounds: columns [1, K] float32, norm [K] float32 and eps of an RMS norm."""

    columns: Tensor
    norm: Tensor
    eps: float

    @property
    def shape(self) -> torch.Size:
        """[1, K]."""
        return self.columns.shape


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


def empty_rows(rows: int, width: int, device: torch.device) -> Fp8Rows:
    """Room for rounded rows; `width` is a multiple of 128."""
    values = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=device)
    return Fp8Rows(values, torch.empty(rows, width // FP8_BLOCK, dtype=torch.float32, device=device))


def quantize_rows(x: Tensor) -> Fp8Rows:
    """x [R, K] in e4m3 with one ue8m0 scale per 128 columns, as native numerics quantise inputs of linears.

    Source: reference section 2.9.
    """
    groups = to_groups(x.float(), FP8_BLOCK)
    scales = e8m0_decode(scale_codes(groups.abs().amax(-1), FP8_MAX, ACTIVATION_FLOOR))
    values = (groups / scales[..., None]).clamp(-FP8_MAX, FP8_MAX).flatten(-2)[..., : x.shape[-1]]
    return Fp8Rows(values.to(torch.float8_e4m3fn), scales)
