"""Window rows of one layer for one step: past rows from the slots, new rows from the step, in plain PyTorch.

    rows    | past rows of seq 0 | step rows of seq 0 | past rows of seq 1 | ...
             <- from slot rings   <- just computed

This tensor is one layer's transient; only the last rows of each sequence are kept in its slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """Row indices of one step, the same for every layer; all int64.

    total rows; past_src (flat ring row) -> past_dst; step_dst[r] is row r's place; first, count [R] each query's
    stretch; keep_src (step rows) -> keep_dst (flat ring rows) after attention; snap_src (rows here) -> snap_dst (flat
    snapshot rows).
    """

    total: int
    past_src: Tensor
    past_dst: Tensor
    step_dst: Tensor
    first: Tensor
    count: Tensor
    keep_src: Tensor
    keep_dst: Tensor
    snap_src: Tensor
    snap_dst: Tensor


def window_rows(kv: Tensor, ring: Tensor, plan: WindowPlan) -> Tensor:
    """Past and new rows in one tensor [total, c]. kv [R, c] new rows; ring [N, c] flat over slots.

    New rows are rounded to the ring's dtype, because later steps will read those same bits.
    """
    rows = torch.empty(plan.total, kv.shape[1], dtype=kv.dtype)
    rows[plan.past_dst] = ring[plan.past_src].to(kv.dtype)
    rows[plan.step_dst] = kv.to(ring.dtype).to(kv.dtype)
    return rows


def keep_window(rows: Tensor, ring: Tensor, snapshots: Tensor, plan: WindowPlan) -> None:
    """After attention: the step's last rows go to the slots, the rows before a snapshot's boundary to the snapshot."""
    ring[plan.keep_dst] = rows[plan.step_dst[plan.keep_src]].to(ring.dtype)
    if len(plan.snap_src):
        snapshots[plan.snap_dst] = rows[plan.snap_src].to(snapshots.dtype)
