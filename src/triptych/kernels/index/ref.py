"""Lightning indexer: which compressed entries each query reads, in plain PyTorch.

Source: reference section 2.6 (report equations 13-17).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from triptych.kernels.quant.formats import Rows


class PagedEntries(NamedTuple):
    """Entries of one layer behind page tables.

    pool [n_pages, per_page, D] (a view, strided over pages) or packed; page_table [B, P] int64; seq [R] int64 maps a
    row to its sequence; visible [R] int64 entries that the row may see, a prefix of its sequence. `most` is the largest
    of them where the host knows it: a GPU would have to be waited for to say.
    """

    pool: Rows
    page_table: Tensor
    seq: Tensor
    visible: Tensor
    most: int | None = None

    @property
    def dense(self) -> Tensor:
        """The pool of a caller that knows that it is not packed."""
        assert isinstance(self.pool, Tensor)
        return self.pool


def gather_entries(entries: PagedEntries, ids: Tensor) -> Tensor:
    """The entries ids [R, K] of each row as [R, K, D]; negative ids give some row that the caller must mask."""
    safe = ids.clamp(min=0)
    per_page = entries.pool.shape[1]
    page = entries.page_table[entries.seq.unsqueeze(1), safe // per_page]
    return entries.pool[page, safe % per_page]


def index_scores(q: Tensor, weights: Tensor, keys: PagedEntries) -> Tensor:
    """I[r, g] = sum_h w[r, h] relu(q[r, h] . k[g]) for all g < max visible, -inf where g is not visible.

    q [R, Hi, Di], weights [R, Hi] (already scaled). Returns [R, T].
    """
    total = int(keys.visible.max())
    ids = torch.arange(total, device=q.device).expand(q.shape[0], total)
    k = gather_entries(keys, torch.where(ids < keys.visible.unsqueeze(1), ids, 0)).to(q.dtype)
    scores = torch.einsum("rhd,rtd->rht", q, k)
    scores = (torch.relu(scores) * weights.unsqueeze(-1)).sum(dim=1)
    return scores.masked_fill(ids >= keys.visible.unsqueeze(1), float("-inf"))


def select_entries(q: Tensor, weights: Tensor, keys: PagedEntries, topk: int) -> Tensor:
    """Ids [R, min(topk, max visible)] int64 of the entries each row reads, ascending, padded with -1.

    All visible ones where there are at most `topk`. Ties go to the lower id.
    """
    scores = index_scores(q, weights, keys)
    k = min(topk, scores.shape[1])
    # a stable descending sort makes the tie rule explicit; topk() does not promise one
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k]
    visible = keys.visible.unsqueeze(1)
    order = torch.where(order < visible, order, visible + order)  # invisible ones sort behind
    order = order.sort(dim=1).values
    return torch.where(order < visible, order, -1)
