"""The three attentions of the training net: window, compressed entries, top-k selection (reference 2.3 to 2.6).

A sequence is cut at multiples of 128: a call sees rows [start, start + S) and the `Past` of everything before, which
makes training (no past), evaluation in chunks (a long past) and training behind a frozen past one and the same code.

    entry g of ratio m covers tokens [m g, m g + m) and is visible from token m g + m - 1 on
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from triptych.config import CSA_RATIO, WINDOW

NEVER = -1e30  # stands for minus infinity where every score of a row may be masked
SCORE_BYTES = 2**31  # indexer scores of one block of queries


@dataclass
class Past:
    """What one layer keeps of the tokens before a chunk; B is the batch.

    rows [B, 128, c] (window rows), and for compressed layers entries [B, E, c], keys [B, E, ci] (CSA),
    tails [B, 4, ...] (the last group's compressor rows, CSA) for main entries and for keys.
    """

    rows: Tensor
    entries: Tensor | None = None
    keys: Tensor | None = None
    tails: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Pooled(NamedTuple):
    """Compressor rows of a chunk before pooling: values and gates, float32 [B, S, D or 2 D]."""

    values: Tensor
    gates: Tensor


def pool_hca(rows: Pooled, ratio: int) -> Tensor:
    """Entries [B, S/ratio, D]: per channel a softmax over the ratio rows of each group."""
    values, gates = (x.unflatten(1, (-1, ratio)) for x in rows)
    entries: Tensor = (torch.softmax(gates, dim=2) * values).sum(2)
    return entries


def pool_csa(rows: Pooled, tail: tuple[Tensor, Tensor] | None) -> Tensor:
    """Entries [B, S/4, D] from [B, S, 2 D]: each pools its group's second halves and the group before's first halves.

    `tail` holds that group before the chunk; without it the first entry has four rows only.
    """
    dim = rows.values.shape[-1] // 2
    parts = []
    for x, before, absent in zip(rows, tail or (None, None), (0.0, NEVER), strict=True):
        groups = x.unflatten(1, (-1, CSA_RATIO))
        first = groups.new_full((x.shape[0], 1, CSA_RATIO, dim), absent) if before is None else before[:, None, :, :dim]
        earlier = torch.cat([first, groups[:, :-1, :, :dim]], dim=1)
        parts.append(torch.cat([earlier, groups[..., dim:]], dim=2))
    entries: Tensor = (torch.softmax(parts[1], dim=2) * parts[0]).sum(2)
    return entries


def window_scores(q: Tensor, rows: Tensor, start: int) -> Tensor:
    """Scores [B, S, H, 256] of each query against the rows of its own block of 128 and the block before.

    q [B, S, H, c]; rows [B, 128 + S, c] begin 128 tokens before the chunk. Out of window is NEVER.
    """
    batch, length, heads, dim = q.shape
    blocks = length // WINDOW
    keys = rows.unflatten(1, (blocks + 1, WINDOW))
    keys = torch.cat([keys[:, :-1], keys[:, 1:]], dim=2)
    scores: Tensor = torch.matmul(q.reshape(batch, blocks, WINDOW * heads, dim), keys.transpose(2, 3)) * dim**-0.5
    scores = scores.view(batch, blocks, WINDOW, heads, 2 * WINDOW)
    own = torch.arange(WINDOW, device=q.device)[:, None]
    key = torch.arange(2 * WINDOW, device=q.device)[None]
    seen = ((key > own) & (key <= own + WINDOW)).expand(blocks, -1, -1).clone()
    if start == 0:
        seen[0] &= key >= WINDOW
    return scores.masked_fill(~seen[:, :, None], NEVER).flatten(1, 2)


def window_values(probs: Tensor, rows: Tensor) -> Tensor:
    """Weighted rows [B, S, H, c] for probabilities [B, S, H, 256] laid out as in `window_scores`."""
    batch, length, heads, _ = probs.shape
    blocks = length // WINDOW
    keys = rows.unflatten(1, (blocks + 1, WINDOW))
    keys = torch.cat([keys[:, :-1], keys[:, 1:]], dim=2)
    out = torch.matmul(probs.reshape(batch, blocks, WINDOW * heads, 2 * WINDOW), keys)
    return out.view(batch, length, heads, -1)


def visible(start: int, length: int, count: int, ratio: int, device: torch.device) -> Tensor:
    """Which of `count` entries the queries [start, start + length) see: bool [length, count]."""
    complete = (torch.arange(start + 1, start + length + 1, device=device) // ratio)[:, None]
    return torch.arange(count, device=device)[None] < complete


class Gather(torch.autograd.Function):
    """Rows of a table by index, with a backward that adds in float32 without sorting the indices."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        """table [N, c], index [...] -> [..., c]."""
        ctx.save_for_backward(index)
        ctx.shape = table.shape
        return F.embedding(index, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Sum of the gradients of each row's uses."""
        (index,) = ctx.saved_tensors
        out = torch.zeros(ctx.shape, dtype=torch.float32, device=grad.device)
        out.index_add_(0, index.reshape(-1), grad.reshape(-1, grad.shape[-1]).float())
        return out.to(grad.dtype), None


def take(table: Tensor, index: Tensor) -> Tensor:
    """table [B, E, c] at index [B, S, K] -> [B, S, K, c]."""
    batch, count, dim = table.shape
    offset = torch.arange(batch, device=table.device).view(-1, 1, 1) * count
    out: Tensor = Gather.apply(table.reshape(-1, dim), index + offset)  # type: ignore[no-untyped-call]
    return out


class Selection(NamedTuple):
    """Chosen entries of each query, [B, S, K], and whether each is truly visible (short rows are padded)."""

    entries: Tensor
    valid: Tensor


@torch.no_grad()
def select(
    q: Tensor, weights: Tensor, keys: Tensor, start: int, topk: int, score: Callable[[Tensor, Tensor], Tensor]
) -> Selection:
    """The `topk` best entries by indexer score.

    q [B, S, h, ci], weights [B, S, h], keys [B, E, ci]; works through the queries in blocks of bounded memory. `score`
    is ops.block_scores or its compiled form.
    """
    batch, length, heads, _ = q.shape
    count = keys.shape[1]
    block = max(1, min(length, SCORE_BYTES // (2 * batch * heads * count)))
    index = torch.empty(batch, length, topk, dtype=torch.long, device=q.device)
    for low in range(0, length, block):
        high = min(low + block, length)
        dots = torch.matmul(q[:, low:high].flatten(1, 2), keys.transpose(1, 2)).view(batch, high - low, heads, count)
        scores = score(dots, weights[:, low:high])
        scores.masked_fill_(~visible(start + low, high - low, count, CSA_RATIO, q.device), NEVER)
        index[:, low:high] = scores.topk(topk, dim=-1, sorted=False).indices
    complete = (torch.arange(start + 1, start + length + 1, device=q.device) // CSA_RATIO).view(1, -1, 1)
    return Selection(index, index < complete)


def joint_softmax(parts: list[Tensor], sink: Tensor) -> list[Tensor]:
    """Softmax over the concatenated last dims of `parts` [B, S, H, *] and one sink per head that has no value.

    The sink comes with seven masked columns, so that rows stay aligned for the matrix units.
    """
    extra = sink.new_full((*sink.shape, 8), NEVER)
    extra[:, 0] = sink
    scores = torch.cat([*parts, extra.to(parts[0].dtype).expand(*parts[0].shape[:2], -1, -1)], dim=-1)
    probs = torch.softmax(scores, dim=-1)
    return list(probs[..., :-8].split([p.shape[-1] for p in parts], dim=-1))


def index_loss(target: Tensor, scores: Tensor, valid: Tensor, row_weight: Tensor) -> Tensor:
    """Weighted mean over rows of KL(target || softmax(scores)): what teaches the indexer where attention goes.

    target [B, S, K] >= 0 (normalised here), scores [B, S, K], valid [B, S, K], row_weight [B, S].
    """
    mass = (target * valid).sum(-1, keepdim=True)
    p = target * valid / (mass + 1e-9)
    logq = torch.log_softmax(scores.float().masked_fill(~valid, NEVER), dim=-1)
    kl = torch.where(p > 0, p * (p.clamp_min(1e-9).log() - logq), 0.0).sum(-1)
    weight = row_weight * valid.any(-1) * (mass.squeeze(-1) > 1e-4)
    return (kl * weight).sum() / (weight.sum() + 1e-9)
