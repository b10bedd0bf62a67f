"""Launches the mixture of experts of few rows: router, up, down. See router.py and few.py."""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

from triptych.kernels.moe import few
from triptych.kernels.moe.ref import Experts, Router
from triptych.kernels.moe.router import route_few
from triptych.kernels.quant.matrices import Fp8Matrix, Matrix, Mxfp4Matrix

_COUNTERS = 1 << 15
"""Counters of each launch: it needs one a tile and 128 hidden columns, or one a row and 64 output columns."""


def moe_rows_on_gpu(
    x: Tensor, token_ids: Tensor, router: Router, moe: Experts, shared: tuple[Matrix, Matrix]
) -> Tensor:
    """See ref.moe_rows; x bfloat16, 1 to some hundred rows. Neither synchronises nor depends on what is routed."""
    w13, w2 = moe.w13, moe.w2
    shared13, shared2 = shared
    assert isinstance(w13, Mxfp4Matrix) and isinstance(w2, Mxfp4Matrix)
    assert isinstance(shared13, Fp8Matrix) and isinstance(shared2, Fp8Matrix)
    rows, dim = x.shape
    inner, k = w2.shape[2], router.experts_per_token
    pairs = rows * k
    n = 8  # an expert's pairs beyond them are another tile: tiles of 16 cost registers, and with them programs
    tiles = min(pairs, pairs // n + min(pairs, w2.shape[0]))
    extra = triton.cdiv(rows, n)
    counters = _counters(x.device)
    x = x.contiguous()
    weights, tile, order, xq, xs = route_few(x, token_ids, router, n, tiles, counters[0])
    hidden = torch.empty(pairs + rows, inner, dtype=torch.float32, device=x.device)
    hq = torch.empty(pairs + rows, inner, dtype=torch.float16, device=x.device)
    hs = torch.empty(pairs + rows, inner // 128, dtype=torch.float32, device=x.device)
    shape = dict(DIM=dim, INNER=inner, TOPK=k, N=n, num_warps=4)
    few.up[(inner // 32, extra + tiles)](
        *(xq, xs, tile, order, weights, _words(w13.values), w13.scales, _words(shared13.values), shared13.scales),
        *(hidden, hq, hs, counters[1], rows, pairs, moe.limit, extra),
        **shape,
    )
    each = torch.empty(pairs + rows, dim, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x)
    few.down[(dim // 64, extra + tiles)](
        *(hq, hs, tile, order, _words(w2.values), w2.scales, _words(shared2.values), shared2.scales),
        *(each, out, counters[2], rows, pairs, extra),
        **shape,
    )
    return out


@cache
def _counters(device: torch.device) -> Tensor:
    """Zeros that every launch leaves zero. Made by the first call, which must not be one that is captured."""
    return torch.zeros(3, _COUNTERS, dtype=torch.int32, device=device)


def _words(values: Tensor) -> Tensor:
    return values.view(torch.int32)
