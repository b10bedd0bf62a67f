"""Attention for NVIDIA GPUs, straight from packed or bfloat16 caches, in two launches, or in one where a split has all.

    keys of a row    | window rows from the ring | entries: the chosen ones, or all visible ones |
    its splits        [------ span ------][------ span ------][------ span ------][-- rest --]

The first launch norms and rotates the queries, reads each key once for a tile of heads and writes every split's
unnormalised sum; the second weighs the splits and the sink, and rotates back. A row's number of splits follows from
its own number of keys, so short rows leave their part of the chip to long ones. With the default span, which the host
takes from the batch so that it fills the chip, a row's sums may depend on its batch mates in the last bits; with a
fixed one they do not.

hopper.py has the first launch for the released models' sizes on Hopper, portable.py for all else. There, chunk.py takes
the many rows of a prefill chunk, and together.py few rows of decode, in one launch.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from triptych.config import WINDOW
from triptych.kernels.attend.ref import Attention, WindowRows
from triptych.kernels.attend_rows import ordered, portable
from triptych.kernels.attend_rows.portable import extent
from triptych.kernels.attend_rows.ref import Queries, RingRows
from triptych.kernels.gpu import is_hopper, multiprocessors, shared_memory
from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.quant.formats import PackedRows, Rows

_LOG2E = 1.4426950408889634
FIXED_SPAN = 512  # keys of a split in deterministic mode
_PARTS = 1 << 29  # bytes of the splits' sums alive at once in deterministic mode
_SMALL = 16 * 32  # heads times keys of a tile that every GPU has room for
_SHARED = 165888  # bytes of shared memory that larger tiles want
INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Triton's interpreter has no bfloat16 arithmetic."""

_NO_ENTRIES, _CHOSEN, _VISIBLE = 0, 1, 2


class Tiling(NamedTuple):
    """Heads and keys of a tile, keys of a split, warps and pipeline stages of a program.

    `fixed`: splits are added up one after the other, so that a row's bits do not depend on how many others have.
    """

    heads: int
    keys: int
    span: int
    warps: int
    stages: int
    fixed: bool = False


def attend_rows(
    queries: Queries,
    window: RingRows,
    entries: PagedEntries | None,
    ids: Tensor | None,
    attention: Attention,
    tiling: Tiling | None = None,
) -> Tensor:
    """See ref.attend_rows. `entries.most` must bound what any row sees; ids that are not -1 come first."""
    out = torch.empty(
        len(queries.heads), queries.count, queries.dim, dtype=queries.heads.dtype, device=window.slots.device
    )
    if tiling is not None or not _in_one_launch(queries, window, entries, ids, attention, out):
        _launch(queries, window, entries, ids, attention, out, tiling)
    return out


def _in_one_launch(
    queries: Queries,
    window: RingRows,
    entries: PagedEntries | None,
    ids: Tensor | None,
    attention: Attention,
    out: Tensor,
) -> bool:
    """Whether the programs of all rows fit the chip side by side, so that together.py serves."""
    if not _on_hopper(queries, window) or out.dtype != torch.bfloat16 or queries.eps <= 0:
        return False
    together = importlib.import_module("triptych.kernels.attend_rows.together")
    t = together.tiling_of(out, entries, ids)
    if t is not None:
        together.launch(queries, window, entries, ids, attention, out, t)
    return t is not None


def attend_rows_deterministic(
    queries: Queries,
    window: RingRows,
    entries: PagedEntries | None,
    ids: Tensor | None,
    attention: Attention,
) -> Tensor:
    """See ref.attend_rows; a row's bits do not depend on its batch mates."""
    return attend_rows(queries, window, entries, ids, attention, _fixed(queries, window))


def attend_packed(
    q: Tensor,
    window: WindowRows,
    entries: PagedEntries | None,
    selected: Tensor | None,
    attention: Attention,
    *,
    fixed: bool = False,
) -> Tensor:
    """attend.ref.attend for step rows whose window rows and entries are packed: q [R, H, c] normed and rotated.

    `fixed`: a row's bits do not depend on its batch mates.
    """
    rows, heads, dim = q.shape
    assert isinstance(window.rows, PackedRows)
    none = torch.empty(1, window.rows.format.rope // 2, device=q.device)
    queries = Queries(q.contiguous().view(rows, heads * dim), heads, dim, (none, none), 0.0)
    return _step_rows(queries, window, entries, selected, attention, fixed=fixed)


def attend_heads(
    queries: Queries,
    window: WindowRows,
    entries: PagedEntries | None,
    ids: Tensor | None,
    attention: Attention,
) -> Tensor:
    """See ref.attend_heads. `entries.most` must be known; ids that are not -1 come first."""
    return _step_rows(queries, window, entries, ids, attention)


def attend_heads_deterministic(
    queries: Queries,
    window: WindowRows,
    entries: PagedEntries | None,
    ids: Tensor | None,
    attention: Attention,
) -> Tensor:
    """See ref.attend_heads; a row's bits do not depend on its batch mates."""
    return _step_rows(queries, window, entries, ids, attention, fixed=True)


def _step_rows(
    queries: Queries,
    window: WindowRows,
    entries: PagedEntries | None,
    ids: Tensor | None,
    attention: Attention,
    *,
    fixed: bool = False,
) -> Tensor:
    """Attention of rows whose window is a stretch of a flat workspace: [R, H, c] in the queries' dtype."""
    if entries is not None and ids is None and entries.most == 0:
        entries = None
    heads, rows = queries.heads, len(queries.heads)
    if not fixed and _converts(queries, window, entries):
        chunk = importlib.import_module("triptych.kernels.attend_rows.chunk")
        return chunk.attend_chunk(queries, window, entries, ids, attention)  # type: ignore[no-any-return]
    out = torch.empty(rows, queries.count, queries.dim, dtype=heads.dtype, device=heads.device)
    slots = window.first if entries is None else entries.seq
    ring = RingRows(window.rows, 0, 1, window.first, slots, window.count)
    tiling = _fixed(queries, ring) if fixed else None
    for part in _parts_of(queries, entries, ids, fixed):
        some = None if entries is None else entries._replace(seq=slots[part], visible=entries.visible[part])
        mine = ring._replace(positions=window.first[part], slots=slots[part], lowest=window.count[part])
        chosen = None if ids is None else ids[part]
        _launch(_some(queries, part), mine, some, chosen, attention, out[part], tiling)
    return out


def _parts_of(queries: Queries, entries: PagedEntries | None, ids: Tensor | None, fixed: bool) -> list[slice]:
    """All rows at once; or, where splits are many because they are short, so many that their sums take _PARTS bytes."""
    rows, step = len(queries.heads), len(queries.heads)
    if fixed and entries is not None:
        assert entries.most is not None
        splits = triton.cdiv(WINDOW + (entries.most if ids is None else ids.shape[1]), FIXED_SPAN)
        step = max(1, _PARTS // (4 * splits * queries.count * queries.dim))
    return [slice(first, min(first + step, rows)) for first in range(0, rows, max(step, 1))]


def _some(queries: Queries, rows: slice) -> Queries:
    """These rows' queries; those that are rotated already have no angles."""
    cos, sin = queries.angles
    angles = (cos[rows], sin[rows]) if queries.eps > 0 else (cos, sin)
    return queries._replace(heads=queries.heads[rows], angles=angles)


def _converts(queries: Queries, window: WindowRows, entries: PagedEntries | None) -> bool:
    """Whether chunk.py serves, and its way of converting keys once pays."""
    ring = RingRows(window.rows, 0, 1, window.first, window.first, window.count)
    if not _on_hopper(queries, ring) or queries.heads.dtype != torch.bfloat16:
        return False
    return bool(importlib.import_module("triptych.kernels.attend_rows.chunk").fits(queries, entries))


def _launch(
    queries: Queries,
    window: RingRows,
    entries: PagedEntries | None,
    ids: Tensor | None,
    attention: Attention,
    out: Tensor,
    tiling: Tiling | None,
) -> None:
    """Both launches into `out` [R, H, c].

    A stride of 0 stands for step rows, whose window is a stretch of a flat workspace. Of a single split the first
    launch writes the result itself. An eps of 0 stands for queries that are normed and rotated already.
    """
    flat, raw = window.stride == 0, queries.eps > 0
    rows, heads, dim = out.shape
    mode = _NO_ENTRIES if entries is None else _VISIBLE if ids is None else _CHOSEN
    most = WINDOW
    if entries is not None:
        assert entries.most is not None
        most += entries.most if ids is None else ids.shape[1]
    t = tiling or _usual(queries, window, out, most)
    splits = triton.cdiv(most, t.span)
    whole = splits == 1 and not t.fixed
    part = out if whole else torch.empty(rows, splits, heads, dim, device=out.device)
    stats = attention.sink if whole else torch.empty(2, rows, splits, heads, device=out.device)
    cos, sin = queries.angles
    rope = 2 * cos.shape[1]
    reads = (window.slots, window.positions, window.lowest, *_entry_arguments(window, entries, ids))
    _first_launch(t)[(triton.cdiv(heads, t.heads), splits, rows)](
        *(queries.heads, queries.heads.stride(0), cos, sin, queries.eps, attention.scale * _LOG2E),
        *(*_place(window.ring, window.stride), *_place(window.ring if entries is None else entries.pool, 1)),
        *(*reads, attention.sink, part, stats, stats[-1] if not whole else stats, heads, splits, t.span),
        MODE=mode,
        FLAT=flat,
        RAW=raw,
        WHOLE=whole,
        PER_PAGE=1 if entries is None else entries.pool.shape[1],
        RING=window.size,
        REACH=WINDOW,
        **_choices(t, window, dim, rope),
    )
    if not whole:
        sums = (part, stats, stats[1], attention.sink, cos, sin, *reads, out, heads, splits, t.span)
        meta = dict(MODE=mode, FLAT=flat, RAW=raw, REACH=WINDOW, DIM=dim, ROPE=rope)
        _second_launch(sums, meta, out, splits, fixed=t.fixed)


def _second_launch(sums: tuple[Any, ...], meta: dict[str, Any], out: Tensor, splits: int, *, fixed: bool) -> None:
    rows, heads, dim = out.shape
    if fixed:
        ordered.combine[(triton.cdiv(dim, 128), heads, rows)](*sums, **meta, num_warps=1)
        return
    width = min(triton.next_power_of_2(dim), 128 if rows * heads < 1024 else 512)
    most = triton.next_power_of_2(splits)
    early = is_hopper(out.device)
    _combine[(triton.cdiv(dim, width), heads, rows)](
        *sums, **meta, WIDTH=width, SPLITS=most, TAKEN=min(most, 2048 // width), EARLY=early, num_warps=1,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip


def _usual(queries: Queries, window: RingRows, out: Tensor, most: int) -> Tiling:
    rows, heads, _ = out.shape
    t = tiling_for(rows, heads, most, multiprocessors(out.device), hopper=_on_hopper(queries, window))
    wide = not isinstance(window.ring, PackedRows) and window.ring.dtype == torch.float32  # 128 KiB for 64 keys
    if t.warps and t.heads * t.keys > _SMALL and (wide or shared_memory(out.device) < _SHARED):
        return t._replace(heads=16, keys=32, warps=4, stages=3)
    return t


def _on_hopper(queries: Queries, window: RingRows) -> bool:
    """Whether hopper.py can serve: its sizes are those of the released models."""
    fits = isinstance(window.ring, PackedRows) and queries.dim == 512 and window.ring.format.rope == 64
    return fits and queries.count % 64 == 0 and not INTERPRETED and is_hopper(window.slots.device)


def _first_launch(t: Tiling) -> Any:
    if t.warps:
        return portable.partial
    return importlib.import_module("triptych.kernels.attend_rows.hopper").partial


def _choices(t: Tiling, window: RingRows, dim: int, rope: int) -> dict[str, Any]:
    """What only Triton's own kernel is compiled for."""
    if not t.warps:
        return {"num_warps": 4}  # beside those of its other warpgroups
    return {
        "PACKED": isinstance(window.ring, PackedRows),
        "WIDE": INTERPRETED or window.ring.dtype == torch.float32,
        "DIM": dim,
        "ROPE": rope,
        "PARTS": _parts(dim - rope),
        "HEADS": t.heads,
        "KEYS": t.keys,
        "num_warps": t.warps,
        "num_stages": t.stages,
    }


def _fixed(queries: Queries, window: RingRows) -> Tiling:
    """The one tiling of deterministic mode."""
    if _on_hopper(queries, window):
        return Tiling(64, 64, FIXED_SPAN, 0, 0, True)
    return Tiling(16, 32, FIXED_SPAN, 4, 2, True)


def tiling_for(rows: int, heads: int, most: int, processors: int, *, hopper: bool = False) -> Tiling:
    """Small head tiles and short splits while rows are few, all heads at once where they fill the chip.

    No warps: the kernel of hopper.py.
    """
    large = hopper or rows * triton.cdiv(heads, 64) >= 16
    tile, keys, warps, stages = (64, 64, 0 if hopper else 8, 2) if large else (16, 32, 4, 3)
    tile = min(tile, _tile(heads))
    programs = rows * triton.cdiv(heads, tile)
    wanted = processors // programs if large else triton.cdiv(2 * processors, programs)
    if hopper:  # beyond that the second launch takes longer for them than the first one gains
        wanted = min(wanted, processors // 2)
    splits = max(1, min(wanted, triton.cdiv(most, keys)))
    return Tiling(tile, keys, triton.cdiv(triton.cdiv(most, splits), keys) * keys, warps, stages)


def _tile(heads: int) -> int:
    return max(16, int(triton.next_power_of_2(heads)))


def _parts(nope: int) -> tuple[int, int, int]:
    """Three widths, powers of two of at least 16 or 0, that cover the dims before the rotated ones."""
    parts = [0, 0, 0]
    left = nope
    for n in range(2):
        if left > 0:
            parts[n] = max(16, 1 << (left.bit_length() - 1))
            left -= parts[n]
    parts[2] = max(16, int(triton.next_power_of_2(left))) if left > 0 else 0
    first, second, third = parts
    return first, second, third


def _place(pool: Rows, flat: int) -> tuple[Any, ...]:
    """Values, strides of page and row, scales, theirs; a dense pool under flat indices has pages of `flat` rows."""
    if isinstance(pool, PackedRows):
        return (pool.values, *pool.values.stride()[:2], pool.scales, *pool.scales.stride()[:2])
    page, row = (flat * pool.stride(0), pool.stride(0)) if pool.dim() == 2 else pool.stride()[:2]
    return (pool, page, row, pool, 0, 0)


def _entry_arguments(window: RingRows, entries: PagedEntries | None, ids: Tensor | None) -> tuple[Any, ...]:
    """Page table and its stride, visible, ids, their stride and number."""
    some = window.positions
    if entries is None:
        return (some, 0, some, some, 0, 0)
    chosen = (some, 0, 0) if ids is None else (ids, ids.stride(0), ids.shape[1])
    return (entries.page_table, entries.page_table.stride(0), entries.visible, *chosen)


@triton.jit(do_not_specialize=["table_row", "splits"])
def _combine(
    part_ptr,
    peak_ptr,
    weight_ptr,
    sink_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    positions_ptr,
    lowest_ptr,
    table_ptr,
    table_row,
    visible_ptr,
    chosen_ptr,
    chosen_row,
    chosen_count,
    out_ptr,
    heads,
    splits,
    span,
    MODE: tl.constexpr,
    FLAT: tl.constexpr,
    RAW: tl.constexpr,
    REACH: tl.constexpr,
    DIM: tl.constexpr,
    ROPE: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    TAKEN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Dims [WIDTH] of one head of one row: the splits' sums, TAKEN in flight, by their weights; then rotated back.

    One warp, whose vectors are all of one layout: nothing goes through shared memory. EARLY: the launch does not wait
    for the end of the one before, so its programs do.
    """
    r, h, start = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0) * WIDTH
    d = start + tl.arange(0, WIDTH)
    _, _, total = extent(r, positions_ptr, lowest_ptr, visible_ptr, chosen_count, MODE, REACH, FLAT)
    used = tl.cdiv(total, span)
    line = r * splits * heads + h
    sink = tl.load(sink_ptr + h) * 1.4426950408889634
    if EARLY:  # all else that is read here was there before the first launch
        gdc_wait()
    s = tl.arange(0, SPLITS)
    peaks = tl.load(peak_ptr + line + s * heads, mask=s < used, other=-1.0e30)
    weights = tl.load(weight_ptr + line + s * heads, mask=s < used, other=0.0)
    highest = tl.maximum(tl.max(peaks, 0), sink)
    weight = tl.sum(weights * tl.exp2(peaks - highest), 0) + tl.exp2(sink - highest)
    acc = tl.zeros([WIDTH], tl.float32)
    for first in range(0, used, TAKEN):
        for n in tl.static_range(TAKEN):
            row, there = line + (first + n) * heads, first + n < used
            factor = tl.exp2(tl.load(peak_ptr + row, mask=there, other=-1.0e30) - highest)
            x = tl.load(part_ptr + row * DIM + d, mask=there & (d < DIM), other=0.0)
            acc += x * factor
    if start + WIDTH > DIM - ROPE and RAW:
        acc = _turned_back(acc, cos_ptr + r * (ROPE // 2), sin_ptr + r * (ROPE // 2), start - (DIM - ROPE), ROPE, WIDTH)
    tl.store(out_ptr + (r * heads + h) * DIM + d, (acc / weight).to(out_ptr.dtype.element_ty), mask=d < DIM)


@triton.jit
def _turned_back(x, cos_ptr, sin_ptr, start, ROPE: tl.constexpr, WIDTH: tl.constexpr):
    """x [WIDTH] rotated back where it is in the ROPE dims, `start` behind whose first it begins."""
    even, odd = tl.split(tl.reshape(x, [WIDTH // 2, 2]))
    pair = start // 2 + tl.arange(0, WIDTH // 2)
    turns = (pair >= 0) & (pair < ROPE // 2)
    cos = tl.load(cos_ptr + pair, mask=turns, other=1.0)
    sin = tl.load(sin_ptr + pair, mask=turns, other=0.0)
    return tl.reshape(tl.join(even * cos + odd * sin, odd * cos - even * sin), [WIDTH])
