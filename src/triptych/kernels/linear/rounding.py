"""Rows of bf16 as e4m3 with a power of two for each group of 128 columns: rounded, or in pairs that lose nothing.

A number of bf16 has eight bits, and two of e4m3 have them too: x = scale * (high + low / 16), exactly for what is not
2^13 times smaller than the largest of its group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from triptych.kernels.quant.e4m3 import on_e4m3, scale_of
from triptych.kernels.quant.matrices import Fp8Rows, empty_rows


def rounded(x: Tensor, by_row: bool) -> Fp8Rows:
    """See matrices.quantize_rows, to the bit; scales lie row by row or column by column."""
    rows, width = x.shape
    out = empty_rows(rows, width, x.device)
    if not by_row:
        out = Fp8Rows(out.values, torch.empty(width // 128, rows, dtype=torch.float32, device=x.device).T)
    _launch(x, out, pairs=False)
    return out


def parted(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, width] bf16 as pairs: values [2 * rows, width] e4m3, high ones first; scales [width / 128, rows].

    The launch after it may begin early (`launch_pdl`), and then waits for it by gdc_wait."""
    rows, width = x.shape
    values = torch.empty(2 * rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(width // 128, rows, dtype=torch.float32, device=x.device)
    _launch(x, Fp8Rows(values, scales.T), pairs=True)
    return values, scales


def _launch(x: Tensor, out: Fp8Rows, pairs: bool) -> None:
    rows, width = x.shape
    _round[(rows, triton.cdiv(width, 1024))](
        *(x.contiguous(), out.values, out.scales, rows, width, *out.scales.stride()),
        PAIRS=pairs,
        EARLY=pairs and x.is_cuda,
        GROUPS=8,
        num_warps=4,
    )


@triton.jit
def _round(
    x_ptr,
    values_ptr,
    scales_ptr,
    rows,
    width,
    row_stride,
    group_stride,
    PAIRS: tl.constexpr,
    EARLY: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """GROUPS groups of a row of x. Source: reference section 2.9.

    What the high part of a pair leaves is found without its byte: of a byte that is stored and used besides, the ptxas
    of Triton 3.6 makes one use of R1, the stack's address, and sums were 16 % off."""
    if EARLY:
        gdc_launch_dependents()
    r = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    d = g[:, None] * 128 + tl.arange(0, 128)[None, :]
    there = d < width
    x = tl.load(x_ptr + r * width + d, mask=there, other=0.0).to(tl.float32)
    scale, inverse = scale_of(tl.max(tl.abs(x), 1))
    x = x * inverse[:, None]
    tl.store(values_ptr + r * width + d, x.to(tl.float8e4nv), mask=there)
    if PAIRS:
        low = (x - on_e4m3(x)) * 16.0
        tl.store(values_ptr + (rows + r) * width + d, low.to(tl.float8e4nv), mask=there)
    tl.store(scales_ptr + r * row_stride + g * group_stride, scale, mask=g * 128 < width)
