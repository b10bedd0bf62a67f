"""Attention of each query over its window rows and compressed entries with a sink, in plain PyTorch.

Source: reference section 2.3. Keys are values: the same rotated vector is both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from triptych.kernels.index.ref import PagedEntries, gather_entries
from triptych.kernels.quant.formats import Rows


@dataclass(frozen=True, slots=True)
class WindowRows:
    """Window rows of a step in one tensor and each query's stretch of it: rows[first[r] : first[r] + count[r]].

    rows [N, c], or packed; first, count [R] int64, count <= 128.
    """

    rows: Rows
    first: Tensor
    count: Tensor


class Attention(NamedTuple):
    """Per-layer constants: sink [H] float32 and the softmax scale c^-0.5."""

    sink: Tensor
    scale: float


def attend(
    q: Tensor, window: WindowRows, entries: PagedEntries | None, selected: Tensor | None, attention: Attention
) -> Tensor:
    """One joint softmax over window rows, entries and the sink. q [R, H, c] -> [R, H, c].

    `entries` None: window only (SWA). `selected` [R, K] int64 with -1 for none: only these entries (CSA);
    None: all visible ones (HCA).
    """
    out = torch.empty_like(q)
    for rows in torch.arange(q.shape[0], device=q.device).split(128):  # bounds the gathered keys
        keys, valid = _window_keys(window, rows)
        if entries is not None and int(entries.visible[rows].max()) > 0:
            more, more_valid = _entry_keys(entries, selected, rows)
            keys, valid = torch.cat([keys, more], dim=1), torch.cat([valid, more_valid], dim=1)
        # a slot that holds no key points at memory that may never have been written: 0 * NaN is NaN
        keys = keys.masked_fill(~valid.unsqueeze(-1), 0.0)
        scores = torch.einsum("rhc,rkc->rhk", q[rows], keys.to(q.dtype)) * attention.scale
        scores = scores.masked_fill(~valid.unsqueeze(1), float("-inf"))
        sink = attention.sink.to(q.dtype).view(1, -1, 1).expand(len(rows), -1, 1)
        probs = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
        out[rows] = torch.einsum("rhk,rkc->rhc", probs, keys.to(q.dtype))
    return out


def _window_keys(window: WindowRows, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [r, W, c] and their validity [r, W] for the window of the given rows."""
    step = torch.arange(int(window.count[rows].max()), device=rows.device)
    valid = step < window.count[rows].unsqueeze(1)
    index = window.first[rows].unsqueeze(1) + step
    return window.rows[torch.where(valid, index, 0)], valid


def _entry_keys(entries: PagedEntries, selected: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Entries [r, K, c] and their validity [r, K] for the given rows."""
    part = entries._replace(seq=entries.seq[rows], visible=entries.visible[rows])
    if selected is None:
        ids = torch.arange(int(part.visible.max()), device=rows.device).expand(len(rows), -1)
        ids = torch.where(ids < part.visible.unsqueeze(1), ids, -1)
    else:
        ids = selected[rows]
    return gather_entries(part, ids), ids >= 0
