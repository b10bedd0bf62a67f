"""Attention of decode rows as the composition of the references: norm and rotate queries, attend, rotate back.

Source: reference sections 2.3 and 2.6. One row of each sequence; its window rows lie in its slot's ring already, the
newest one included, and so do the entries that it sees.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from triptych.config import WINDOW
from triptych.kernels.attend.ref import Attention, WindowRows, attend
from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.norm.ref import derotate, query_rows
from triptych.kernels.quant.formats import Rows


class RingRows(NamedTuple):
    """Where each row's window is: positions [max(lowest, position - 127), position] of a ring in a slot.

    ring: rows of all slots under flat indices slot * stride + position % size. positions, slots, lowest [B] int64;
    a row whose `lowest` is above its position has no window.
    """

    ring: Rows
    stride: int
    size: int
    positions: Tensor
    slots: Tensor
    lowest: Tensor


class Queries(NamedTuple):
    """heads [B, >= H*c] are raw products, the main heads first; angles (cos, sin) [B, rope/2] float32 at positions."""

    heads: Tensor
    count: int  # type: ignore[assignment]
    dim: int
    angles: tuple[Tensor, Tensor]
    eps: float


def attend_rows(
    queries: Queries,
    window: RingRows,
    entries: PagedEntries | None,
    ids: Tensor | None,
    attention: Attention,
) -> Tensor:
    """One joint softmax of each row over its window, entries and the sink, rotated back: [B, H, c].

    `entries` None: window only (SWA); its `seq` is the row itself. `ids` [B, K] int32 with -1 for none: only these
    (CSA); None: all visible ones (HCA).
    """
    q = query_rows(queries.heads, queries.count, queries.dim, queries.angles, queries.eps)
    first = torch.maximum(window.lowest, window.positions - (WINDOW - 1)).clamp(min=0)
    count = (window.positions - first + 1).clamp(min=0)
    steps = torch.arange(WINDOW, device=first.device)
    places = window.slots.unsqueeze(1) * window.stride + (first.unsqueeze(1) + steps) % window.size
    inside = steps < count.unsqueeze(1)
    rows = window.ring[places[inside]].to(q.dtype)
    flat = WindowRows(rows, torch.cumsum(count, 0) - count, count)
    chosen = None if ids is None else ids.long()
    return derotate(attend(q, flat, entries, chosen, attention), queries.angles)


def attend_heads(
    queries: Queries,
    window: WindowRows,
    entries: PagedEntries | None,
    ids: Tensor | None,
    attention: Attention,
) -> Tensor:
    """One joint softmax of step rows of any sequences over window rows, entries and the sink, rotated back: [R, H, c].

    As `attend_rows`, but a row's window is a stretch of the step's window rows, and `entries.seq` maps it to its
    sequence. `ids` [R, K] int32 or int64 with -1 for none.
    """
    q = query_rows(queries.heads, queries.count, queries.dim, queries.angles, queries.eps)
    chosen = None if ids is None else ids.long()
    return derotate(attend(q, window, entries, chosen, attention), queries.angles)
