"""The ends of a decode step in three launches: what rows read of their slots, the head's product, the likeliest tokens.

The likeliest token is looked for by all multiprocessors: programs over (row, part). A candidate is one number of 64
bits, its logit in an order of integers above what is left to the end of the row, so that an atomic maximum finds the
highest logit and the first token that has it. The last program of a row writes it down.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.linear.triton import linear

_MOST_ROWS = 4096
_NOTHING = -(1 << 63)
_PAGES = 1024  # of a table that a program copies
_PART = 2048  # logits of a program


def newest_rows(tokens: Tensor, slots: Tensor, newest: Tensor, tables: Tensor, pages: int) -> tuple[Tensor, Tensor]:
    """See ref.newest_rows."""
    rows = len(tokens)
    token_ids, table = torch.empty_like(tokens), tables.new_empty(rows, pages)
    _newest[(rows, triton.cdiv(pages, _PAGES))](
        *(tokens, slots, newest, tables, tables.stride(0), token_ids, table, pages), BLOCK=_PAGES, num_warps=4
    )
    return token_ids, table


def head_rows(hidden: Tensor, head: Tensor, out: Tensor | None = None) -> Tensor:
    """See ref.head_rows; the library's product, without copies around it."""
    if hidden.is_cuda and hidden.dtype == head.dtype == torch.bfloat16:
        return torch.mm(hidden, head.T, out_dtype=torch.float32, out=out)
    logits = linear(hidden.float(), head)
    return logits if out is None else out.copy_(logits)


def likeliest(logits: Tensor, slots: Tensor, newest: Tensor, chosen: Tensor) -> None:
    """See ref.likeliest; rows may share a slot that nobody reads."""
    rows, width = logits.shape
    best, met = _meeting_points(logits.device)
    _likeliest[(rows, triton.cdiv(width, _PART))](
        *(logits, logits.stride(0), slots, newest, chosen, chosen.stride(0), best, met, width),
        BLOCK=_PART,
        num_warps=4,
    )


@cache
def _meeting_points(device: torch.device) -> tuple[Tensor, Tensor]:
    """The best of each row so far, and how many programs have said theirs; as they are here between launches, which
    never overlap."""
    best = torch.full((_MOST_ROWS,), _NOTHING, dtype=torch.int64, device=device)
    return best, torch.zeros(_MOST_ROWS, dtype=torch.int32, device=device)


@triton.jit(do_not_specialize=["stride", "pages"])
def _newest(tokens_ptr, slots_ptr, newest_ptr, tables_ptr, stride, ids_ptr, table_ptr, pages, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    slot = tl.load(slots_ptr + r)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    line = tl.load(tables_ptr + slot * stride + i, mask=i < pages, other=0)
    tl.store(table_ptr + r.to(tl.int64) * pages + i, line, mask=i < pages)
    if tl.program_id(1) == 0:
        token = tl.load(tokens_ptr + r)
        tl.store(ids_ptr + r, tl.where(token < 0, tl.load(newest_ptr + slot), token))


@triton.jit(do_not_specialize=["chosen_row"])
def _likeliest(
    logits_ptr, logits_row, slots_ptr, newest_ptr, chosen_ptr, chosen_row, best_ptr, met_ptr, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + r.to(tl.int64) * logits_row + i, mask=i < width, other=float("-inf"))
    top = tl.max(tl.where(i < width, _ordered(x), -0x80000000), 0)
    first = tl.min(tl.where((i < width) & (_ordered(x) == top), i, 0x7FFFFFFF), 0)
    candidate = (top.to(tl.int64) << 32) | (0x7FFFFFFF - first).to(tl.int64)
    tl.atomic_max(best_ptr + r, candidate, sem="relaxed")
    if tl.atomic_add(met_ptr + r, 1, sem="acq_rel") == tl.num_programs(1) - 1:
        best = tl.atomic_xchg(best_ptr + r, -0x8000000000000000, sem="relaxed")
        tl.store(met_ptr + r, 0)
        token = 0x7FFFFFFF - (best & 0x7FFFFFFF)
        tl.store(newest_ptr + tl.load(slots_ptr + r), token)
        tl.store(chosen_ptr + r, token.to(tl.float64))
        tl.store(chosen_ptr + chosen_row + r, _number((best >> 32).to(tl.int32)).to(tl.float64))


@triton.jit
def _ordered(x):
    """float32 as integers in the same order, both zeros the same, NaN above all."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x == x, bits, 0x7FFFFFFF)


@triton.jit
def _number(ordered):
    """Back from `_ordered`."""
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)
