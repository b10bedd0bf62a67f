"""What a decode step does before its first layer and behind its last, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.kernels.linear.ref import linear


def newest_rows(tokens: Tensor, slots: Tensor, newest: Tensor, tables: Tensor, pages: int) -> tuple[Tensor, Tensor]:
    """What the rows of a step read of their slots: tokens [B] int64 and pages [B, pages] int32.

    tokens [B] int64: a row's token, or -1 for the newest one of its slot. slots [B] int64; newest [slots] int64;
    tables [slots, P] int32, P >= pages.
    """
    tokens = torch.where(tokens < 0, newest.index_select(0, slots), tokens)
    return tokens, tables[:, :pages].index_select(0, slots)


def head_rows(hidden: Tensor, head: Tensor, out: Tensor | None = None) -> Tensor:
    """Logits [S, V] in float32 of hidden states [S, d] by the head's weights [V, d]; into `out`, if it is given."""
    logits = linear(hidden.float(), head)
    return logits if out is None else out.copy_(logits)


def likeliest(logits: Tensor, slots: Tensor, newest: Tensor, chosen: Tensor) -> None:
    """The likeliest token of each row of logits [B, V] float32: into newest [slots] int64 at slots [B], and with its
    logit into chosen [2, B] float64. Of equal ones the first; NaN is above all."""
    peak, best = logits.max(dim=1)
    newest.index_copy_(0, slots, best)
    chosen[0].copy_(best)
    chosen[1].copy_(peak)
