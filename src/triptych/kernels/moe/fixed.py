"""Routing and experts of deterministic mode: one size of tiles for any number of rows, so a row's bits are its own."""

from __future__ import annotations

from torch import Tensor

from triptych.kernels.linear import fixed
from triptych.kernels.linear.portable import FIXED_ROWS
from triptych.kernels.moe import portable, ref
from triptych.kernels.moe import triton as usual
from triptych.kernels.moe.ref import Experts, Rounding, Router
from triptych.kernels.quant.matrices import Matrix, Mxfp4Matrix


def route(x: Tensor, token_ids: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """See ref.route."""
    return usual.choose(fixed.linear(x.float(), router.gate.float()), token_ids, router)


def experts(x: Tensor, ids: Tensor, weights: Tensor, moe: Experts, rounding: Rounding | None = None) -> Tensor:
    """See ref.experts."""
    if isinstance(moe.w13, Mxfp4Matrix) and rounding is not None:
        return portable.experts(x, ids, weights, moe, FIXED_ROWS)
    return usual.experts(x, ids, weights, moe, rounding, FIXED_ROWS)


def shared_expert(x: Tensor, w13: Matrix, w2: Matrix, limit: float, rounding: Rounding | None = None) -> Tensor:
    """See ref.shared_expert."""
    hidden = usual.swiglu(fixed.linear(x, w13), w2.shape[1], limit, x.dtype)
    return fixed.linear(hidden if rounding is None else rounding(hidden), w2)


def moe_rows(x: Tensor, token_ids: Tensor, router: Router, moe: Experts, shared: tuple[Matrix, Matrix]) -> Tensor:
    """See ref.moe_rows."""
    if not isinstance(moe.w13, Mxfp4Matrix):
        return ref.moe_rows(x, token_ids, router, moe, shared)
    ids, weights = route(x, token_ids, router)
    return portable.experts(x, ids, weights, moe, FIXED_ROWS) + shared_expert(x, *shared, moe.limit)
