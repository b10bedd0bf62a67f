"""Attention by FlashMLA (the package sgl-flash-mla) where that was measured faster, else by Triton.

FlashMLA takes pages of n rows as `quant/formats.py` packs them, n values and then n scales:

    values of row k    page + 576 k                    scales of row k    page + 576 n + 8 k

A view of ours with this n, and with rows from some k0 on, is found for any pool whose values and scales follow each
other (`grid_of`): for the rows of one page, for one layer's entry between those of others, for a ring in a slot. So it
reads the caches where they are. What else it needs, `vendor_rows.py` makes in a launch before and one after.

Step rows of prefill go to another kernel of FlashMLA's, which reads bfloat16: see `vendor_chunks.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from triptych.config import WINDOW
from triptych.kernels.attend.ref import Attention, WindowRows
from triptych.kernels.attend_rows import triton as own
from triptych.kernels.attend_rows import vendor_chunks
from triptych.kernels.attend_rows.ref import Queries, RingRows
from triptych.kernels.attend_rows.vendor_rows import BLOCK, PLANNED, prepare, turn_back
from triptych.kernels.gpu import is_hopper, multiprocessors
from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.quant.formats import PackedRows, Rows

_VALUES, _SCALES = 576, 8  # bytes of an entry of 512 dims, 64 of them rotated
_NEVER = 1 << 62
_FEWEST_ROWS = {
    64: ((1 << 62, _NEVER),),
    128: ((1024, _NEVER), (2048, 64), (1 << 62, 32)),
}
"""By heads: entries that a row reads at most, and from how many rows on FlashMLA is faster."""
_MOST_ROWS = 256  # of the plan, which one warp group makes
_FEWEST_STEP_ROWS, _LEAST_STEP_REACH = 256, 256
_TILE_HEADS, _TILE_KEYS, _TURNED = 4, 256, 16
_NO_ENTRIES, _CHOSEN, _VISIBLE = 0, 1, 2


class Grid(NamedTuple):
    """A pool as FlashMLA reads it: view uint8 [pages, rows, 1, 584]; row k of a page of ours is row first + k."""

    view: Tensor
    rows: int
    first: int


def attend_rows(
    queries: Queries,
    window: RingRows,
    entries: PagedEntries | None,
    ids: Tensor | None,
    attention: Attention,
) -> Tensor:
    """See ref.attend_rows and triton.attend_rows; by FlashMLA where it can serve and is faster."""
    if serves(queries, window) and faster(queries.count, len(queries.heads), _reach(entries, ids)):
        return by_flash_mla(queries, window, entries, ids, attention)
    return own.attend_rows(queries, window, entries, ids, attention)


def attend_rows_forced(
    queries: Queries,
    window: RingRows,
    entries: PagedEntries | None,
    ids: Tensor | None,
    attention: Attention,
) -> Tensor:
    """See ref.attend_rows; by FlashMLA wherever it can serve."""
    if serves(queries, window):
        return by_flash_mla(queries, window, entries, ids, attention)
    return own.attend_rows(queries, window, entries, ids, attention)


def attend_heads(
    queries: Queries,
    window: WindowRows,
    entries: PagedEntries | None,
    ids: Tensor | None,
    attention: Attention,
) -> Tensor:
    """See ref.attend_heads and triton.attend_heads; by FlashMLA where it can serve and is faster."""
    pays = len(queries.heads) >= _FEWEST_STEP_ROWS and _reach(entries, ids) >= _LEAST_STEP_REACH
    if pays and serves_step(queries, window, entries):
        return vendor_chunks.by_flash_mla(prefill(), queries, window, entries, ids, attention)
    return own.attend_heads(queries, window, entries, ids, attention)


def attend_heads_forced(
    queries: Queries,
    window: WindowRows,
    entries: PagedEntries | None,
    ids: Tensor | None,
    attention: Attention,
) -> Tensor:
    """See ref.attend_heads; by FlashMLA wherever it can serve."""
    if serves_step(queries, window, entries):
        return vendor_chunks.by_flash_mla(prefill(), queries, window, entries, ids, attention)
    return own.attend_heads(queries, window, entries, ids, attention)


def serves(queries: Queries, window: RingRows) -> bool:
    """Whether FlashMLA has a kernel for these caches, this model and this GPU."""
    return len(queries.heads) <= _MOST_ROWS and _known(queries, window.ring)


def serves_step(queries: Queries, window: WindowRows, entries: PagedEntries | None) -> bool:
    """As `serves` for step rows, whose entries must fit into the workspace, too."""
    rows = len(queries.heads)
    return rows > 0 and _known(queries, window.rows) and vendor_chunks.fits(rows, entries)


def _known(queries: Queries, rows: Rows) -> bool:
    fits = isinstance(rows, PackedRows) and queries.dim == 512 and rows.format.rope == 64
    fits = fits and queries.count in _FEWEST_ROWS and queries.heads.dtype == torch.bfloat16
    return fits and is_hopper(queries.heads.device)


def faster(heads: int, rows: int, reach: int) -> bool:
    """Whether FlashMLA with its launches around it beats our own kernels where a row reads at most `reach` entries.

    As measured on an H200 (docs/kernels.md), by 7 us or more: what it gained alone was up to
    6 us more a call than what was left of it between the other kernels of a decode step.
    """
    return rows >= next(least for most, least in _FEWEST_ROWS[heads] if reach <= most)


def _reach(entries: PagedEntries | None, ids: Tensor | None) -> int:
    if entries is None:
        return 0
    assert entries.most is not None
    return entries.most if ids is None else ids.shape[1]


def by_flash_mla(
    queries: Queries,
    window: RingRows,
    entries: PagedEntries | None,
    ids: Tensor | None,
    attention: Attention,
) -> Tensor:
    """See ref.attend_rows, with results of bfloat16. `entries.most` and `ids` as in triton.attend_rows.

    No wait for the GPU and no memory but the allocator's, so that a CUDA graph can hold it.
    """
    rows, heads, dim = len(queries.heads), queries.count, queries.dim
    assert isinstance(window.ring, PackedRows) and window.stride == window.ring.stretch
    if _reach(entries, ids) == 0:
        entries = None
    q, near, far = _prepared(queries, window, entries, ids)
    done = load()(q, near[0], near[1], None, attention.sink, *near[2:], *far, dim, attention.scale, None)
    out: Tensor = done[0].view(rows, heads, dim)
    cos, sin = queries.angles
    turn_back[(rows, triton.cdiv(heads, _TURNED))](
        *(out, cos, sin, heads),
        DIM=dim,
        ROPE=2 * cos.shape[1],
        HEADS=_TURNED,
        num_warps=1,
    )
    return out


def _prepared(
    queries: Queries, window: RingRows, entries: PagedEntries | None, ids: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Queries; the rings, places in them, plan and splits; the entries, places in them and how many count."""
    rows, heads, dim = len(queries.heads), queries.count, queries.dim
    device = queries.heads.device
    assert isinstance(window.ring, PackedRows)
    ring, pool = grid_of(window.ring), None
    if entries is not None:
        assert isinstance(entries.pool, PackedRows)
        pool = grid_of(entries.pool)
    parts = max(1, multiprocessors(device) // max(1, heads // 64))
    width = max(1, triton.cdiv(_reach(entries, ids), BLOCK)) * BLOCK
    q = torch.empty(rows, 1, heads, dim, dtype=torch.bfloat16, device=device)
    near, far = q.new_empty(rows, 1, WINDOW, dtype=torch.int32), q.new_empty(rows, 1, width, dtype=torch.int32)
    lengths, splits = q.new_empty(rows, dtype=torch.int32), q.new_empty(rows + 1, dtype=torch.int32)
    plan = q.new_empty(parts, 8, dtype=torch.int32)
    cos, sin = queries.angles
    plans, tiles = triton.cdiv(parts, PLANNED), triton.cdiv(heads, _TILE_HEADS)
    prepare[(plans + rows * tiles,)](
        *(queries.heads, queries.heads.stride(0), cos, sin, queries.eps),
        *(window.slots, window.positions, window.lowest, ring.rows, ring.first),
        *_entry_arguments(window, entries, ids),
        *((0, 0) if pool is None else pool[1:]),
        *(q, near, far, width, lengths, plan, splits, rows, parts, heads, plans),
        MODE=_NO_ENTRIES if entries is None else _VISIBLE if ids is None else _CHOSEN,
        RING=window.size,
        PER_PAGE=1 if entries is None else entries.pool.shape[1],
        REACH=WINDOW,
        DIM=dim,
        ROPE=2 * cos.shape[1],
        HEADS=_TILE_HEADS,
        KEYS=_TILE_KEYS if ids is None else triton.next_power_of_2(triton.cdiv(ids.shape[1], tiles)),
        BATCH=max(2, triton.next_power_of_2(rows)),
        num_warps=4,
    )
    return q, (ring.view, near, plan, splits), (None, None, None) if pool is None else (pool.view, far, lengths)


def _entry_arguments(window: RingRows, entries: PagedEntries | None, ids: Tensor | None) -> tuple[Any, ...]:
    """Page table and its stride, visible, ids, their stride and number."""
    some = window.positions
    if entries is None:
        return (some, 0, some, some, 0, 0)
    chosen = (some, 0, 0) if ids is None else (ids, ids.stride(0), ids.shape[1])
    return (entries.page_table, entries.page_table.stride(0), entries.visible, *chosen)


def grid_of(pool: PackedRows) -> Grid:
    """`pool` as FlashMLA reads it. ValueError if it cannot: entries of 584 bytes, values before scales, in one storage.

    With n rows of a page and the pool's first at k0, its scales are 576 n - 568 k0 bytes behind its values. k0 is the
    smallest number that makes this true for some n, or 72 more if the last page's rows would end behind the storage.
    """
    values, scales, rows = pool.values, pool.scales, pool.values.shape[1]
    behind = scales.storage_offset() - values.storage_offset()
    regular = values.shape[2] == _VALUES and values.stride()[1:] == (_VALUES, 1) and scales.stride(1) == _SCALES
    one = values.untyped_storage().data_ptr() == scales.untyped_storage().data_ptr()
    row, stride, end = _VALUES + _SCALES, values.stride(0), values.untyped_storage().nbytes()
    for first in (behind % _VALUES // _SCALES, behind % _VALUES // _SCALES + _VALUES // _SCALES):
        page = (behind + (_VALUES - _SCALES) * first) // _VALUES
        start = values.storage_offset() - _VALUES * first
        inside = start >= 0 and start + (values.shape[0] - 1) * stride + page * row <= end and first + rows <= page
        if one and regular and behind > 0 and behind % _SCALES == 0 and inside:
            view = torch.as_strided(values, (values.shape[0], page, 1, row), (stride, row, row, 1), start)
            return Grid(view, page, first)
    raise ValueError("these rows do not lie as FlashMLA reads them")


@cache
def prefill() -> Callable[..., Any]:
    """FlashMLA's sparse prefill operation; errors as those of `load`."""
    loader = importlib.import_module("flash_mla._loader")
    return loader.get_ops(True).sparse_prefill_fwd  # type: ignore[no-any-return]


@cache
def load() -> Callable[..., Any]:
    """FlashMLA's sparse decode operation; its kernels for Hopper are in the half that it calls legacy.

    ImportError, OSError, AttributeError or RuntimeError if the package is not there or does not fit torch.
    """
    loader = importlib.import_module("flash_mla._loader")
    return loader.get_ops(True).sparse_decode_fwd  # type: ignore[no-any-return]
