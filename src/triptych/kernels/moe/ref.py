"""Routing and experts in plain PyTorch.

Source: reference section 2.7 (report section 2.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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

    w13: Tensor
    w2: Tensor
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
        hidden = swiglu(F.linear(x[row], moe.w13[e].to(x.dtype)), moe.limit) * weights[row, slot].unsqueeze(1).to(
            x.dtype
        )
        hidden = hidden if rounding is None else rounding(hidden)
        out.index_add_(0, row, F.linear(hidden, moe.w2[e].to(x.dtype)))
    return out


def shared_expert(x: Tensor, w13: Tensor, w2: Tensor, limit: float, rounding: Rounding | None = None) -> Tensor:
    """The expert that every row uses, with weight 1. x [R, d], w13 [2I, d], w2 [d, I] -> [R, d]."""
    hidden = swiglu(F.linear(x, w13.to(x.dtype)), limit)
    return F.linear(hidden if rounding is None else rounding(hidden), w2.to(x.dtype))
