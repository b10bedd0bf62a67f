"""Routing and experts compiled for the CPU.

A decode step touches few rows per expert: compiled loops read each weight row once for all of the expert's rows.
Prefill groups rows by expert and multiplies matrices.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from triptych.kernels.jit import inline, kernel
from triptych.kernels.linear.cpu import linear, linear_deterministic
from triptych.kernels.moe import ref
from triptych.kernels.moe.ref import Experts, Rounding, Router
from triptych.kernels.parallel import over
from triptych.kernels.quant.matrices import Fp8Matrix, Matrix, Mxfp4Matrix

_THREAD_PICKS = 8  # picks from which on their weights are worth a second thread
_PRODUCT_PICKS = 512  # rows times experts per row from which on matrix products win


def route(x: Tensor, token_ids: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """See ref.route."""
    return _routed(linear(x, router.gate), token_ids, router)


def route_deterministic(x: Tensor, token_ids: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """See ref.route; rows are independent of each other."""
    return _routed(linear_deterministic(x, router.gate), token_ids, router)


def experts(x: Tensor, ids: Tensor, weights: Tensor, moe: Experts, rounding: Rounding | None = None) -> Tensor:
    """See ref.experts."""
    if rounding is not None or isinstance(moe.w13, Mxfp4Matrix) or moe.w13.dtype != torch.float32:
        return ref.experts(x, ids, weights, moe, rounding)
    if ids.numel() < _PRODUCT_PICKS:
        return experts_deterministic(x, ids, weights, moe)
    return _by_products(x, ids, weights, moe)


def experts_deterministic(
    x: Tensor, ids: Tensor, weights: Tensor, moe: Experts, rounding: Rounding | None = None
) -> Tensor:
    """See ref.experts; rows are independent of each other."""
    order, starts = _grouped(ids, moe)
    out = torch.zeros_like(x)
    hidden = torch.empty(ids.numel(), moe.w2.shape[2])
    shared = (order, starts, ids.shape[1])
    inputs, gates = (x.numpy(), *shared, weights.numpy(), _f32(moe.w13), np.float32(moe.limit)), hidden.numpy()
    alone = ids.numel() < _THREAD_PICKS
    count = moe.w13.shape[0]
    over(count, count if alone else 1, lambda first, last: _expert_in(*inputs, first, last, gates))
    rounded = (hidden if rounding is None else rounding(hidden)).numpy()
    w2, sums, width = _f32(moe.w2), out.numpy(), x.shape[1]
    over(width, width if alone else 1, lambda first, last: _expert_out(rounded, *shared, w2, first, last, sums))
    return out


def shared_expert(x: Tensor, w13: Matrix, w2: Matrix, limit: float, rounding: Rounding | None = None) -> Tensor:
    """See ref.shared_expert."""
    if rounding is not None or isinstance(w13, Fp8Matrix) or w13.dtype != torch.float32:
        return ref.shared_expert(x, w13, w2, limit, rounding)
    return linear(_activated(linear(x, w13), limit), w2)


def shared_expert_deterministic(
    x: Tensor, w13: Matrix, w2: Matrix, limit: float, rounding: Rounding | None = None
) -> Tensor:
    """See ref.shared_expert; rows are independent of each other."""
    hidden = _activated(linear_deterministic(x, w13), limit)
    return linear_deterministic(hidden if rounding is None else rounding(hidden), w2)


def _routed(logits: Tensor, token_ids: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    rows, k = logits.shape[0], router.experts_per_token
    weights = torch.empty(rows, k)
    if router.tid2eid is not None:
        ids = router.tid2eid[token_ids]
        _weigh(logits.numpy(), ids.numpy(), router.scaling, weights.numpy())
        return ids, weights
    assert router.bias is not None
    ids = torch.empty(rows, k, dtype=torch.int64)
    _choose(logits.numpy(), router.bias.numpy(), ids.numpy())
    _weigh(logits.numpy(), ids.numpy(), router.scaling, weights.numpy())
    return ids, weights


def _grouped(ids: Tensor, moe: Experts) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """Picks (row * k + slot) ordered by expert, and where each expert's picks start [E + 1]."""
    flat = ids.reshape(-1).numpy()
    order = np.argsort(flat, kind="stable")
    starts = np.searchsorted(flat[order], np.arange(moe.w13.shape[0] + 1))
    return order, starts


def _by_products(x: Tensor, ids: Tensor, weights: Tensor, moe: Experts) -> Tensor:
    assert isinstance(moe.w13, Tensor) and isinstance(moe.w2, Tensor)
    w13, w2 = moe.w13, moe.w2
    order, starts = _grouped(ids, moe)
    k = ids.shape[1]
    picks = torch.from_numpy(order)
    rows = picks // k
    gathered, scales = x[rows], weights.reshape(-1)[picks].unsqueeze(1)
    parts = torch.empty_like(gathered)
    used = np.flatnonzero(np.diff(starts)).tolist()

    def run(first: int, last: int) -> None:
        for e in used[first:last]:
            part = slice(int(starts[e]), int(starts[e + 1]))
            hidden = _activated(torch.mm(gathered[part], w13[e].T), moe.limit)
            torch.mm(hidden.mul_(scales[part]), w2[e].T, out=parts[part])

    over(len(used), 1, run)
    back = torch.empty_like(parts)
    back[picks] = parts
    return back.view(len(x), k, -1).sum(dim=1)


def _activated(gate_up: Tensor, limit: float) -> Tensor:
    out = torch.empty(gate_up.shape[0], gate_up.shape[1] // 2)
    _swiglu(gate_up.numpy(), np.float32(limit), out.numpy())
    return out


def _f32(weight: Tensor | Mxfp4Matrix) -> np.ndarray:  # type: ignore[type-arg]
    return (weight.dequantize() if isinstance(weight, Mxfp4Matrix) else weight.float()).numpy()


@inline
def _silu_times(gate, up, limit):  # type: ignore[no-untyped-def]
    gate = min(gate, limit)
    up = min(max(up, -limit), limit)
    return gate / (np.float32(1) + np.float32(math.exp(-gate))) * up


@kernel
def _swiglu(gate_up, limit, out):  # type: ignore[no-untyped-def]
    half = out.shape[1]
    for r in range(out.shape[0]):
        for i in range(half):
            out[r, i] = _silu_times(gate_up[r, i], gate_up[r, half + i], limit)


@inline
def _affinity(logit):  # type: ignore[no-untyped-def]
    """sqrt(softplus(logit)), stable for large logits."""
    return np.float32(math.sqrt(max(logit, np.float32(0)) + math.log1p(math.exp(-abs(logit)))))


@kernel
def _choose(logits, bias, ids):  # type: ignore[no-untyped-def]
    experts_count = logits.shape[1]
    scores = np.empty(experts_count, np.float32)
    for r in range(logits.shape[0]):
        for e in range(experts_count):
            scores[e] = _affinity(logits[r, e]) + bias[e]
        for k in range(ids.shape[1]):
            best = 0
            for e in range(1, experts_count):
                if scores[e] > scores[best] or scores[best] != scores[best]:
                    best = e
            ids[r, k] = best
            scores[best] = -np.inf


@kernel
def _weigh(logits, ids, scaling, weights):  # type: ignore[no-untyped-def]
    for r in range(ids.shape[0]):
        total = np.float32(0)
        for k in range(ids.shape[1]):
            weights[r, k] = _affinity(logits[r, ids[r, k]])
            total += weights[r, k]
        for k in range(ids.shape[1]):
            weights[r, k] *= np.float32(scaling / (total + 1e-20))


@kernel
def _expert_in(x, order, starts, k, weights, w13, limit, first, last, hidden):  # type: ignore[no-untyped-def]
    half, dim = hidden.shape[1], x.shape[1]
    for e in range(first, last):
        if starts[e] == starts[e + 1]:
            continue
        for o in range(half):
            for n in range(starts[e], starts[e + 1]):
                row = order[n] // k
                gate, up = np.float32(0), np.float32(0)
                for i in range(dim):
                    gate += x[row, i] * w13[e, o, i]
                    up += x[row, i] * w13[e, half + o, i]
                hidden[n, o] = _silu_times(gate, up, limit) * weights[row, order[n] % k]


@kernel
def _expert_out(hidden, order, starts, k, w2, first, last, out):  # type: ignore[no-untyped-def]
    # a row's experts are added in ascending order of expert, whatever else is in the batch
    for e in range(w2.shape[0]):
        if starts[e] == starts[e + 1]:
            continue
        for o in range(first, last):
            for n in range(starts[e], starts[e + 1]):
                total = np.float32(0)
                for i in range(w2.shape[2]):
                    total += hidden[n, i] * w2[e, o, i]
                out[order[n] // k, o] += total
