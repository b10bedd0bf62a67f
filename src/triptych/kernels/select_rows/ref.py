"""Selection of decode rows as the composition of the references: rotate and round queries, score, select.

Source: reference sections 2.6 and 2.9. One row of each sequence; the keys that it sees lie in pages already.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from triptych.kernels.index.ref import PagedEntries, select_entries
from triptych.kernels.norm.ref import index_query_rows
from triptych.kernels.quant.ref import fake_quant_fp4, hadamard


class IndexQueries(NamedTuple):
    """heads [B, >= Hi*Di] are raw products, the index heads last; angles (cos, sin) [B, rope/2] float32.

    weights [B, Hi] float32, already scaled. `rounds`: rotated by Hadamard and rounded to e2m1 in groups of 32, as
    native numerics do it with keys too.
    """

    heads: Tensor
    count: int  # type: ignore[assignment]
    dim: int
    angles: tuple[Tensor, Tensor]
    weights: Tensor
    rounds: bool


def index_queries(queries: IndexQueries) -> Tensor:
    """Queries [B, Hi, Di] ready to be multiplied with keys."""
    q = index_query_rows(queries.heads, queries.count, queries.dim, queries.angles)
    if not queries.rounds:
        return q
    narrow = hadamard(q.to(torch.bfloat16).to(q.dtype)).to(torch.bfloat16).to(q.dtype)
    return fake_quant_fp4(narrow, 32)


def select_rows(queries: IndexQueries, keys: PagedEntries, topk: int) -> Tensor:
    """Ids [B, topk] int32 of the entries that each row reads, ascending, -1 behind; all visible ones if they are few.

    `keys.seq` is the row itself. Ties go to the lower id.
    """
    chosen = select_entries(index_queries(queries), queries.weights, keys, topk)
    out = torch.full((len(chosen), topk), -1, dtype=torch.int32, device=chosen.device)
    out[:, : chosen.shape[1]] = chosen.to(torch.int32)
    return out
