"""Rows of bf16 as e4m3 with a power of two for each group of 128 columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.quant.e4m3 import scale_of
from triptych.kernels.quant.matrices import Fp8Rows, empty_rows


def rounded(x: Tensor, by_row: bool) -> Fp8Rows:
    """See matrices.quantize_rows, to the bit; scales lie row by row or column by column."""
    rows, width = x.shape
    out = room(rows, width, x.device, by_row)
    _round[(rows, triton.cdiv(width, 1024))](
        *(x.contiguous(), out.values, out.scales, width, *out.scales.stride()), GROUPS=8, num_warps=4
    )
    return out


def room(rows: int, width: int, device: torch.device, by_row: bool) -> Fp8Rows:
    """Rows whose values are still to be written."""
    out = empty_rows(rows, width, device)
    return out if by_row else Fp8Rows(out.values, torch.empty(width // 128, rows, dtype=torch.float32, device=device).T)


@triton.jit
def _round(x_ptr, values_ptr, scales_ptr, width, row_stride, group_stride, GROUPS: tl.constexpr):
    """GROUPS groups of a row of x. Source: reference section 2.9."""
    r = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    d = g[:, None] * 128 + tl.arange(0, 128)[None, :]
    there = d < width
    x = tl.load(x_ptr + r * width + d, mask=there, other=0.0).to(tl.float32)
    scale, inverse = scale_of(tl.max(tl.abs(x), 1))
    tl.store(values_ptr + r * width + d, (x * inverse[:, None]).to(tl.float8e4nv), mask=there)
    tl.store(scales_ptr + r * row_stride + g * group_stride, scale, mask=g * 128 < width)
