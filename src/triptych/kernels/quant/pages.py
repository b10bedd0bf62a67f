"""The byte pages that hold FP8 entries and index keys. Nothing in them is entry-contiguous:

    entries    | B x (nope e4m3 | rope bf16) | B x scale bytes, padded to 8 | zeros up to a multiple of `align` |
    fp8 keys   | B x values e4m3             | B x one fp32 scale           |
    mxfp4 keys | B x two e2m1 a byte         | B x one e8m0 per 32          |

For head_dim 512 and rope_dim 64 an entry is 448 + 128 + 8 = 584 bytes; an index key of 128 is 132 or 68 bytes.
Source: reference sections 4.1 and 4.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.quant.ref import (
    ACTIVATION_FLOOR,
    FP8_MAX,
    MX_GROUP,
    dequantize_mxfp4,
    e8m0_decode,
    quantize_mxfp4,
    scale_codes,
    to_groups,
)

ENTRY_GROUP = 64
"""Dims of an entry that share a scale."""

ENTRY_ALIGN = 576
"""GPU pages of entries are padded to a multiple of this many bytes (TMA)."""


def entry_scale_bytes(head_dim: int, rope_dim: int) -> int:
    """Scale bytes of one entry: one per 64 dims before the rope tail, padded to a multiple of 8."""
    groups = -(-(head_dim - rope_dim) // ENTRY_GROUP)
    return -(-groups // 8) * 8


def pack_entries(entries: Tensor, rope_dim: int, align: int = 1) -> Tensor:
    """Entries [B, head_dim], rotated in their last `rope_dim` dims, as one uint8 page."""
    head_dim = entries.shape[1]
    nope = entries[:, : head_dim - rope_dim].float()
    groups = to_groups(nope, ENTRY_GROUP)
    codes = scale_codes(groups.abs().amax(-1), FP8_MAX, ACTIVATION_FLOOR)
    values = (groups / e8m0_decode(codes)[..., None]).clamp(-FP8_MAX, FP8_MAX).flatten(1)[:, : nope.shape[1]]
    rope = entries[:, head_dim - rope_dim :].to(torch.bfloat16).contiguous()
    rows = torch.cat([values.to(torch.float8_e4m3fn).view(torch.uint8), rope.view(torch.uint8)], dim=1)
    scales = F.pad(codes, (0, entry_scale_bytes(head_dim, rope_dim) - codes.shape[1]))
    page = torch.cat([rows.flatten(), scales.flatten()])
    return F.pad(page, (0, -page.numel() % align))


def unpack_entries(page: Tensor, count: int, head_dim: int, rope_dim: int) -> Tensor:
    """The first section of a page of `count` entries back as float32 [count, head_dim]."""
    nope, row = head_dim - rope_dim, head_dim + rope_dim
    scale_bytes = entry_scale_bytes(head_dim, rope_dim)
    rows = page[: count * row].view(count, row)
    codes = page[count * row : count * (row + scale_bytes)].view(count, scale_bytes)
    values = rows[:, :nope].contiguous().view(torch.float8_e4m3fn).float()
    scale = e8m0_decode(codes[:, : -(-nope // ENTRY_GROUP)].contiguous())
    rope = rows[:, nope:].contiguous().view(torch.bfloat16).float()
    return torch.cat([values * scale.repeat_interleave(ENTRY_GROUP, 1)[:, :nope], rope], dim=1)


def pack_index_keys_fp8(keys: Tensor) -> Tensor:
    """Keys [B, D] as uint8 [B * (D + 4)]: e4m3 values, then one power-of-two float32 scale each."""
    scale = e8m0_decode(scale_codes(keys.float().abs().amax(-1), FP8_MAX, ACTIVATION_FLOOR))
    values = (keys.float() / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return torch.cat([values.view(torch.uint8).flatten(), scale.view(torch.uint8)])


def unpack_index_keys_fp8(page: Tensor, count: int, dim: int) -> Tensor:
    """float32 keys [count, dim] of a page written by `pack_index_keys_fp8`."""
    values = page[: count * dim].view(torch.float8_e4m3fn).view(count, dim)
    scale = page[count * dim : count * (dim + 4)].clone().view(torch.float32)  # a fresh buffer is aligned
    return values.float() * scale[:, None]


def pack_index_keys_mxfp4(keys: Tensor) -> Tensor:
    """Keys [B, D], 32 | D, as uint8 [B * (D/2 + D/32)]: packed e2m1, then e8m0 codes."""
    packed, codes = quantize_mxfp4(keys)
    return torch.cat([packed.view(torch.uint8).flatten(), codes.flatten()])


def unpack_index_keys_mxfp4(page: Tensor, count: int, dim: int) -> Tensor:
    """float32 keys [count, dim] of a page written by `pack_index_keys_mxfp4`."""
    packed = page[: count * dim // 2].view(count, dim // 2)
    codes = page[count * dim // 2 : count * (dim // 2 + dim // MX_GROUP)].view(count, dim // MX_GROUP)
    return dequantize_mxfp4(packed, codes)
