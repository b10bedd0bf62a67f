"""Attention of prefill chunks by FlashMLA's sparse prefill, which reads bfloat16 rows by their numbers.

    workspace   | window rows of the step | entries of its first sequence | of its second ...      [N, 512] bfloat16
    places      of each row: its window's rows, then its entries                                   [R, keys] int32

So packed rows are widened first, each once a layer, and every row that reads one finds it in bfloat16. The workspace is
bounded by the rows of the step; longer contexts are left to our own kernel, which reads packed rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.config import WINDOW
from triptych.kernels.attend.ref import Attention, WindowRows
from triptych.kernels.attend_rows.ref import Queries
from triptych.kernels.attend_rows.vendor_rows import normed, turn_back
from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.quant.formats import PackedRows
from triptych.kernels.quant.triton_rows import place_of

_STRIDE = 128  # places of a row come in whole ones of these
_PLACES = 1 << 24  # places alive at once: 64 MiB
_ALONE, _TOGETHER = (
    32,
    8,
)  # entries that the workspace may hold for each row of the step, of one sequence and of several
_TILE_HEADS, _TILE_KEYS, _TILE_ROWS, _TURNED = 4, 128, 8, 16
_NO_ENTRIES, _CHOSEN, _VISIBLE = 0, 1, 2


def fits(rows: int, entries: PagedEntries | None) -> bool:
    """Whether the workspace may hold what `rows` rows of a step see."""
    if entries is None:
        return True
    sequences = len(entries.page_table)
    assert entries.most is not None
    return sequences * entries.most <= rows * (_ALONE if sequences == 1 else _TOGETHER)


def by_flash_mla(
    prefill: object,
    queries: Queries,
    window: WindowRows,
    entries: PagedEntries | None,
    ids: Tensor | None,
    attention: Attention,
) -> Tensor:
    """See ref.attend_heads, with results of bfloat16. `prefill` is FlashMLA's operation."""
    assert callable(prefill) and isinstance(window.rows, PackedRows)
    if entries is not None and not entries.most:
        entries = None
    rows, heads, dim = len(queries.heads), queries.count, queries.dim
    wide, near = _widened(window.rows, entries), window.rows.shape[1]
    reach = 0 if entries is None else entries.most if ids is None else ids.shape[1]
    width = triton.cdiv(WINDOW + (reach or 0), _STRIDE) * _STRIDE
    step = max(1, _PLACES // width)
    parts = []
    for first in range(0, rows, step):
        some = slice(first, min(rows, first + step))
        count = some.stop - first
        q = torch.empty(count, heads, dim, dtype=torch.bfloat16, device=wide.device)
        places = torch.empty(count, 1, width, dtype=torch.int32, device=wide.device)
        lengths = torch.empty(count, dtype=torch.int32, device=wide.device)
        seen = _seen_arguments(window, entries, ids, some)
        angles = tuple(turn[some] for turn in queries.angles)
        _prepare_chunk[(count, triton.cdiv(heads, _TILE_HEADS))](
            *(queries.heads[some], queries.heads.stride(0), *angles, queries.eps, q),
            *(window.first[some], window.count[some], *seen, near, places, width, lengths, heads),
            MODE=_NO_ENTRIES if entries is None else _VISIBLE if ids is None else _CHOSEN,
            DIM=dim,
            ROPE=2 * angles[0].shape[1],
            HEADS=_TILE_HEADS,
            KEYS=_TILE_KEYS,
            REACH=WINDOW,
            num_warps=4,
        )
        out = prefill(q, wide, places, attention.scale, dim, attention.sink, lengths, False, False)[0]
        turn_back[(count, triton.cdiv(heads, _TURNED))](
            *(out, *angles, heads), DIM=dim, ROPE=2 * angles[0].shape[1], HEADS=_TURNED, num_warps=1
        )
        parts.append(out)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _seen_arguments(
    window: WindowRows, entries: PagedEntries | None, ids: Tensor | None, some: slice
) -> tuple[Tensor, Tensor, int, Tensor, int, int]:
    """Sequence and visible of some rows, entries of a sequence, ids of these rows, their stride and number."""
    if entries is None:
        return (window.first, window.first, 0, window.first, 0, 0)
    chosen = (window.first, 0, 0) if ids is None else (ids[some], ids.stride(0), ids.shape[1])
    assert entries.most is not None
    return (entries.seq[some], entries.visible[some], entries.most, *chosen)


def _widened(rows: PackedRows, entries: PagedEntries | None) -> Tensor:
    """Window rows and then the entries of each sequence as bfloat16 [N, 1, dim]; what no row sees is unspecified."""
    near, dim = rows.shape[1], rows.format.dim
    sequences, most = (0, 0) if entries is None else (len(entries.page_table), entries.most or 0)
    wide = torch.empty(near + sequences * most, 1, dim, dtype=torch.bfloat16, device=rows.device)
    sizes = {"DIM": dim, "ROPE": rows.format.rope, "ROWS": _TILE_ROWS, "num_warps": 4}
    _widen[(triton.cdiv(near, _TILE_ROWS), 1)](*place_of(rows), wide, 0, near, wide, PAGED=False, PER_PAGE=1, **sizes)
    if entries is not None:
        assert isinstance(entries.pool, PackedRows)
        table = entries.page_table
        _widen[(triton.cdiv(most, _TILE_ROWS), sequences)](
            *(*place_of(entries.pool), table, table.stride(0), most, wide[near:]),
            PAGED=True,
            PER_PAGE=entries.pool.shape[1],
            **sizes,
        )
    return wide


@triton.jit
def _widen(
    values_ptr,
    values_page,
    values_row,
    scales_ptr,
    scales_page,
    scales_row,
    table_ptr,
    table_row,
    count,
    out_ptr,
    PAGED: tl.constexpr,
    PER_PAGE: tl.constexpr,
    DIM: tl.constexpr,
    ROPE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS packed rows of one sequence, or of the one page of window rows, as bfloat16."""
    s = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    page, row = n * 0, n
    if PAGED:
        page, row = tl.load(table_ptr + s * table_row + n // PER_PAGE, mask=n < count, other=0), n % PER_PAGE
    page, row = page.to(tl.int64), row.to(tl.int64)
    d = tl.arange(0, DIM)
    inside = (n < count)[:, None]
    nope = inside & (d < DIM - ROPE)[None, :]
    here = values_ptr + (page * values_page + row * values_row)[:, None]
    bits = tl.load(here + d[None, :], mask=nope, other=0)
    groups = scales_ptr + (page * scales_page + row * scales_row)[:, None] + (d // 64)[None, :]
    code = tl.load(groups, mask=nope, other=127).to(tl.int32)
    x = bits.to(tl.float8e4nv, bitcast=True).to(tl.float32) * (code << 23).to(tl.float32, bitcast=True)
    out = out_ptr + (s * count + n)[:, None] * DIM
    tl.store(out + d[None, :], x.to(tl.bfloat16), mask=nope)
    tail = tl.arange(0, ROPE)[None, :]
    rope = (here + (DIM - ROPE)).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    tl.store(out + (DIM - ROPE) + tail, tl.load(rope + tail, mask=inside, other=0.0), mask=inside)


@triton.jit
def _prepare_chunk(
    heads_ptr,
    heads_row,
    cos_ptr,
    sin_ptr,
    eps,
    query_ptr,
    first_ptr,
    count_ptr,
    seq_ptr,
    visible_ptr,
    most,
    chosen_ptr,
    chosen_row,
    chosen_count,
    near,
    places_ptr,
    width,
    lengths_ptr,
    heads,
    MODE: tl.constexpr,
    DIM: tl.constexpr,
    ROPE: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    REACH: tl.constexpr,
):
    """HEADS heads of a row, normed and rotated, and a share of its places; one program writes how many there are."""
    r, tile, tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    h = tile * HEADS + tl.arange(0, HEADS)
    at = h[:, None] * DIM + tl.arange(0, DIM)[None, :]
    x = tl.load(heads_ptr + r * heads_row + at, mask=(h < heads)[:, None], other=0.0).to(tl.float32)
    x = normed(x, cos_ptr + r * (ROPE // 2), sin_ptr + r * (ROPE // 2), eps, DIM, ROPE, HEADS)
    tl.store(query_ptr + r * heads * DIM + at, x.to(query_ptr.dtype.element_ty), mask=(h < heads)[:, None])
    first, count = tl.load(first_ptr + r).to(tl.int32), tl.load(count_ptr + r).to(tl.int32)
    here = places_ptr + r * width
    seen = 0
    if MODE > 0:
        seen = tl.load(visible_ptr + r).to(tl.int32)
        base = near + tl.load(seq_ptr + r).to(tl.int32) * most
        if MODE == 1:
            seen = tl.minimum(seen, chosen_count)
        for start in range(tile * KEYS, seen, tiles * KEYS):
            n = start + tl.arange(0, KEYS)
            entry = n
            if MODE == 1:
                entry = tl.load(chosen_ptr + r * chosen_row + n, mask=n < seen, other=0).to(tl.int32)
            tl.store(here + count + n, base + entry, mask=n < seen)
    if tile == 0:
        n = tl.arange(0, REACH)
        tl.store(here + n, first + n, mask=n < count)
        tl.store(lengths_ptr + r, count + seen)
