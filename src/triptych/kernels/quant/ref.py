"""FP8 (e4m3) and MXFP4 (e2m1) with ue8m0 scales, written to be read.

A scale is one byte b meaning 2^(b-127); 255 is NaN and there is no zero. A group takes the smallest power of two that
brings its largest magnitude inside the grid, so nothing saturates, and a value already on the grid stays where it is.
Scales come from the exponent bits of the maximum, because log2 and division round and would be off by a factor of two
near the ends. A group that holds Inf or NaN becomes NaN throughout. Source: reference sections 2.9, 4.1, 4.2 and 5.2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_MAX = 448.0
FP4_MAX = 6.0
FP8_BLOCK = 128
MX_GROUP = 32
E8M0_NAN = 255
ACTIVATION_FLOOR = 1e-4
"""Activations of less than this magnitude count as this much when their scale is chosen."""

_SMALLEST_SCALE = 2.0**-126  # below it a scale's inverse would leave float32
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def e8m0_decode(code: Tensor) -> Tensor:
    """2^(code-127) in float32 for uint8 codes of any shape; NaN for 255."""
    bits = code.view(torch.uint8).to(torch.int32) << 23
    bits = torch.where(bits == 0, 1 << 22, bits)  # 2^-127 is subnormal in float32: its bit lies in the mantissa
    bits = torch.where(bits == E8M0_NAN << 23, 0x7FC00000, bits)  # 255 << 23 alone would read as infinity
    return bits.view(torch.float32)


def e8m0_encode(scale: Tensor) -> Tensor:
    """uint8 codes of float32 powers of two 2^-127 to 2^127. Anything else gets 255, NaN."""
    mantissa, exponent = torch.frexp(scale.float())
    code = exponent + 126
    exact = (mantissa == 0.5) & (code >= 0) & (code < E8M0_NAN)
    return torch.where(exact, code, E8M0_NAN).to(torch.uint8)


def scale_codes(amax: Tensor, top: float, floor: float = 0.0) -> Tensor:
    """e8m0 codes of the smallest powers of two s >= 2^-126 with max(amax, floor) <= top * s. Non-finite amax: 255."""
    mantissa, exponent = torch.frexp(amax.float().clamp(min=max(floor, top * _SMALLEST_SCALE)))
    top_mantissa, top_exponent = torch.frexp(torch.tensor(top))
    power = exponent - top_exponent + (mantissa > top_mantissa)
    return torch.where(torch.isfinite(amax), power + 127, E8M0_NAN).to(torch.uint8)


def round_e2m1(x: Tensor) -> Tensor:
    """x in [-6, 6] to the nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 with its sign; ties go to the even code."""
    size = x.abs()
    step: Tensor = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(x.dtype)
    return torch.round(x / step) * step


def fake_quant_fp8(x: Tensor, group: int = FP8_BLOCK) -> Tensor:
    """x [..., K] rounded to e4m3 with one ue8m0 scale per `group` along the last dim; same dtype. K may be ragged."""
    return _fake_quant(x, group, FP8_MAX, ACTIVATION_FLOOR)


def fake_quant_fp4(x: Tensor, group: int = MX_GROUP) -> Tensor:
    """x [..., K] rounded to e2m1 with one ue8m0 scale per `group` along the last dim; same dtype. K may be ragged."""
    return _fake_quant(x, group, FP4_MAX, 0.0)


def _fake_quant(x: Tensor, group: int, top: float, floor: float) -> Tensor:
    groups = to_groups(x.float(), group)
    scale = e8m0_decode(scale_codes(groups.abs().amax(-1, keepdim=True), top, floor))
    scaled = (groups / scale).clamp(-top, top)
    grid = scaled.to(torch.float8_e4m3fn).float() if top == FP8_MAX else round_e2m1(scaled)
    return (grid * scale).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def to_groups(x: Tensor, group: int) -> Tensor:
    """x [..., K] as [..., ceil(K / group), group], zeros behind a ragged end."""
    pad = -x.shape[-1] % group
    groups: Tensor = (F.pad(x, (0, pad)) if pad else x).unflatten(-1, (-1, group))
    return groups


def hadamard(x: Tensor) -> Tensor:
    """x [..., n] times the Walsh-Hadamard matrix (Sylvester order) / sqrt(n), n a power of two. Its own inverse."""
    n = x.shape[-1]
    if n & (n - 1):
        raise ValueError(f"hadamard needs a power of two, not {n}")
    half = 1
    out: Tensor = x
    while half < n:
        pairs: Tensor = out.unflatten(-1, (-1, 2, half))
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        out = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        half *= 2
    return out / math.sqrt(n)


def quantize_fp8(w: Tensor, block: tuple[int, int] = (FP8_BLOCK, FP8_BLOCK)) -> tuple[Tensor, Tensor]:
    """Matrix w [R, K] -> (float8_e4m3fn [R, K], uint8 e8m0 codes [ceil(R/br), ceil(K/bk)])."""
    rows, columns = w.shape
    height, width = block
    padded = F.pad(w.float(), (0, -columns % width, 0, -rows % height))
    blocks = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))  # [R/br, br, K/bk, bk]
    codes = scale_codes(blocks.abs().amax(dim=(1, 3)), FP8_MAX)
    values = (padded / spread(e8m0_decode(codes), block, padded.shape)).clamp(-FP8_MAX, FP8_MAX)
    return values[:rows, :columns].to(torch.float8_e4m3fn), codes


def dequantize_fp8(data: Tensor, scale: Tensor, block: tuple[int, int] = (FP8_BLOCK, FP8_BLOCK)) -> Tensor:
    """float8_e4m3fn [R, K] times its block scales (uint8 e8m0 codes, or plain float) -> float32 [R, K]."""
    factors = e8m0_decode(scale) if scale.element_size() == 1 else scale.float()
    return data.float() * spread(factors, block, data.shape)


def spread(scale: Tensor, block: tuple[int, int], shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Block scales repeated to one per element of a [R, K] matrix; the last blocks may be ragged."""
    tall = scale.repeat_interleave(block[0], 0)[: shape[0]]
    return tall.repeat_interleave(block[1], 1)[:, : shape[1]]


def e2m1_codes(x: Tensor) -> Tensor:
    """uint8 codes sign<<3 | magnitude of the e2m1 values nearest to x in [-6, 6]. NaN has no code and counts as 0."""
    size = round_e2m1(x.float()).abs()
    code = torch.where(size < 2, 2 * size, torch.where(size < 4, size + 2, size / 2 + 4))
    return torch.nan_to_num(code).to(torch.uint8) | (torch.signbit(x).to(torch.uint8) << 3)


def e2m1_values(codes: Tensor) -> Tensor:
    """float32 values of uint8 e2m1 codes 0..15."""
    grid = torch.tensor(_E2M1 + tuple(-v for v in _E2M1), device=codes.device)
    return grid[codes.long()]


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 codes [..., 2n] below 16 -> bytes [..., n]: even columns in the low half, odd ones in the high half."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Bytes [..., n] (uint8 or int8) -> codes [..., 2n] below 16, in column order."""
    raw = packed.view(torch.uint8)
    return torch.stack((raw & 15, raw >> 4), dim=-1).flatten(-2)


def quantize_mxfp4(w: Tensor, group: int = MX_GROUP) -> tuple[Tensor, Tensor]:
    """w [..., K] -> (int8 [..., K/2] packed e2m1, uint8 e8m0 codes [..., K/group]). `group` must divide K."""
    if w.shape[-1] % group:
        raise ValueError(f"MXFP4 needs rows of a multiple of {group}, not {w.shape[-1]}")
    groups = to_groups(w.float(), group)
    codes = scale_codes(groups.abs().amax(-1), FP4_MAX)
    values = (groups / e8m0_decode(codes)[..., None]).flatten(-2).clamp(-FP4_MAX, FP4_MAX)
    return pack_nibbles(e2m1_codes(values)).view(torch.int8), codes


def dequantize_mxfp4(packed: Tensor, scale: Tensor, group: int = MX_GROUP) -> Tensor:
    """int8 or uint8 [..., K/2] with uint8 e8m0 codes [..., K/group] -> float32 [..., K]."""
    values: Tensor = e2m1_values(unpack_nibbles(packed)).unflatten(-1, (-1, group))
    return (values * e8m0_decode(scale)[..., None]).flatten(-2)
