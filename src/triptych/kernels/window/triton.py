"""Window rows for NVIDIA GPUs: copies by index, one program a row, one launch for each of the two moments."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.config import WINDOW
from triptych.kernels.quant.formats import PackedRows, Rows, packed
from triptych.kernels.quant.triton_rows import store_rows
from triptych.kernels.window.ref import WindowPlan


def window_rows(kv: Tensor, ring: Rows, plan: WindowPlan) -> Rows:
    """See ref.window_rows; the rows come as the ring keeps them: in its dtype, or packed under flat indices."""
    dim, past = kv.shape[1], len(plan.past_src)
    if isinstance(ring, PackedRows):
        return _packed_window(kv, ring, plan)
    rows = torch.empty(plan.total, dim, dtype=ring.dtype, device=kv.device)
    _gather[(past + len(kv),)](
        *(kv, kv.stride(0), ring, ring.stride(0), rows, plan.past_src, plan.past_dst, plan.step_dst, past, dim),
        DIM=triton.next_power_of_2(dim),
    )
    return rows


def keep_window(rows: Rows, ring: Rows, frames: Rows, layer: int, plan: WindowPlan) -> None:
    """See ref.keep_window; rows as `window_rows` made them."""
    keep, snap = len(plan.keep_src), len(plan.snap_src)
    if not keep + snap:
        return
    plans = (plan.step_dst, plan.keep_src, plan.keep_dst, keep, plan.snap_src, plan.snap_row, plan.snap_of)
    table = (plan.snap_table, plan.snap_table.shape[1], layer * WINDOW)
    if isinstance(rows, PackedRows):
        assert isinstance(ring, PackedRows) and isinstance(frames, PackedRows)
        for source, ring_part, part in zip(_parts(rows), _parts(ring), _parts(frames), strict=True):
            dim = source.shape[2]
            _keep[(keep + snap,)](
                *(source, source.stride(1), ring_part, *ring_part.stride()[:2], ring.stretch),
                *(part, *part.stride()[:2], part.shape[1], *plans, *table, dim),
                DIM=triton.next_power_of_2(dim),
            )
        return
    assert isinstance(ring, Tensor) and isinstance(frames, Tensor)
    dim = rows.shape[1]
    _keep[(keep + snap,)](
        *(rows, rows.stride(0), ring, 0, ring.stride(0), 1 << 62),
        *(frames, *frames.stride()[:2], frames.shape[1], *plans, *table, dim),
        DIM=triton.next_power_of_2(dim),
    )


def _packed_window(kv: Tensor, ring: PackedRows, plan: WindowPlan) -> PackedRows:
    """Past rows copied byte for byte, new ones packed."""
    form, past = ring.format, len(plan.past_src)
    memory = torch.empty(1, plan.total * form.row_bytes, dtype=torch.uint8, device=kv.device)
    rows = packed(memory, 0, plan.total, form)
    if past:
        for source, target in zip(_parts(ring), _parts(rows), strict=True):
            dim = source.shape[2]
            _copy[(past,)](
                *(source, *source.stride()[:2], ring.stretch, target, target.stride(1)),
                *(plan.past_src, plan.past_dst, dim),
                DIM=triton.next_power_of_2(dim),
                num_warps=1,
            )
    store_rows(rows, plan.step_dst, kv)
    return rows


def _parts(rows: PackedRows) -> tuple[Tensor, Tensor]:
    return rows.values, rows.scales


@triton.jit
def _copy(
    source_ptr, source_page, source_row, stretch, target_ptr, target_row, src_ptr, dst_ptr, dim, DIM: tl.constexpr
):
    i = tl.program_id(0)
    d = tl.arange(0, DIM)
    n = tl.load(src_ptr + i)
    row = tl.load(source_ptr + (n // stretch) * source_page + (n % stretch) * source_row + d, mask=d < dim)
    tl.store(target_ptr + tl.load(dst_ptr + i) * target_row + d, row, mask=d < dim)


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
    rows_row,
    ring_ptr,
    ring_page,
    ring_row,
    ring_stretch,
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
        n = tl.load(keep_dst_ptr + i)
        target = ring_ptr + (n // ring_stretch) * ring_page + (n % ring_stretch) * ring_row
    else:
        s = i - keep
        source = tl.load(snap_src_ptr + s)
        at = first_row + tl.load(snap_row_ptr + s)
        frame = tl.load(snap_table_ptr + tl.load(snap_of_ptr + s) * table_stride + at // per_frame)
        target = frames_ptr + frame * frame_stride + (at % per_frame) * frame_row
    row = tl.load(rows_ptr + source * rows_row + d, mask=d < dim)
    tl.store(target + d, row, mask=d < dim)
