"""Linear maps in plain Triton: weights as released or dense, on any NVIDIA GPU and in Triton's interpreter.

An e4m3 value times its power of two is exact in bfloat16, and so is a rounded input times its own: weights are moved
bit by bit into bfloat16 in registers and meet rounded inputs in the bfloat16 tensor cores, with float32 sums. No type
of eight bits is named, which GPUs before capability 8.9 do not have.

A sum is one program's, in the order of the columns, so with tiles of one size a row's bits do not depend on how many
rows there are: `fixed.py` has the linears of deterministic mode.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.gpu import multiprocessors
from triptych.kernels.linear.ref import normed
from triptych.kernels.quant.e4m3 import e4m3_values, on_e4m3, scale_of
from triptych.kernels.quant.matrices import BothRows, Fp8Matrix, Fp8Rows, FrontMatrix, Matrix, Unnormed

FIXED_ROWS = 64
"""Rows of a tile in deterministic mode."""
_STAGES = 5
"""Of programs with narrow tiles: in 80 KiB of shared memory, which GPUs since Ampere have."""

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Triton's interpreter has no bfloat16 arithmetic."""


def linear(x: Tensor | Fp8Rows | Unnormed, weight: Matrix, tall: int | None = None) -> Tensor:
    """See ref.linear; float32 rows of a bfloat16 matrix give float32 sums. `tall`: rows of a tile."""
    if isinstance(x, Unnormed):
        x = normed(x)
    if isinstance(x, Fp8Rows):
        x = x.dequantize().to(torch.bfloat16)
    if isinstance(weight, Fp8Matrix):
        return _product(rounded(x), weight.values, weight.scales, x.dtype, tall)
    return _product(x.to(weight.dtype), weight, None, x.dtype, tall)


def front_linear(x: Tensor | BothRows, front: FrontMatrix, tall: int | None = None) -> Tensor:
    """See ref.front_linear."""
    x = x.plain if isinstance(x, BothRows) else x
    latent = linear(x, front.latent, tall).to(torch.bfloat16)
    rest = _product(x, front.rest.to(x.dtype), None, torch.float32, tall)
    return torch.cat([latent.float(), rest], dim=1)


def grouped_linear(x: Tensor, weight: Matrix, tall: int | None = None) -> Tensor:
    """See ref.grouped_linear."""
    rows, groups, depth = x.shape
    values, scales = (weight.values, weight.scales) if isinstance(weight, Fp8Matrix) else (weight, None)
    narrow = torch.bfloat16 if scales is not None else weight.dtype  # type: ignore[union-attr]
    out = torch.empty(rows, groups * values.shape[1], dtype=x.dtype, device=x.device)
    _launch(x.to(narrow).reshape(rows, groups * depth), values, scales, out, tall)
    return out


def rounded(x: Tensor) -> Tensor:
    """quant.ref.fake_quant_fp8 of rows [R, K] in groups of 128, as bfloat16, in which it is exact."""
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=torch.bfloat16, device=x.device)
    x = x.contiguous()
    if rows:
        _round[(rows, triton.cdiv(width, 1024))](x, out, width, GROUPS=8, num_warps=4)
    return out


def _product(x: Tensor, values: Tensor, scales: Tensor | None, dtype: torch.dtype, tall: int | None) -> Tensor:
    out = torch.empty(len(x), values.shape[0], dtype=dtype, device=x.device)
    _launch(x, values.unsqueeze(0), None if scales is None else scales.unsqueeze(0), out, tall)
    return out


def _launch(x: Tensor, values: Tensor, scales: Tensor | None, out: Tensor, tall: int | None) -> None:
    """x [R, G * K] times values [G, N, K] into out [R, G * N]."""
    groups, columns, depth = values.shape
    rows = len(x)
    if not rows:
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    values = values if values.stride(-1) == 1 else values.contiguous()
    tall = tall or min(64, max(16, int(triton.next_power_of_2(rows))))
    wide = INTERPRETED or values.dtype == torch.float32
    scale = values if scales is None else scales
    deep = 32 if values.dtype == torch.float32 else 64
    down = triton.cdiv(rows, tall)
    across, stages = _across(down * groups, columns, x.device)
    _products[(down * triton.cdiv(columns, across), groups)](
        *(x, values.view(torch.uint8) if scales is not None else values, scale, out),
        *(rows, columns, depth, x.stride(0), out.stride(0), values.stride(0), values.stride(1)),
        *((0, 0) if scales is None else (scale.stride(0), scale.stride(1))),
        FP8=scales is not None,
        WIDE=wide,
        TALL=tall,
        ACROSS=across,
        DEEP=deep,
        num_warps=4,
        num_stages=stages,
    )


def _across(others: int, columns: int, device: torch.device) -> tuple[int, int]:
    """Columns of a program and its pipeline stages, of `others` programs a tile of columns: narrow ones, which wait
    for the memory less long, while there are too few to keep a GPU busy. No sum is in another order for it."""
    across = 64
    while across > 16 and others * triton.cdiv(columns, across) < 2 * multiprocessors(device):
        across //= 2
    return across, 3 if across == 64 else _STAGES


@triton.jit
def _round(x_ptr, out_ptr, width, GROUPS: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    d = g[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + r * width + d, mask=d < width, other=0.0).to(tl.float32)
    scale, inverse = scale_of(tl.max(tl.abs(x), 1))
    y = on_e4m3(x * inverse[:, None]) * scale[:, None]
    tl.store(out_ptr + r * width + d, y.to(tl.bfloat16), mask=d < width)


@triton.jit
def _products(
    x_ptr,
    w_ptr,
    s_ptr,
    out_ptr,
    rows,
    columns,
    depth,
    x_row,
    out_row,
    w_group,
    w_row,
    s_group,
    s_row,
    FP8: tl.constexpr,
    WIDE: tl.constexpr,
    TALL: tl.constexpr,
    ACROSS: tl.constexpr,
    DEEP: tl.constexpr,
):
    """TALL rows by ACROSS columns of group program_id(1); inputs and outputs lie behind those of groups before it."""
    kind: tl.constexpr = tl.float32 if WIDE else tl.bfloat16
    down = tl.cdiv(rows, TALL)
    group = tl.program_id(1).to(tl.int64)
    r = (tl.program_id(0) % down).to(tl.int64) * TALL + tl.arange(0, TALL)
    first = tl.program_id(0) // down * ACROSS
    c = first + tl.arange(0, ACROSS)
    d = tl.arange(0, DEEP)
    x_ptr += group * depth + r[:, None] * x_row + d[None, :]
    w_ptr += group * w_group + c.to(tl.int64)[None, :] * w_row + d[:, None]
    s_ptr += group * s_group + (first // 128) * s_row
    total = tl.zeros([TALL, ACROSS], tl.float32)
    for at in range(0, depth, DEEP):
        deep = at + d < depth
        x = tl.load(x_ptr + at, mask=(r < rows)[:, None] & deep[None, :], other=0.0).to(kind)
        w = tl.load(w_ptr + at, mask=(c < columns)[None, :] & deep[:, None], other=0)
        if FP8:
            some = tl.dot(x, e4m3_values(w).to(kind), input_precision="tf32x3")
            total += some * tl.load(s_ptr + at // 128)
        else:
            total = tl.dot(x, w.to(kind), total, input_precision="tf32x3")
    place = out_ptr + r[:, None] * out_row + group * columns + c[None, :]
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=(r < rows)[:, None] & (c < columns)[None, :])
