"""Routing and experts in plain PyTorch.

Source: reference section 2.7 (report section 2.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.linear.ref import linear
from triptych.kernels.quant.matrices import Matrix, Mxfp4Matrix
from triptych.kernels.quant.ref import fake_quant_fp8

Rounding = Callable[[Tensor], Tensor]


class Router(NamedTuple):
    """How a layer picks experts. gate [E, d]; bias [E] float32 for learned layers, tid2eid [V, k] for hash layers."""

    gate: Tensor
    bias: Tensor | None
    tid2eid: Tensor | None
    experts_per_token: int
    scaling: float


class Experts(NamedTuple):
    """Routed experts of a layer: w13 [E, 2I, d] (gate rows, then up rows), w2 [E, d, I]; clamp of SwiGLU."""

    w13: Tensor | Mxfp4Matrix
    w2: Tensor | Mxfp4Matrix
    limit: float


def route(x: Tensor, token_ids: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """Experts ids [R, k] int64 and weights [R, k] of rows x [R, d] with token ids [R].

    The bias decides the choice only; weights are the unbiased scores, normalised over the chosen ones.
    """
    scores = torch.sqrt(F.softplus(F.linear(x.float(), router.gate.float())))
    if router.tid2eid is not None:
        ids = router.tid2eid[token_ids]
    else:
        assert router.bias is not None
        ids = torch.topk(scores + router.bias, router.experts_per_token, dim=-1, sorted=True).indices
    chosen = scores.gather(1, ids)
    return ids, chosen * (router.scaling / (chosen.sum(dim=-1, keepdim=True) + 1e-20))


def swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit) for gate_up [..., 2I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def experts(x: Tensor, ids: Tensor, weights: Tensor, moe: Experts, rounding: Rounding | None = None) -> Tensor:
    """Weighted sum over each row's experts. x [R, d], ids and weights [R, k] -> [R, d].

    The weight multiplies the intermediate, and `rounding` (native numerics) quantises it before W2.
    """
    out = torch.zeros_like(x)
    for e in torch.unique(ids).tolist():
        row, slot = torch.nonzero(ids == e, as_tuple=True)
        gates = weights[row, slot].unsqueeze(1).to(x.dtype)
        hidden = swiglu(F.linear(x[row], _dense(moe.w13, e, x.dtype)), moe.limit) * gates
        hidden = hidden if rounding is None else rounding(hidden)
        out.index_add_(0, row, F.linear(hidden, _dense(moe.w2, e, x.dtype)))
    return out


def _dense(stack: Tensor | Mxfp4Matrix, expert: int, dtype: torch.dtype) -> Tensor:
    return (stack.one(expert).dequantize() if isinstance(stack, Mxfp4Matrix) else stack[expert]).to(dtype)


def shared_expert(x: Tensor, w13: Matrix, w2: Matrix, limit: float, rounding: Rounding | None = None) -> Tensor:
    """The expert that every row uses, with weight 1. x [R, d], w13 [2I, d], w2 [d, I] -> [R, d]."""
    hidden = swiglu(_product(x, w13), limit)
    return _product(hidden if rounding is None else rounding(hidden), w2)


def moe_rows(x: Tensor, token_ids: Tensor, router: Router, moe: Experts, shared: tuple[Matrix, Matrix]) -> Tensor:
    """A whole mixture of experts in native numerics: x [R, d], token_ids [R] -> [R, d] in x's dtype.

    `shared` are w13 [2I, d] and w2 [d, I] of the shared expert. Source: reference sections 2.7 and 2.9.
    """
    ids, weights = route(x.float(), token_ids, router)
    rounded = fake_quant_fp8(x.float())
    routed = experts(rounded, ids, weights, moe, fake_quant_fp8)
    return (routed + shared_expert(rounded, *shared, moe.limit, fake_quant_fp8)).to(x.dtype)


def _product(x: Tensor, weight: Matrix) -> Tensor:
    return linear(x, weight.to(x.dtype) if isinstance(weight, Tensor) else weight)
