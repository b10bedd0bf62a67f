"""Decode rows as the chunks of one row that they are, in fixed shapes: how deterministic mode runs them on a GPU.

The kernels that prompts run through then have them, and so a row's bits are the same in either. `batching.py` works out
such a batch on the host, whose lists are as long as what the step completes. Here each row has one group of every
ratio and all the window rows that it may see, and everything is worked out on the device, so a CUDA graph can hold it:

    groups         one a row; what stands for one that is not complete yet goes to the spare frame, which nobody reads
    window         [ WINDOW - 1 past rows | the row itself ] for each row; those before `lowest` are not looked at
"""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.cache.geometry import CSA_RING, HCA_RING, SLOT_ROWS
from triptych.config import CSA_RATIO, HCA_RATIO, PAGE, WINDOW
from triptych.engine.pools import Pools
from triptych.kernels.compress.ref import ABSENT, CompressPlan
from triptych.kernels.window.ref import WindowPlan
from triptych.model.batch import Batch, DecodeBatch, EntryPlan


def as_chunks(batch: DecodeBatch, pools: Pools) -> Batch:
    """The rows of `batch` as a chunk each, all of them sampled; vectors on its device."""
    every = torch.arange(batch.rows, device=batch.positions.device)
    table = batch.page_table.long()
    return Batch(
        token_ids=batch.token_ids,
        positions=batch.positions,
        seq=every,
        page_table=table,
        window=_window_plan(batch, every, pools.window_stride),
        csa=_entry_plan(batch, table, every, (CSA_RATIO, CSA_RING, pools.csa_stride), batch.max_csa, pools.spare_frame),
        hca=_entry_plan(batch, table, every, (HCA_RATIO, HCA_RING, pools.hca_stride), batch.max_hca, pools.spare_frame),
        sampled=every,
        scored=every[:0],
    )


def _window_plan(batch: DecodeBatch, every: Tensor, stride: int) -> WindowPlan:
    """Each row's window of WINDOW rows, of which it is the last."""
    at, slots = batch.positions, batch.slots
    back = torch.arange(1 - WINDOW, 0, device=at.device)
    own = every * WINDOW + (WINDOW - 1)
    past = slots[:, None] * stride + (at[:, None] + back) % SLOT_ROWS
    count = at - batch.lowest + 1
    nothing = every[:0]
    return WindowPlan(
        total=batch.rows * WINDOW,
        past_src=past.flatten(),
        past_dst=(own[:, None] + back).flatten(),
        step_dst=own,
        first=own - count + 1,
        count=count,
        keep_src=every,
        keep_dst=slots * stride + at % SLOT_ROWS,
        snap_src=nothing,
        snap_row=nothing,
        snap_of=nothing,
        snap_table=nothing[:, None],
    )


def _entry_plan(
    batch: DecodeBatch, table: Tensor, every: Tensor, kind: tuple[int, int, int], most: int, spare: int
) -> EntryPlan:
    """The group that each row is in. kind: tokens of a group, rows of a slot's ring, those from slot to slot."""
    ratio, ring, stride = kind
    at, slots = batch.positions, batch.slots
    reach = ring if ratio == CSA_RATIO else ratio
    group = at // ratio
    pos = ((group + 1) * ratio - reach)[:, None] + torch.arange(reach, device=at.device)
    kept = -1 - (slots[:, None] * stride + pos % ring)
    source = torch.where(pos == at[:, None], every[:, None], torch.where(pos >= 0, kept, ABSENT))
    done = (at + 1) % ratio == 0
    page = table.gather(1, (at // PAGE)[:, None])[:, 0]
    return EntryPlan(
        compress=CompressPlan(
            src=torch.where(done[:, None], source, ABSENT),
            page=torch.where(done, page, spare),
            offset=group % (PAGE // ratio),
            phase=at % ratio,
            keep_src=every,
            keep_dst=slots * stride + at % ring,
        ),
        first=group * ratio,
        visible=(at + 1) // ratio,
        max_visible=most,
    )
