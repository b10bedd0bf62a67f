"""Window rows copied by compiled loops: four index operations of some microseconds each become two calls."""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.config import WINDOW
from triptych.kernels.jit import kernel
from triptych.kernels.quant.formats import PackedRows, Rows
from triptych.kernels.window import ref
from triptych.kernels.window.ref import WindowPlan


def window_rows(kv: Tensor, ring: Rows, plan: WindowPlan) -> Tensor:
    """See ref.window_rows."""
    if isinstance(ring, PackedRows) or ring.dtype != torch.float32:
        return ref.window_rows(kv, ring, plan)
    rows = torch.empty(plan.total, kv.shape[1])
    out = rows.numpy()
    _copy(ring.numpy(), plan.past_src.numpy(), plan.past_dst.numpy(), out)
    _scatter(kv.numpy(), plan.step_dst.numpy(), out)
    return rows


def keep_window(rows: Tensor, ring: Rows, frames: Rows, layer: int, plan: WindowPlan) -> None:
    """See ref.keep_window."""
    if isinstance(ring, PackedRows) or isinstance(frames, PackedRows) or ring.dtype != torch.float32:
        ref.keep_window(rows, ring, frames, layer, plan)
        return
    _keep(rows.numpy(), plan.step_dst.numpy(), plan.keep_src.numpy(), plan.keep_dst.numpy(), ring.numpy())
    if len(plan.snap_src):
        row = layer * WINDOW + plan.snap_row
        frame = plan.snap_table[plan.snap_of, row // frames.shape[1]]
        _store(rows.numpy(), plan.snap_src.numpy(), frame.numpy(), (row % frames.shape[1]).numpy(), frames.numpy())


@kernel
def _copy(source, src, dst, out):  # type: ignore[no-untyped-def]
    for n in range(src.shape[0]):
        for i in range(source.shape[1]):
            out[dst[n], i] = source[src[n], i]


@kernel
def _scatter(source, dst, out):  # type: ignore[no-untyped-def]
    for n in range(dst.shape[0]):
        for i in range(source.shape[1]):
            out[dst[n], i] = source[n, i]


@kernel
def _keep(rows, step_dst, src, dst, ring):  # type: ignore[no-untyped-def]
    for n in range(src.shape[0]):
        at = step_dst[src[n]]
        for i in range(rows.shape[1]):
            ring[dst[n], i] = rows[at, i]


@kernel
def _store(rows, src, frame, row, frames):  # type: ignore[no-untyped-def]
    for n in range(src.shape[0]):
        for i in range(rows.shape[1]):
            frames[frame[n], row[n], i] = rows[src[n], i]
