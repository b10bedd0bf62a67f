"""Window rows of one layer for one step: past rows from the slots, new rows from the step, in plain PyTorch.

    rows    | past rows of seq 0 | step rows of seq 0 | past rows of seq 1 | ...
             <- from slot rings   <- just computed

This tensor is one layer's transient; only the last rows of each sequence are kept in its slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.config import WINDOW
from triptych.kernels.quant.formats import Rows, rounded_like, write_rows


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """Row indices of one step, the same for every layer; all int64.

    total rows; past_src (flat ring row) -> past_dst; step_dst[r] is row r's place; first, count [R] each query's
    stretch; keep_src (step rows) -> keep_dst (flat ring rows) after attention; snap_src (rows here) -> row snap_row
    [0, 128) of this layer in the snapshot whose frames are the line snap_table[snap_of] of [N, k].
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
    snap_row: Tensor
    snap_of: Tensor
    snap_table: Tensor


def window_rows(kv: Tensor, ring: Rows, plan: WindowPlan) -> Tensor:
    """Past and new rows in one tensor [total, c]. kv [R, c] new rows; ring [N, c] flat over slots.

    New rows are rounded to what the ring keeps, because later steps will read those same bits.
    """
    rows = torch.empty(plan.total, kv.shape[1], dtype=kv.dtype, device=kv.device)
    rows[plan.past_dst] = ring[plan.past_src].to(kv.dtype)
    rows[plan.step_dst] = rounded_like(ring, kv)
    return rows


def keep_window(rows: Tensor, ring: Rows, frames: Rows, layer: int, plan: WindowPlan) -> None:
    """After attention: the step's last rows go to the slots, the rows before a snapshot's boundary to its frames.

    frames [n, rows_per_frame, c]; row r = 128 layer + i of a snapshot is in its frame number r // rows_per_frame.
    """
    write_rows(ring, plan.keep_dst, rows[plan.step_dst[plan.keep_src]])
    if len(plan.snap_src):
        row = layer * WINDOW + plan.snap_row
        frame = plan.snap_table[plan.snap_of, row // frames.shape[1]]
        write_rows(frames, (frame, row % frames.shape[1]), rows[plan.snap_src])
