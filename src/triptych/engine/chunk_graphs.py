"""Small prefill chunks by CUDA graphs: what a cached prompt has left costs the host more than the GPU without them.

A graph needs fixed shapes, which a chunk has not: it is padded by repeating its last rows and the last one of every
list of groups and pages. What is repeated is computed and written again, the same bits to the same places. Chunks of
one signature share a graph, recorded when the signature comes for the second time.

    rows          up to a multiple of 32, or of 128 if they are many, beside the few that are run again behind a
                  boundary; the last ones once more each, since copies of one row would all go to a few experts
    pages         as for decode steps; entries that a row may see are bounded by them
    other lists   as many as so many rows can need
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triptych.cache.geometry import CSA_RING, HCA_RING, LOOKBACK, RESTORED, SLOT_ROWS
from triptych.config import CSA_RATIO, HCA_RATIO, PAGE
from triptych.engine.batching import Ints
from triptych.engine.device import signature, sized, staged
from triptych.model.batch import Batch, EntryPlan

logger = logging.getLogger(__name__)

MOST_ROWS = 2048
"""Rows of a step up to which the host is slower than the GPU."""
MOST_GRAPHS = 24
"""Graphs at most; the one that was not used for longest goes."""
_ROWS, _MANY_ROWS = 32, 128
_MANY = 512

Key = tuple[object, ...]


def padded(batch: Batch, pages: int) -> Batch | None:
    """`batch` in the shapes of its bucket, `pages` wide; None where some list that would be repeated is empty.

    Results and caches are those of `batch`.
    """
    rows = _bucket(batch.rows)
    window, again = batch.window, _repeated(batch.seq.numpy(), rows)
    sequences = len(batch.page_table)
    if batch.narrow or not len(batch.csa.first) or not len(window.past_src):
        return None
    kept = min(rows, SLOT_ROWS * sequences)
    past = RESTORED * sequences
    table = torch.zeros(sequences, pages, dtype=torch.int64)
    table[:, : batch.page_table.shape[1]] = batch.page_table
    return replace(
        batch,
        token_ids=_rows(batch.token_ids, again),
        positions=_rows(batch.positions, again),
        seq=_rows(batch.seq, again),
        page_table=table,
        window=replace(
            window,
            total=past + rows,
            past_src=_up_to(window.past_src, past),
            past_dst=_up_to(window.past_dst, past),
            step_dst=_rows(window.step_dst, again),
            first=_rows(window.first, again),
            count=_rows(window.count, again),
            keep_src=_up_to(window.keep_src, kept),
            keep_dst=_up_to(window.keep_dst, kept),
        ),
        csa=_padded(batch.csa, again, sequences, pages, (CSA_RATIO, CSA_RING)),
        hca=_padded(batch.hca, again, sequences, pages, (HCA_RATIO, HCA_RING)),
    )


def _bucket(rows: int) -> int:
    """How many rows are run for so many."""
    some = _ROWS if rows <= _MANY else _MANY_ROWS
    return LOOKBACK + max(0, -(-(rows - LOOKBACK) // some)) * some


def _repeated(seq: Ints, rows: int) -> Ints:
    """All rows in their order, and then the last sequence's last ones again, in turn, until there are `rows`."""
    at, own = np.arange(rows), len(seq)
    span = max(1, min(int((seq == seq[-1]).sum()), rows - own))
    at[own:] = own - span + (at[own:] - own) % span
    return at


def _padded(plan: EntryPlan, again: Ints, sequences: int, pages: int, kind: tuple[int, int]) -> EntryPlan:
    """A plan for rows `again` and, where any group completes, as many groups as they can complete."""
    ratio, ring = kind
    rows = len(again)
    groups = rows // ratio + sequences if len(plan.first) else 0
    ring = min(rows, ring * sequences)
    steps = plan.compress
    compress = steps._replace(
        src=_up_to(steps.src, groups),
        page=_up_to(steps.page, groups),
        offset=_up_to(steps.offset, groups),
        phase=_rows(steps.phase, again),
        keep_src=_up_to(steps.keep_src, ring),
        keep_dst=_up_to(steps.keep_dst, ring),
    )
    visible = _rows(plan.visible, again)
    return replace(
        plan, compress=compress, first=_up_to(plan.first, groups), visible=visible, max_visible=pages * (PAGE // ratio)
    )


def _rows(values: Tensor, again: Ints) -> Tensor:
    """Rows `again` of `values`. On the host numpy takes a fraction of the time of torch's indexing."""
    return torch.from_numpy(values.numpy()[again])


def _up_to(values: Tensor, count: int) -> Tensor:
    """`values` with the last one repeated until there are `count`."""
    given = values.numpy()
    out = np.empty((count, *given.shape[1:]), given.dtype)
    out[: len(given)] = given
    out[len(given) :] = given[-1:]
    return torch.from_numpy(out)


class ChunkGraphs:
    """Runs small batches through graphs of `forward`, which maps a batch on `device` to logits."""

    def __init__(self, forward: Callable[[Batch], Tensor], device: torch.device, pool: Any) -> None:
        self._forward, self._device, self._pool = forward, device, pool
        self._seen: set[Key] = set()
        self._works = True
        self._graphs: dict[Key, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def run(self, batch: Batch) -> Tensor:
        """Logits [S, V] of a padded batch on the host, good until the next call."""
        key = signature(batch)
        host = staged(batch)
        if key not in self._graphs and key in self._seen and self._works:
            self._record(key, batch)
        self._seen.add(key)
        if key not in self._graphs:
            return self._forward(sized(batch, host.to(self._device, non_blocking=True)))
        graph, there, logits = self._graphs[key] = self._graphs.pop(key)  # the newest comes last
        there.copy_(host, non_blocking=True)
        graph.replay()
        return logits

    def _record(self, key: Key, batch: Batch) -> None:
        """Record a graph, whose kernels a run of the same signature has compiled. Without one the host goes on."""
        if len(self._graphs) >= MOST_GRAPHS:
            self._graphs.pop(next(iter(self._graphs)))
        there = staged(batch).to(self._device)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits = self._forward(sized(batch, there))
        except RuntimeError as error:  # no memory left, or an operation that has to wait for the GPU
            first = error  # leaving a broken recording raises once more, and says less
            while isinstance(first.__context__, RuntimeError):
                first = first.__context__
            logger.warning("Small prefill chunks run without CUDA graphs: %s", str(first).split("\n", 1)[0])
            self._works = False
            return
        self._graphs[key] = graph, there, logits
