"""Window rows for NVIDIA GPUs: copies by index, one program a row, one launch for each of the two moments."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.config import WINDOW
from triptych.kernels.window.ref import WindowPlan


def window_rows(kv: Tensor, ring: Tensor, plan: WindowPlan) -> Tensor:
    """See ref.window_rows; the rows come in the ring's dtype, whose values they have."""
    dim, past = kv.shape[1], len(plan.past_src)
    rows = torch.empty(plan.total, dim, dtype=ring.dtype, device=kv.device)
    _gather[(past + len(kv),)](
        *(kv, kv.stride(0), ring, ring.stride(0), rows, plan.past_src, plan.past_dst, plan.step_dst, past, dim),
        DIM=triton.next_power_of_2(dim),
    )
    return rows


def keep_window(rows: Tensor, ring: Tensor, frames: Tensor, layer: int, plan: WindowPlan) -> None:
    """See ref.keep_window."""
    dim, keep, snap = rows.shape[1], len(plan.keep_src), len(plan.snap_src)
    if not keep + snap:
        return
    _keep[(keep + snap,)](
        *(rows, ring, ring.stride(0), frames, frames.stride(0), frames.stride(1), frames.shape[1]),
        *(plan.step_dst, plan.keep_src, plan.keep_dst, keep),
        *(plan.snap_src, plan.snap_row, plan.snap_of, plan.snap_table, plan.snap_table.shape[1], layer * WINDOW, dim),
        DIM=triton.next_power_of_2(dim),
    )


@triton.jit
def _gather(
    kv_ptr,
    kv_stride,
    ring_ptr,
    ring_stride,
    rows_ptr,
    past_src_ptr,
    past_dst_ptr,
    step_dst_ptr,
    past,
    dim,
    DIM: tl.constexpr,
):
    i = tl.program_id(0)
    d = tl.arange(0, DIM)
    if i < past:
        row = tl.load(ring_ptr + tl.load(past_src_ptr + i) * ring_stride + d, mask=d < dim)
        tl.store(rows_ptr + tl.load(past_dst_ptr + i) * dim + d, row, mask=d < dim)
    else:
        r = (i - past).to(tl.int64)
        new = tl.load(kv_ptr + r * kv_stride + d, mask=d < dim)
        tl.store(rows_ptr + tl.load(step_dst_ptr + r) * dim + d, new.to(ring_ptr.dtype.element_ty), mask=d < dim)


@triton.jit
def _keep(
    rows_ptr,
    ring_ptr,
    ring_stride,
    frames_ptr,
    frame_stride,
    frame_row,
    per_frame,
    step_dst_ptr,
    keep_src_ptr,
    keep_dst_ptr,
    keep,
    snap_src_ptr,
    snap_row_ptr,
    snap_of_ptr,
    snap_table_ptr,
    table_stride,
    first_row,
    dim,
    DIM: tl.constexpr,
):
    i = tl.program_id(0)
    d = tl.arange(0, DIM)
    if i < keep:
        source = tl.load(step_dst_ptr + tl.load(keep_src_ptr + i))
        target = ring_ptr + tl.load(keep_dst_ptr + i) * ring_stride
    else:
        s = i - keep
        source = tl.load(snap_src_ptr + s)
        at = first_row + tl.load(snap_row_ptr + s)
        frame = tl.load(snap_table_ptr + tl.load(snap_of_ptr + s) * table_stride + at // per_frame)
        target = frames_ptr + frame * frame_stride + (at % per_frame) * frame_row
    row = tl.load(rows_ptr + source * dim + d, mask=d < dim)
    tl.store(target + d, row, mask=d < dim)
