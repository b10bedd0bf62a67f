"""Selection of decode rows for NVIDIA GPUs, straight from packed or bfloat16 keys.

    queries  rotated, by Hadamard too, and rounded
    scores   programs of a row's stretch of keys multiply and weigh; each score is written as an integer of the same
             order, and with it the highest of each 8 of them
    highest  the k highest of a row

Two launches do it anywhere: queries and scores by the kernel below, and highest.py. On Hopper hopper.py (FP8 keys) and
mxfp4.py do all in one for rows that may be of different sequences, and queries.py, chunk.py and narrow.py for many that
share their keys.

FP8 keys and queries meet in the FP8 tensor cores. Queries are e2m1 with a scale for each 32 dims, of which e4m3 has
room for differences of up to 2^14; of MXFP4 keys it is up to 2^11, beyond which a group counts as 0. On Hopper it is up
to 2^8 for queries of MXFP4 keys, beyond which they are rounded, and up to 2^10 for such keys, beyond which a group
counts as if its scale were 2^10 below the largest.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from triptych.kernels.gpu import is_hopper, multiprocessors
from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.quant.e4m3 import e4m3_values
from triptych.kernels.quant.formats import PackedRows, Rows
from triptych.kernels.select_rows.highest import GROUP, highest
from triptych.kernels.select_rows.ref import IndexQueries

_TILE = 128  # keys of one product
_ALONE = 128  # rows that may all be of different sequences, as those of a decode step are
_COUNTED = 1 << 15  # rows at once at most: hopper.py counts the programs of each that are done
_SCORES = 1 << 28  # bytes of scores alive at once in prefill
_GATHERED = 1 << 27  # and of keys side by side at most: more than three sequences of a million tokens
_MODULES = {"fp8": "hopper", "mxfp4": "mxfp4"}
INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Triton's interpreter multiplies in float32 only."""


def select_rows(queries: IndexQueries, keys: PagedEntries, topk: int) -> Tensor:
    """See ref.select_rows. `keys.most` must bound what any row sees.

    Of many rows some at a time, so that their scores take at most a quarter of a gigabyte; always whole tiles of them,
    since kernels are compiled anew for rows that begin at odd addresses.
    """
    assert keys.most is not None
    return _some_at_a_time(queries, keys, topk, max(_ALONE, _SCORES // (4 * max(keys.most, _TILE)) // _TILE * _TILE))


def select_rows_deterministic(queries: IndexQueries, keys: PagedEntries, topk: int) -> Tensor:
    """See ref.select_rows; rows go through the kernel of decode rows, however many there are."""
    return _some_at_a_time(queries, keys, topk, _ALONE)


def _some_at_a_time(
    queries: IndexQueries, keys: PagedEntries, topk: int, step: int, *, rounded: bool = False
) -> Tensor:
    """Ids of `step` rows after the other; `rounded` as in ordered_scores."""
    rows, step = len(queries.heads), min(step, _COUNTED)
    ready = _gathered(queries, keys) if step > _ALONE and (queries.rounds or rounded) else None
    if rows <= step:
        return _chosen(queries, keys, topk, ready, rounded=rounded)
    out = torch.empty(rows, topk, dtype=torch.int32, device=queries.heads.device)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        some = keys._replace(seq=keys.seq[part], visible=keys.visible[part])
        angles = (queries.angles[0][part], queries.angles[1][part])
        mine = queries._replace(heads=queries.heads[part], angles=angles, weights=queries.weights[part])
        out[part] = _chosen(mine, some, topk, ready, rounded=rounded)
    return out


def _chosen(queries: IndexQueries, keys: PagedEntries, topk: int, ready: Any, *, rounded: bool) -> Tensor:
    """Ids of all rows; in one launch where hopper.py can serve."""
    if ready is None and (queries.rounds or rounded) and _on_hopper(queries, keys.pool):
        room = _room(queries, keys)
        if importlib.import_module("triptych.kernels.select_rows.narrow").fits(room[0].shape[1], topk):
            return _for_hopper(keys.pool).choose(queries, keys, room, topk)  # type: ignore[no-any-return]
    scores, tops = ordered_scores(queries, keys, rounded=rounded, ready=ready)
    return highest(scores, tops, keys.visible, topk)


def _room(queries: IndexQueries, keys: PagedEntries) -> tuple[Tensor, Tensor]:
    """For the ordered scores of all rows, in whole tiles, and their tops."""
    assert keys.most is not None
    rows, total, device = len(queries.heads), _whole_tiles(keys.most), queries.heads.device
    scores = torch.empty(rows, total, dtype=torch.int32, device=device)
    return scores, torch.empty(rows, total // GROUP, dtype=torch.int32, device=device)


def ordered_scores(
    queries: IndexQueries, keys: PagedEntries, *, rounded: bool = False, ready: Any = None
) -> tuple[Tensor, Tensor]:
    """Scores [B, T] as int32 that sort like the floats, and the highest of each 8; T = most, in whole tiles.

    What a row does not see is unspecified. `rounded`: queries may be taken as e4m3, because they are on its grid, or
    because keys have been rounded as much. `ready` are the keys side by side, if they are.
    """
    out = scores, tops = _room(queries, keys)
    rows, total = scores.shape
    pool = keys.pool
    if _on_hopper(queries, pool) and (queries.rounds or rounded):
        ready = ready or _gathered(queries, keys)
        if ready is None:
            _for_hopper(pool).score(queries, keys, out)
        else:
            importlib.import_module("triptych.kernels.select_rows.chunk").score(queries, keys, ready, out)
        return out
    stretch = _stretch(rows, total, 3 * multiprocessors(scores.device))
    heads, dim = queries.count, queries.dim
    raw = queries.heads[:, -heads * dim :]
    cos, sin = queries.angles
    kind = pool.format.kind if isinstance(pool, PackedRows) else "dense"
    if isinstance(pool, PackedRows):
        place = (pool.values, *pool.values.stride()[:2], pool.scales, *pool.scales.stride()[:2])
    else:
        place = (pool, *pool.stride()[:2], pool, 0, 0)
    _scores[(triton.cdiv(total, stretch), rows)](
        *(raw, raw.stride(0), cos, sin, queries.weights, queries.weights.stride(0)),
        *(*place, keys.page_table, keys.page_table.stride(0), keys.seq, keys.visible),
        *(scores, tops, total, heads, stretch),
        KIND=0 if kind == "dense" else 1 if kind == "fp8" else 2,
        ROUNDS=queries.rounds,
        WIDE=INTERPRETED or pool.dtype == torch.float32,
        PER_PAGE=pool.shape[1],
        HEADS=max(16, triton.next_power_of_2(heads)),
        DIM=dim,
        ROPE=2 * cos.shape[1],
        TILE=_TILE,
        num_warps=4,
        num_stages=4 if kind == "fp8" else 3,
    )
    return out


def select_packed(q: Tensor, weights: Tensor, keys: PagedEntries, topk: int, *, fixed: bool = False) -> Tensor:
    """index.ref.select_entries for packed keys; q [R, Hi, Di] ready to be multiplied.

    Some rows at a time, so that their scores take at most a quarter of a gigabyte; `fixed`: by one kernel always.
    """
    most = keys.most if keys.most is not None else int(keys.visible.max())
    rows, heads, dim = q.shape
    none = torch.empty(rows, 0, device=q.device)
    queries = IndexQueries(q.reshape(rows, heads * dim), heads, dim, (none, none), weights, False)
    step = _ALONE if fixed else max(1, _SCORES // (4 * max(most, _TILE)))
    return _some_at_a_time(queries, keys._replace(most=most), min(topk, most), step, rounded=True).long()


def _on_hopper(queries: IndexQueries, pool: Rows) -> bool:
    """Whether hopper.py can serve: packed keys of the released models' size, in pages that bulk copies can reach."""
    if INTERPRETED or not isinstance(pool, PackedRows) or not is_hopper(queries.heads.device):
        return False
    places = (part.data_ptr() | part.stride(0) for part in (pool.values, pool.scales))
    return (
        queries.dim == 128
        and queries.count <= 64
        and pool.shape[1] in (16, 32, 64, 128)
        and not any(p % 16 for p in places)
    )


def _for_hopper(pool: Rows) -> Any:
    """The module with the kernel of rows that may be of different sequences, for keys of this format."""
    assert isinstance(pool, PackedRows)
    return importlib.import_module(f"triptych.kernels.select_rows.{_MODULES[pool.format.kind]}")


def _gathered(queries: IndexQueries, keys: PagedEntries) -> Any:
    """Keys side by side where so many rows read them that it pays, as chunk.Gathered; else None."""
    assert keys.most is not None
    total = _whole_tiles(keys.most)
    few = len(queries.heads) <= _ALONE or total * len(keys.page_table) * 132 > _GATHERED
    if few or not _on_hopper(queries, keys.pool):
        return None
    return importlib.import_module("triptych.kernels.select_rows.chunk").gathered(keys)


def _stretch(rows: int, total: int, programs: int) -> int:
    """Keys of a program where `programs` run at once: as many as keep all of them busy, once if that is not too long.

    Shorter ones even out rows of unequal lengths.
    """
    once = _whole_tiles(triton.cdiv(total, max(1, programs // rows)))
    return once if once <= 6144 or rows > _ALONE else 2048


def _whole_tiles(most: int) -> int:
    return int(triton.cdiv(max(most, 1), _TILE)) * _TILE


@triton.jit
def _round_even(x):
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _rounded_e2m1(x, HEADS: tl.constexpr, DIM: tl.constexpr):
    """x [HEADS, DIM] on the e2m1 grid, groups of 32: values divided by 2^(p_max - 6) and p_max [HEADS].

    2^p is a group's scale, p_max the largest of a row; so values are at most 6 * 2^6.
    """
    g = tl.reshape(x, [HEADS, DIM // 32, 32])
    bits = tl.max(tl.abs(g), 2).to(tl.int32, bitcast=True)
    power = (bits >> 23) - 129 + ((bits & 0x7FFFFF) > 0x400000).to(tl.int32)
    power = tl.maximum(power, -100)
    inverse = ((127 - power) << 23).to(tl.float32, bitcast=True)
    y = g * inverse[:, :, None]
    size = tl.abs(y)
    step = tl.where(size < 2.0, 0.5, tl.where(size < 4.0, 1.0, 2.0))
    fine = tl.where(size < 2.0, 2.0, tl.where(size < 4.0, 1.0, 0.5))
    y = _round_even(y * fine) * step
    most = tl.max(power, 1)
    shift = tl.maximum(power - most[:, None] + 6, -100)
    y = y * ((127 + shift) << 23).to(tl.float32, bitcast=True)[:, :, None]
    return tl.reshape(y, [HEADS, DIM]), most


@triton.jit
def _signs_of(i):
    """1 of the even i, -1 of the odd ones, in bfloat16, by their bits."""
    return (((i & 1) << 15) | 0x3F80).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _queries(
    q_ptr,
    cos_ptr,
    sin_ptr,
    h,
    heads,
    ROUNDS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROPE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Queries of a row [HEADS, DIM] in float32 and the power of two [HEADS] that they lack."""
    d = tl.arange(0, DIM)
    mine = (h < heads)[:, None] & (d < DIM)[None, :]
    here = q_ptr + h[:, None] * DIM
    x = tl.load(here + d[None, :], mask=mine, other=0.0).to(tl.float32)
    at = d - (DIM - ROPE)
    turns = at >= 0
    partner = tl.load(here + tl.where(turns, (DIM - ROPE) + (at ^ 1), d)[None, :], mask=mine, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + at // 2, mask=turns, other=1.0)[None, :]
    sin = tl.load(sin_ptr + at // 2, mask=turns, other=0.0)[None, :]
    x = x * cos + tl.where((at % 2 == 0)[None, :], -partner, partner) * sin
    power = tl.full([HEADS], 0, tl.int32)
    if ROUNDS:
        i = d[:, None] & d[None, :]
        i = i ^ (i >> 4)
        i = i ^ (i >> 2)
        i = i ^ (i >> 1)
        kind: tl.constexpr = tl.float32 if WIDE else tl.bfloat16
        signs = _signs_of(i).to(kind)
        x = tl.dot(x.to(tl.bfloat16).to(kind), signs, input_precision="ieee")
        x = (x * (DIM**-0.5)).to(tl.bfloat16).to(tl.float32)
        x, power = _rounded_e2m1(x, HEADS, DIM)
        power -= 6
    return x, power


@triton.jit
def _scores(
    q_ptr,
    q_row,
    cos_ptr,
    sin_ptr,
    weight_ptr,
    weight_row,
    pool_ptr,
    pool_page,
    pool_row,
    scales_ptr,
    scales_page,
    scales_row,
    table_ptr,
    table_row,
    seq_ptr,
    visible_ptr,
    out_ptr,
    tops_ptr,
    total,
    heads,
    stretch,
    KIND: tl.constexpr,
    ROUNDS: tl.constexpr,
    WIDE: tl.constexpr,
    PER_PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROPE: tl.constexpr,
    TILE: tl.constexpr,
):
    r = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0) * stretch
    visible = tl.load(visible_ptr + r).to(tl.int32)
    if begin >= visible:
        return
    h = tl.arange(0, HEADS)
    turn = r * (ROPE // 2)
    x, power = _queries(q_ptr + r * q_row, cos_ptr + turn, sin_ptr + turn, h, heads, ROUNDS, HEADS, DIM, ROPE, WIDE)
    weight = tl.load(weight_ptr + r * weight_row + h, mask=h < heads, other=0.0).to(tl.float32)
    weight = weight * ((127 + power) << 23).to(tl.float32, bitcast=True)
    eighth: tl.constexpr = (KIND != 0) and ROUNDS and not WIDE and cuda_capability_geq(8, 9)
    kind: tl.constexpr = tl.float32 if WIDE else tl.float8e4nv if eighth else tl.bfloat16
    q = x.to(kind)
    line = table_ptr + tl.load(seq_ptr + r).to(tl.int64) * table_row
    d = tl.arange(0, DIM)
    for at in range(begin, tl.minimum(begin + stretch, visible), TILE):
        g = at + tl.arange(0, TILE)
        seen = g < visible
        page = tl.load(line + g // PER_PAGE, mask=seen, other=0).to(tl.int64)
        row = g % PER_PAGE
        place = pool_ptr + page * pool_page + row * pool_row
        scales = scales_ptr + page * scales_page + row * scales_row
        factor = tl.full([TILE], 1.0, tl.float32)
        if KIND == 1:
            place = tl.multiple_of(place, 16)
            k = tl.load(place[:, None] + d[None, :], mask=seen[:, None], other=0)
            if eighth:  # noqa: SIM108  (resolved by the compiler)
                k = k.to(tl.float8e4nv, bitcast=True)
            else:
                k = e4m3_values(k).to(kind)
            scales = tl.multiple_of(scales, 4)
            factor = tl.load(scales.to(tl.pointer_type(tl.float32), bitcast=True), mask=seen, other=0.0)
        elif KIND == 2:
            half = tl.arange(0, DIM // 2)
            pairs = tl.load(tl.multiple_of(place, 16)[:, None] + half[None, :], mask=seen[:, None], other=0)
            word = tl.load(tl.multiple_of(scales, 4).to(tl.pointer_type(tl.int32), bitcast=True), mask=seen, other=0)
            n = tl.arange(0, DIM // 32) * 8
            codes = (word[:, None] >> n[None, :]) & 255
            most = tl.max(codes, 1)
            factor = (tl.maximum(most - 6, 1) << 23).to(tl.float32, bitcast=True)
            relative = ((tl.maximum(codes - most[:, None], -100) + 133) << 23).to(tl.float32, bitcast=True)
            both = tl.reshape(tl.join(pairs & 15, pairs >> 4), [TILE, DIM]).to(tl.int32)
            # the bits of a magnitude, at the top of float32's mantissa and the foot of its exponent, lack 2^126
            size = (((both & 7) << 22) | ((both & 8) << 28)).to(tl.float32, bitcast=True) * 8.507059173023462e37
            k = tl.reshape(size, [TILE, DIM // 32, 32]) * relative[:, :, None]
            k = tl.reshape(k, [TILE, DIM]).to(kind)
        else:
            k = tl.load(place[:, None] + d[None, :], mask=seen[:, None], other=0.0).to(kind)
        s = tl.dot(k, tl.trans(q), input_precision="tf32x3") if WIDE else tl.dot(k, tl.trans(q))
        s = tl.sum(tl.maximum(s, 0.0) * weight[None, :], 1) * factor
        bits = tl.where(s == 0.0, 0.0, s).to(tl.int32, bitcast=True)
        order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        order = tl.where(seen, order, -2147483648)
        tl.store(out_ptr + r * total + g, order)
        top = tl.max(tl.reshape(order, [TILE // 8, 8]), 1)
        tl.store(tops_ptr + r * (total // 8) + at // 8 + tl.arange(0, TILE // 8), top)
