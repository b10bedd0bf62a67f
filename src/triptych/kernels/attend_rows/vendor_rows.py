"""What FlashMLA takes and gives, in two launches of our own around its two: before it `prepare`, after it `turn_back`.

    prepare     queries     normed and rotated                                [B, H, dim] bfloat16
                places      of the window's rows and of the entries, one number for each key: page * rows + row
                plan        which program takes which blocks of 64 keys of which rows

    plan, one line for each program     first row, last row | first block, end | splits before | cut at first, at last
    splits [B + 1]                      how many splits the rows before b have

A row's blocks are two for the window and then those of its entries. FlashMLA's own plan, which its call would make in
a launch of one warp, counts every row as five blocks more than it has; with 64 rows of ten blocks it gives a program
up to eight of them, where five are an equal share. This one lets no program end one row and begin another unless there
are more rows than programs. Measured on an H200 (docs/log.md), a block takes a program 2.6 us; a cut costs 2.5 us, each
piece of a row that is cut 0.06 us of writing and reading sums, and the pieces of one row are added one after the other
in 0.18 us each. The few last programs would wait for the others: beyond 128 of 132 all takes twice as long.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 64
"""Keys that FlashMLA's programs take at once."""
PLANNED = 32
"""Programs of FlashMLA that one program plans."""
_BLOCK, _PLANNED = tl.constexpr(BLOCK), tl.constexpr(PLANNED)


@triton.jit
def _shares(blocks, rows, parts):
    """How many blocks a program takes of a line on which rows lie one after the other, and each row's length there.

    blocks [n], 0 behind the last row. Rows are padded to whole shares; with more rows than programs they are not, or
    to one length if that costs little.
    """
    parts = parts - parts // 32
    total, most = tl.sum(blocks, 0), tl.max(blocks, 0)
    share = tl.cdiv(total, parts)
    low, high = tl.maximum(share, (tl.sqrt(most / 15.0) + 0.5).to(tl.int32)), most
    while (low < high) & (rows <= parts):
        middle = (low + high) // 2
        if tl.sum(tl.cdiv(blocks, middle), 0) <= parts:
            high = middle
        else:
            low = middle + 1
    pieces = tl.sum(tl.where(blocks > low, tl.cdiv(blocks, low), 0), 0)
    low = tl.where((most - low) * 45 < 40 + pieces, most, low)
    whole = tl.cdiv(rows, parts) * most
    even = whole * 8 <= share * 9 + 24
    line = tl.where(even, tl.where(blocks > 0, most, 0), blocks)
    few = rows <= parts
    line = tl.where(few, tl.cdiv(blocks, low) * low, line)
    return tl.where(few, low, tl.where(even, whole, share)), line


@triton.jit
def _seen(r, visible_ptr, chosen_count, mask, MODE: tl.constexpr):
    """How many entries rows r read."""
    if MODE == 0:
        return r * 0
    else:
        seen = tl.load(visible_ptr + r, mask=mask, other=0).to(tl.int32)
        if MODE == 1:
            seen = tl.minimum(seen, chosen_count)
        return seen


@triton.jit
def _plan(
    pid,
    visible_ptr,
    chosen_count,
    lengths_ptr,
    plan_ptr,
    splits_ptr,
    rows,
    parts,
    MODE: tl.constexpr,
    NEAR: tl.constexpr,
    BATCH: tl.constexpr,
):
    """Lines [PLANNED * pid, + PLANNED) of the plan; the first program writes `splits` and the lengths, too."""
    b = tl.arange(0, BATCH)
    lengths = _seen(b, visible_ptr, chosen_count, b < rows, MODE)
    blocks = tl.where(b < rows, NEAR + tl.cdiv(lengths, _BLOCK), 0)
    share, line = _shares(blocks, rows, parts)
    end = tl.cumsum(line, 0)
    start = end - line
    i = pid * _PLANNED + tl.arange(0, _PLANNED)
    begin = i * share
    last = tl.minimum(begin + share, tl.sum(line, 0)) - 1
    there = (b < rows)[None, :]
    first_row = tl.sum((there & (end[None, :] <= begin[:, None])).to(tl.int32), 1)
    last_row = tl.sum((there & (end[None, :] <= last[:, None])).to(tl.int32), 1)
    is_first, is_last = b[None, :] == first_row[:, None], b[None, :] == last_row[:, None]
    first_start = tl.sum(tl.where(is_first, start[None, :], 0), 1)
    last_start = tl.sum(tl.where(is_last, start[None, :], 0), 1)
    has = tl.sum(tl.where(is_last, blocks[None, :], 0), 1)
    first_block, until = begin - first_start, tl.minimum(last - last_start + 1, has)
    cut_first, cut_last = first_block > 0, until < has
    alone = first_row == last_row
    before = tl.where(cut_first, i - first_start // share, 0)
    line_ptr = plan_ptr + i * 8
    tl.store(line_ptr, first_row, mask=i < parts)
    tl.store(line_ptr + 1, last_row, mask=i < parts)
    tl.store(line_ptr + 2, first_block, mask=i < parts)
    tl.store(line_ptr + 3, until, mask=i < parts)
    tl.store(line_ptr + 4, before, mask=i < parts)
    tl.store(line_ptr + 5, (cut_first | (alone & cut_last)).to(tl.int32), mask=i < parts)
    tl.store(line_ptr + 6, (cut_last | (alone & cut_first)).to(tl.int32), mask=i < parts)
    if pid == 0:
        pieces = tl.where(b < rows, (end - 1) // share - start // share + 1, 0)
        tl.store(splits_ptr + 1 + b, tl.cumsum(pieces, 0), mask=b < rows)
        tl.store(splits_ptr, 0)
        if MODE > 0:
            tl.store(lengths_ptr + b, lengths, mask=b < rows)


@triton.jit
def normed(x, cos_ptr, sin_ptr, eps, DIM: tl.constexpr, ROPE: tl.constexpr, HEADS: tl.constexpr):
    """Raw queries x [HEADS, DIM] of a row, normed and rotated."""
    pair = tl.arange(0, DIM // 2) - (DIM - ROPE) // 2
    cos = tl.load(cos_ptr + pair, mask=pair >= 0, other=1.0)[None, :]
    sin = tl.load(sin_ptr + pair, mask=pair >= 0, other=0.0)[None, :]
    x = x * tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None]
    even, odd = tl.split(tl.reshape(x, [HEADS, DIM // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [HEADS, DIM])


@triton.jit
def _page(table, entry, mask, PER_PAGE: tl.constexpr, MODE: tl.constexpr):
    """Pages of entries of the sequence whose line of the page table begins at `table`."""
    if MODE == 0:
        return entry
    else:
        return tl.load(table + entry // PER_PAGE, mask=mask, other=0).to(tl.int32)


@triton.jit
def _near(ring, positions_ptr, lowest_ptr, near_ptr, r, RING: tl.constexpr, REACH: tl.constexpr):
    """Places of the window rows of row r in its ring, whose first row has place `ring`; -1 behind them."""
    position = tl.load(positions_ptr + r).to(tl.int32)
    first = tl.maximum(tl.maximum(tl.load(lowest_ptr + r).to(tl.int32), position - (REACH - 1)), 0)
    n = tl.arange(0, REACH)
    tl.store(near_ptr + r * REACH + n, tl.where(first + n <= position, ring + (first + n) % RING, -1))


@triton.jit
def prepare(
    heads_ptr,
    heads_row,
    cos_ptr,
    sin_ptr,
    eps,
    slots_ptr,
    positions_ptr,
    lowest_ptr,
    window_rows,
    window_first,
    table_ptr,
    table_row,
    visible_ptr,
    chosen_ptr,
    chosen_row,
    chosen_count,
    entry_rows,
    entry_first,
    query_ptr,
    near_ptr,
    far_ptr,
    far_row,
    lengths_ptr,
    plan_ptr,
    splits_ptr,
    rows,
    parts,
    heads,
    plans,
    MODE: tl.constexpr,
    RING: tl.constexpr,
    PER_PAGE: tl.constexpr,
    REACH: tl.constexpr,
    DIM: tl.constexpr,
    ROPE: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    BATCH: tl.constexpr,
):
    """The first `plans` programs share the plan; each other one has HEADS heads of a row and a share of its entries.

    Loads come in the order in which they are waited for: of a chosen entry its page is, too.
    """
    pid = tl.program_id(0)
    if pid < plans:
        near: tl.constexpr = REACH // _BLOCK
        _plan(pid, visible_ptr, chosen_count, lengths_ptr, plan_ptr, splits_ptr, rows, parts, MODE, near, BATCH)
    else:
        tiles = tl.cdiv(heads, HEADS)
        r, tile = ((pid - plans) // tiles).to(tl.int64), (pid - plans) % tiles
        seen = _seen(r, visible_ptr, chosen_count, True, MODE)
        n = tile * KEYS + tl.arange(0, KEYS)
        entry = tl.load(chosen_ptr + r * chosen_row + n, mask=n < chosen_count, other=0) if MODE == 1 else n
        h = tile * HEADS + tl.arange(0, HEADS)
        at = h[:, None] * DIM + tl.arange(0, DIM)[None, :]
        x = tl.load(heads_ptr + r * heads_row + at, mask=(h < heads)[:, None], other=0.0).to(tl.float32)
        page = _page(table_ptr + r * table_row, entry, n < seen, PER_PAGE, MODE)
        x = normed(x, cos_ptr + r * (ROPE // 2), sin_ptr + r * (ROPE // 2), eps, DIM, ROPE, HEADS)
        tl.store(query_ptr + r * heads * DIM + at, x.to(query_ptr.dtype.element_ty), mask=(h < heads)[:, None])
        if tile == 0:
            ring = tl.load(slots_ptr + r).to(tl.int32) * window_rows + window_first
            _near(ring, positions_ptr, lowest_ptr, near_ptr, r, RING, REACH)
        far = far_ptr + r * far_row
        tl.store(far + n, page * entry_rows + entry_first + entry % PER_PAGE, mask=n < seen)
        if MODE == 2:
            for start in range((tiles + tile) * KEYS, seen, tiles * KEYS):
                n = start + tl.arange(0, KEYS)
                page = _page(table_ptr + r * table_row, n, n < seen, PER_PAGE, MODE)
                tl.store(far + n, page * entry_rows + entry_first + n % PER_PAGE, mask=n < seen)


@triton.jit
def turn_back(out_ptr, cos_ptr, sin_ptr, heads, DIM: tl.constexpr, ROPE: tl.constexpr, HEADS: tl.constexpr):
    """The last ROPE dims of HEADS heads of a row of out [B, H, DIM], rotated back in place."""
    r = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    here = out_ptr + (r * heads + h[:, None]) * DIM + (DIM - ROPE) + tl.arange(0, ROPE)[None, :]
    x = tl.load(here, mask=(h < heads)[:, None], other=0.0).to(tl.float32)
    pair = r * (ROPE // 2) + tl.arange(0, ROPE // 2)
    cos, sin = tl.load(cos_ptr + pair)[None, :], tl.load(sin_ptr + pair)[None, :]
    even, odd = tl.split(tl.reshape(x, [HEADS, ROPE // 2, 2]))
    x = tl.reshape(tl.join(even * cos + odd * sin, odd * cos - even * sin), [HEADS, ROPE])
    tl.store(here, x.to(out_ptr.dtype.element_ty), mask=(h < heads)[:, None])
