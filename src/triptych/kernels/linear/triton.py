"""Linear maps for NVIDIA GPUs, of weights as released.

    up to 32 rows    one launch that streams the weights (few.py)
    up to 128        the same where a row has many columns, with copies that run ahead of the products (dozens.py), or
                     where it has few and many outputs, for which the rows are kept at hand (wide.py)
    more             the library's, or tiles of many.py where that cannot serve

All multiply rows rounded to e4m3 on the FP8 tensor cores, and sum each 128 columns apart. Rows come rounded from what
made them where that can round, or are rounded here first; a single one may come before its norm (latent.py). Grouped
maps, whose rows are not rounded, are whole.py's up to 8 rows and grouped.py's up to 1,024. Dense weights go to the
library, released ones on other GPUs than Hopper to portable.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from triptych.kernels.gpu import is_hopper, multiprocessors
from triptych.kernels.linear import (
    dozens_rows,
    few_rows,
    grouped_rows,
    latent,
    portable,
    ref,
    rounding,
    whole,
    wide_rows,
)
from triptych.kernels.linear.counters import counters
from triptych.kernels.linear.many import dequantised, product
from triptych.kernels.quant.matrices import BothRows, Fp8Matrix, Fp8Rows, FrontMatrix, Matrix, Unnormed

_FEW_WHOLE = 8  # rows that are not rounded, up to which whole.py serves
_FEW_FRONT = 16  # rows of a front up to which few.py is the faster one
_LIBRARY = 65  # rows from which on the library's product of e4m3 is the faster one
_SPLIT = 512  # rows up to which a matrix of few outputs is cut along its columns too


def linear(x: Tensor | Fp8Rows | Unnormed, weight: Matrix) -> Tensor:
    """See ref.linear. float32 inputs of a bf16 matrix give float32 sums."""
    if isinstance(x, Unnormed):
        if isinstance(weight, Fp8Matrix) and _fits(weight):
            return latent.product(x, weight)
        x = ref.normed(x)
    if isinstance(weight, Tensor):
        assert isinstance(x, Tensor)
        if x.is_cuda and weight.dtype == torch.bfloat16 and x.dtype == torch.float32:
            return torch.mm(x.to(torch.bfloat16), weight.T, out_dtype=torch.float32)
        return ref.linear(x, weight)
    if not _fits(weight):
        return portable.linear(x, weight) if weight.values.is_cuda else ref.linear(x, weight)
    rows = x if isinstance(x, Fp8Rows) else quantize(x)
    dtype = x.dtype if isinstance(x, Tensor) else torch.bfloat16
    own = _own(rows, weight, dtype)
    if own is None and dtype == torch.bfloat16 and _for_library(rows, weight):
        return _by_library(rows, weight)
    out = torch.empty(rows.shape[0], weight.shape[0], dtype=dtype, device=weight.values.device)
    return (own or _many)(rows, weight, out)


def _own(x: Fp8Rows, weight: Fp8Matrix, dtype: torch.dtype) -> Callable[[Fp8Rows, Fp8Matrix, Tensor], Tensor] | None:
    """The kernel that streams weights for so many rows, if there is one and the library has no faster one."""
    rows = x.shape[0]
    if few_rows.serves(rows):
        return few_rows.product
    if dtype == torch.bfloat16 and wide_rows.serves(rows, weight):
        return None if _for_library(x, weight) and wide_rows.suits_library(weight) else wide_rows.product
    return dozens_rows.product if dozens_rows.serves(rows, weight) else None


def front_linear(x: Tensor | BothRows, front: FrontMatrix) -> Tensor:
    """See ref.front_linear."""
    if not _fits(front.latent):
        on_gpu = front.rest.is_cuda
        return portable.front_linear(x, front) if on_gpu else ref.front_linear(x, front)
    plain = (x.plain if isinstance(x, BothRows) else x).to(torch.bfloat16)
    rounded = x.rounded if isinstance(x, BothRows) else quantize(x)
    cut, columns = front.latent.shape[0], front.shape[0]
    out = torch.empty(len(plain), columns, dtype=torch.float32, device=plain.device)
    if len(out) > _FEW_FRONT and dozens_rows.serves(len(out), front.latent):
        return dozens_rows.front(BothRows(plain, rounded), front, out)
    if few_rows.serves(len(out)):
        return few_rows.front(BothRows(plain, rounded), front, out)
    _many(rounded, front.latent, out[:, :cut], narrow=True)
    if cut < columns:
        torch.mm(plain, front.rest.T, out_dtype=torch.float32, out=out[:, cut:])
    return out


def grouped_linear(x: Tensor, weight: Matrix, *, rounds: bool = False) -> Tensor | Fp8Rows:
    """See ref.grouped_linear; of very many rows the result is not rounded here."""
    if isinstance(weight, Tensor) or not _fits(weight):
        own = isinstance(weight, Fp8Matrix) and x.is_cuda
        return portable.grouped_linear(x, weight) if own else ref.grouped_linear(x, weight)
    groups, rank, _ = weight.shape
    rows, kind = len(x), x.dtype
    x = x.to(torch.bfloat16).flatten(1)
    if rows <= _FEW_WHOLE or grouped_rows.serves(rows, weight):
        run = _whole if rows <= _FEW_WHOLE else grouped_rows.product
        if rounds and rank % 128 == 0:
            result = rounding.room(rows, groups * rank, x.device, by_row=few_rows.serves(rows))
            run(x, weight, result.values, result.scales)
            return result
        out = torch.empty(rows, groups * rank, dtype=kind, device=x.device)
        run(x, weight, out)
        return out
    y = torch.empty(rows, groups * rank, dtype=x.dtype, device=x.device)
    rows_of = x.view(rows, groups, -1).transpose(0, 1)
    torch.bmm(rows_of, _dense(weight).transpose(1, 2), out=y.view(rows, groups, rank).transpose(0, 1))
    return y.to(kind)


def _dense(weight: Fp8Matrix) -> Tensor:
    """Matrices [G, N, K] in bf16."""
    rank, depth = weight.shape[1:]
    dense = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.values.device)
    tall = min(rank, 128)
    some = 8 if tall % 8 == 0 else 1
    dequantised[(dense.numel() // depth // some, triton.cdiv(depth, 1024))](
        *(weight.values, weight.scales, dense, depth, rank, tall, weight.scales.shape[1]),
        ROWS=some,
        GROUPS=8,
        num_warps=4,
    )
    return dense


def _for_library(x: Fp8Rows, weight: Fp8Matrix) -> bool:
    """Whether cuBLAS multiplies rows and blocks with such scales, which it does on Hopper, and faster than many.py."""
    rows, depth = x.shape
    aligned = rows % 4 == 0 and depth % 512 == 0 and weight.shape[0] % 128 == 0
    return rows >= _LIBRARY and aligned and x.scales.stride() == (1, rows) and _library_can(weight.values.device)


@cache
def _library_can(device: torch.device) -> bool:
    """Whether the installed torch and cuBLAS have the product on this GPU: they are asked for a small one."""
    if not is_hopper(device):
        return False
    try:
        x = quantize(torch.ones(512, 512, dtype=torch.bfloat16, device=device))
        weight = Fp8Matrix(x.values[:128], torch.full((1, 4), 2.0**-8, device=device))  # ones, as x is
        return bool((_by_library(x, weight) == 512).all())
    except (RuntimeError, ValueError, NotImplementedError):
        return False


def _by_library(x: Fp8Rows, weight: Fp8Matrix) -> Tensor:
    """The product in bf16 by cuBLAS, which also sums each 128 columns apart and scales them in float32."""
    values, scales = weight.values.T, weight.scales.T
    return torch._scaled_mm(x.values, values, scale_a=x.scales, scale_b=scales, out_dtype=torch.bfloat16)


def _fits(weight: Fp8Matrix) -> bool:
    """Whether Hopper's kernels can multiply it: there, in whole blocks of columns and tiles of outputs."""
    return is_hopper(weight.values.device) and weight.shape[-1] % 128 == 0 and weight.shape[-2] % 64 == 0


def quantize(x: Tensor) -> Fp8Rows:
    """See matrices.quantize_rows, to the bit. Of many rows scales lie column by column, as their products read them."""
    return rounding.rounded(x, by_row=few_rows.serves(len(x)))


def _whole(x: Tensor, weight: Fp8Matrix, out: Tensor, scales: Tensor | None = None) -> None:
    """x [rows, G * K], not rounded, by matrices [G, N, K]: one launch of whole.py. With `scales` out is rounded."""
    x = x.to(torch.bfloat16).contiguous()
    rows, columns = out.shape
    rank, depth = weight.shape[1:]
    tiles, blocks = columns // 64, depth // 128
    split = few_rows.parts(tiles, blocks, x.device)
    stage = math.gcd(blocks // split, few_rows.TILING.blocks)
    rounds = scales is not None
    part = torch.empty(split if split > 1 or rounds else 0, rows, columns, dtype=torch.float32, device=x.device)
    whole.products[(tiles * split,)](
        *(few_rows.blocks_of(weight.values.view(columns, depth), 64), weight.scales, _halves(x, _FEW_WHOLE)),
        *(out, out if scales is None else scales, part, counters(x.device), rows),
        K=depth,
        OUT=columns,
        ROUND=rounds,
        GROUP=rank,
        SPLIT=split,
        TALL=min(128, rank),
        N=_FEW_WHOLE,
        KS=stage,
        STAGES=min(few_rows.TILING.stages, blocks // split // stage),
        num_warps=4,
    )


def _halves(x: Tensor, rows: int) -> TensorDescriptor:
    """To copy blocks of 128 columns of up to `rows` rows of x in halves of 128 bytes."""
    count, width = x.shape
    layout = gl.NVMMASharedLayout(128, 16, rank=3)
    return TensorDescriptor(x, [width // 64, count, 64], [64, width, 1], [2, rows, 64], layout)


def _many(x: Fp8Rows, weight: Fp8Matrix, out: Tensor, *, narrow: bool = False) -> Tensor:
    """Into out, a matrix of any row stride; `narrow`: values rounded to bf16, whatever it keeps."""
    rows, columns = out.shape
    depth = weight.shape[1]
    tall, wide, warps, stages = _tiles(rows, columns)
    blocks = triton.cdiv(rows, tall) * triton.cdiv(columns, wide)
    split = 1
    if rows <= _SPLIT:
        while blocks * split < multiprocessors(out.device) and depth // 128 % (2 * split) == 0 and depth // split > 512:
            split *= 2
    part = torch.empty(split if split > 1 else 0, rows, columns, dtype=torch.float32, device=out.device)
    product[(blocks, split)](
        *(x.values, x.scales, weight.values, weight.scales, out, part, counters(out.device)),
        *(rows, columns, depth, *x.scales.stride(), out.stride(0)),
        SPLIT=split,
        TALL=tall,
        WIDE=wide,
        SHARE=16,
        NARROW=narrow,
        num_warps=warps,
        num_stages=stages,
    )
    return out


def _tiles(rows: int, columns: int) -> tuple[int, int, int, int]:
    """Rows and columns of a tile, warps and stages; measured on an H200."""
    if rows <= 64:
        return 64, 64, 4, 4
    return 64, 128, 4, 3  # two programs on a multiprocessor: one multiplies while the other scales
