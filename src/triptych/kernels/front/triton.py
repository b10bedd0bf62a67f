"""The front end of decode rows in one launch: programs over (row, job).

    job 0   norm of the low-rank query, which of a single row its product does (linear/latent.py) while this launch
            runs; the weights of the indexer's heads
    job 1   window row: norm, rotation, rounding, into the slot's ring
    job 2   compressor row into its ring; if the row completes a group: pooling, norm, rotation, entry into the page. In
            an HCA layer, where 128 rows are pooled, several programs with some channels each; the last does the rest
    last    the same for the indexer's compressor and its key

Everything a job needs of the step it computes from position, slot and page table; no job waits for another. The row
that a ring is about to get is read from the product, the others from the ring, so reading and writing never meet: a
ring holds no position of the group twice.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from triptych.config import PAGE
from triptych.kernels.compress.ref import Compressor
from triptych.kernels.front.ref import Angles, DecodeRows, FrontCaches, FrontWeights
from triptych.kernels.front.store import DENSE, ENTRY, FP8, MXFP4, put_entry, put_key
from triptych.kernels.gpu import is_hopper, rounds_rows
from triptych.kernels.quant.formats import PackedRows, Rows
from triptych.kernels.quant.matrices import Fp8Rows, Unnormed, empty_rows
from triptych.kernels.quant.triton_rows import put_rounded

_KINDS = {"entry": ENTRY, "fp8": FP8, "mxfp4": MXFP4}
_Place = tuple[Tensor, Tensor, int, int, int, int]


def step_rows(positions: Tensor, main: Tensor, compress: Tensor, ratios: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """See ref.step_rows; for one or two ratios."""
    rows, pairs = len(positions), len(main)
    angles = torch.empty(2 + len(ratios), 2, rows, pairs, device=positions.device)
    visible = torch.empty(len(ratios), rows, dtype=torch.int64, device=positions.device)
    _step[(rows, 2 + len(ratios))](
        *(positions, main, compress, angles, visible, rows, pairs, ratios[0], ratios[-1]),
        PAIRS=triton.next_power_of_2(pairs),
        num_warps=1,
    )
    return angles, visible


def front_rows(
    front: Tensor,
    weights: FrontWeights,
    caches: FrontCaches,
    rows: DecodeRows,
    angles: tuple[Angles, Angles | None],
) -> tuple[Tensor | Fp8Rows | Unnormed, Tensor]:
    """See ref.front_rows."""
    count, q_lora, dim = len(front), len(weights.q_norm), len(weights.kv_norm)
    heads = weights.heads[1] - weights.heads[0]
    qr = _room_for_query(count, weights, front)
    scaled = torch.empty(count, heads, device=front.device)
    cos, sin = angles[0]
    late = angles[1] or angles[0]
    main, index = weights.compressor, weights.index_compressor
    ring = _place(caches.window, caches.window_stride)
    entries = ring if caches.entries is None else _place(caches.entries)
    keys = entries if caches.index_keys is None else _place(caches.index_keys)
    key_dim = 1 if index is None else len(index.norm)
    wide = max(64, triton.next_power_of_2(dim))
    parts = max(1, wide // _PART) if main is not None and not main.overlap else 1
    pooled = torch.empty(count if parts > 1 else 1, wide, device=front.device)
    _front[(count, 2 + (parts if main is not None else 0) + (index is not None))](
        *(front, front.stride(0), *_parts(qr), scaled, weights.q_norm, weights.kv_norm, cos, sin, late[0], late[1]),
        *(rows.positions, rows.slots, rows.page_table, rows.page_table.stride(0)),
        *(*ring, caches.ring, *entries, *keys),
        *_compressor(main, caches.state, weights.kv_norm),
        *_compressor(index, caches.index_state, weights.kv_norm),
        *(caches.state_stride, pooled, _meeting_points(front.device)),
        *(weights.compress_at, weights.index_at, weights.heads[0], heads, weights.scale, q_lora),
        *(dim, key_dim, 2 * cos.shape[1], weights.eps),
        RING_KIND=_kind(caches.window),
        ENTRY_KIND=_kind(caches.entries),
        KEY_KIND=_kind(caches.index_keys),
        RATIO=1 if main is None else len(main.ape),
        OVERLAP=main is not None and main.overlap,
        PAGE_TOKENS=PAGE,
        NATIVE=weights.native,
        ROUNDS=isinstance(qr, Fp8Rows),
        LEAVES=isinstance(qr, Unnormed),
        QUERY=triton.next_power_of_2(q_lora),
        HEADS=triton.next_power_of_2(max(heads, 1)),
        DIM=wide,
        PARTS=parts,
        KEY=triton.next_power_of_2(key_dim),
        KEY_STEPS=int(math.log2(triton.next_power_of_2(key_dim))),
        KEY_ROOT=math.sqrt(key_dim),
        num_warps=4 if main is None or main.overlap else 8,
    )
    return qr, scaled


_PART = 64  # channels of a group of 128 rows that one program pools
_MOST_ROWS = 4096


@cache
def _meeting_points(device: torch.device) -> Tensor:
    """How many programs of a row have pooled their part; zero between launches, which never overlap."""
    return torch.zeros(_MOST_ROWS, dtype=torch.int32, device=device)


def _room_for_query(rows: int, weights: FrontWeights, front: Tensor) -> Tensor | Fp8Rows | Unnormed:
    """Where the low-rank query goes, or a single row as it is: its product norms it."""
    width = len(weights.q_norm)
    if weights.rounds and rounds_rows(front.device, width):
        if rows == 1 and is_hopper(front.device):
            return Unnormed(front[:, :width], weights.q_norm, weights.eps)
        return empty_rows(rows, width, front.device)
    return torch.empty(rows, width, dtype=torch.bfloat16 if weights.native else front.dtype, device=front.device)


def _parts(query: Tensor | Fp8Rows | Unnormed) -> tuple[Tensor, Tensor]:
    """Values and scales; there are none of rows that are not rounded."""
    if isinstance(query, Unnormed):
        return query.norm, query.norm
    return (query.values, query.scales) if isinstance(query, Fp8Rows) else (query, query)


def _kind(pool: Rows | None) -> int:
    return _KINDS[pool.format.kind] if isinstance(pool, PackedRows) else DENSE


def _place(pool: Rows, stretch: int | None = None) -> _Place:
    """Values, scales, strides of values by page and row, of scales by page and row. `stretch`: a flat dense pool."""
    if isinstance(pool, PackedRows):
        values, scales = pool.values, pool.scales
        return values, scales, values.stride(0), values.stride(1), scales.stride(0), scales.stride(1)
    if stretch is not None:
        return pool, pool, stretch * pool.stride(0), pool.stride(0), 0, 0
    return pool, pool, pool.stride(0), pool.stride(1), 0, 0


def _compressor(weights: Compressor | None, state: Tensor | None, nothing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if weights is None or state is None:
        return nothing, nothing, nothing
    return weights.ape, weights.norm, state


@triton.jit
def _step(positions_ptr, main_ptr, compress_ptr, angles_ptr, visible_ptr, rows, pairs, one, other, PAIRS: tl.constexpr):
    r = tl.program_id(0)
    kind = tl.program_id(1)
    i = tl.arange(0, PAIRS)
    position = tl.load(positions_ptr + r)
    if kind >= 2:
        ratio = tl.where(kind == 2, one, other)
        tl.store(visible_ptr + (kind - 2) * rows + r, (position + 1) // ratio)
        position -= position % ratio
    turn = tl.load(main_ptr + i, mask=i < pairs, other=0.0)
    if kind > 0:
        turn = tl.load(compress_ptr + i, mask=i < pairs, other=0.0)
    turn = position.to(tl.float32) * turn
    at = angles_ptr + (kind * 2 * rows + r) * pairs + i
    tl.store(at, tl.cos(turn), mask=i < pairs)
    tl.store(at + rows * pairs, tl.sin(turn), mask=i < pairs)


@triton.jit
def _rotated(x, cos_ptr, sin_ptr, dim, width, DIM: tl.constexpr):
    """x [DIM] with the last `width` of its `dim` values rotated; pair i is dims (2i, 2i+1) of them."""
    even, odd = tl.split(tl.reshape(x, [DIM // 2, 2]))
    pair = tl.arange(0, DIM // 2) - (dim - width) // 2
    turns = (pair >= 0) & (pair < width // 2)
    cos = tl.load(cos_ptr + pair, mask=turns, other=1.0)
    sin = tl.load(sin_ptr + pair, mask=turns, other=0.0)
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [DIM])


@triton.jit
def _normed(x, d, dim, norm_ptr, eps):
    return x * tl.rsqrt(tl.sum(x * x, 0) / dim + eps) * tl.load(norm_ptr + d, mask=d < dim, other=0.0)


@triton.jit
def _narrowed(at, mask, NATIVE: tl.constexpr):
    """float32 values of the product, rounded to bf16 first where the released model's linear does it."""
    x = tl.load(at, mask=mask, other=0.0)
    if NATIVE:
        x = x.to(tl.bfloat16)
    return x.to(tl.float32)


@triton.jit
def _pooled(
    here,
    ring_ptr,
    ape_ptr,
    position,
    d,
    dim,
    half,
    RATIO: tl.constexpr,
    OVERLAP: tl.constexpr,
    DIM: tl.constexpr,
):
    """softmax(Z) . C of the group that ends at `position` [DIM]; row i of REACH is position + 1 - REACH + i."""
    REACH: tl.constexpr = 2 * RATIO if OVERLAP else RATIO
    TILE: tl.constexpr = 8 if REACH >= 8 else REACH
    peak = tl.full([DIM], float("-inf"), tl.float32)
    weight = tl.zeros([DIM], tl.float32)
    total = tl.zeros([DIM], tl.float32)
    for first in range(0, REACH, TILE):
        i = first + tl.arange(0, TILE)
        at = position + 1 - REACH + i
        column = d[None, :]
        if OVERLAP:  # the A halves of the group before, the B halves of this one
            column = column + tl.where(i < RATIO, 0, dim)[:, None]
        kept = ((at >= 0) & (i < REACH - 1))[:, None] & (d < dim)[None, :]
        row = ring_ptr + (at % REACH)[:, None] * (2 * half) + column
        value = tl.load(row, mask=kept, other=0.0)
        gate = tl.load(row + half, mask=kept, other=float("-inf"))
        mine = (i == REACH - 1)[:, None] & (d < dim)[None, :]
        value += tl.load(here + column, mask=mine, other=0.0).to(tl.float32)
        fresh = tl.load(here + half + column, mask=mine, other=0.0).to(tl.float32)
        fresh += tl.load(ape_ptr + (RATIO - 1) * half + column, mask=mine, other=0.0)
        gate = tl.where(mine, fresh, gate)
        highest = tl.maximum(peak, tl.max(gate, 0))
        safe = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp(gate - safe[None, :])
        shrink = tl.exp(peak - safe)
        weight = weight * shrink + tl.sum(p, 0)
        total = total * shrink + tl.sum(p * value, 0)
        peak = highest
    return tl.where(d < dim, total / tl.where(d < dim, weight, 1.0), 0.0)


@triton.jit
def _keep(here, ring_ptr, ape_ptr, position, d, half, RATIO: tl.constexpr, OVERLAP: tl.constexpr):
    """Columns d of the row [C | Z + ape] of `position` into its place in the ring."""
    REACH: tl.constexpr = 2 * RATIO if OVERLAP else RATIO
    to = ring_ptr + (position % REACH) * (2 * half) + d
    tl.store(to, tl.load(here + d, mask=d < half, other=0.0).to(tl.float32), mask=d < half)
    gate = tl.load(here + half + d, mask=d < half, other=0.0).to(tl.float32)
    gate += tl.load(ape_ptr + (position % RATIO) * half + d, mask=d < half, other=0.0)
    tl.store(to + half, gate, mask=d < half)


@triton.jit
def _pooled_part(here, ring_ptr, ape_ptr, position, d, dim, RATIO: tl.constexpr):
    """As `_pooled`, of a long group without overlap and for few channels d: all rows at once."""
    i = tl.arange(0, RATIO)
    at = position + 1 - RATIO + i
    kept = (i < RATIO - 1)[:, None] & (d < dim)[None, :]
    row = ring_ptr + (at % RATIO)[:, None] * (2 * dim) + d[None, :]
    value = tl.load(row, mask=kept, other=0.0)
    gate = tl.load(row + dim, mask=kept, other=float("-inf"))
    mine = tl.load(here + d, mask=d < dim, other=0.0).to(tl.float32)
    fresh = tl.load(here + dim + d, mask=d < dim, other=0.0).to(tl.float32)
    fresh += tl.load(ape_ptr + (RATIO - 1) * dim + d, mask=d < dim, other=0.0)
    peak = tl.maximum(tl.max(gate, 0), fresh)
    p = tl.exp(gate - peak[None, :])
    last = tl.exp(fresh - peak)
    return (tl.sum(p * value, 0) + last * mine) / (tl.sum(p, 0) + last)


@triton.jit
def _group(
    here, ring_ptr, ape_ptr, pooled_ptr, met_ptr, position, part, dim, half,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, PARTS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Keeps a compressor row. Returns whether this program is to finish the row's group, and it pooled [DIM]."""
    done = (position + 1) % RATIO == 0
    x = tl.zeros([DIM], tl.float32)
    d = tl.arange(0, DIM)
    if PARTS == 1:
        if done:
            x = _pooled(here, ring_ptr, ape_ptr, position, d, dim, half, RATIO, OVERLAP, DIM)
        _keep(here, ring_ptr, ape_ptr, position, tl.arange(0, 2 * DIM if OVERLAP else DIM), half, RATIO, OVERLAP)
    else:
        some = part * (DIM // PARTS) + tl.arange(0, DIM // PARTS)
        if done:
            tl.store(pooled_ptr + some, _pooled_part(here, ring_ptr, ape_ptr, position, some, dim, RATIO))
            tl.debug_barrier()  # all threads have stored before one says so
            done = tl.atomic_add(met_ptr, 1, sem="acq_rel") == PARTS - 1
            tl.debug_barrier()
        _keep(here, ring_ptr, ape_ptr, position, some, half, RATIO, OVERLAP)
        if done:
            tl.store(met_ptr, 0)
            x = tl.load(pooled_ptr + d, mask=d < dim, other=0.0, cache_modifier=".cg")
    return done, x


@triton.jit
def _query(
    front_ptr, qr_ptr, qr_scales_ptr, norm_ptr, r, q_lora, eps,
    NATIVE: tl.constexpr, ROUNDS: tl.constexpr, LEAVES: tl.constexpr, QUERY: tl.constexpr,
):  # fmt: skip
    """The low-rank query of row r, normed and as its product reads it, if that does not do it."""
    if not LEAVES:
        i = tl.arange(0, QUERY)
        x = _narrowed(front_ptr + i, i < q_lora, NATIVE)
        x = _normed(x, i, q_lora, norm_ptr, eps)
        if ROUNDS:
            put_rounded(x.to(tl.bfloat16), r, q_lora, qr_ptr, qr_scales_ptr, QUERY)
        else:
            tl.store(qr_ptr + r * q_lora + i, x.to(qr_ptr.dtype.element_ty), mask=i < q_lora)


@triton.jit
def _head_weights(front_ptr, scaled_ptr, heads, scale, NATIVE: tl.constexpr, HEADS: tl.constexpr):
    """A row's weights of the indexer's heads."""
    h = tl.arange(0, HEADS)
    tl.store(scaled_ptr + h, _narrowed(front_ptr + h, h < heads, NATIVE) * scale, mask=h < heads)


@triton.jit
def _let_go(LEAVES: tl.constexpr):
    """Lets the query's product begin, which waits for the end of this launch before it stores."""
    if LEAVES:
        gdc_launch_dependents()


@triton.jit(do_not_specialize=["table_stride"])
def _front(
    front_ptr, front_stride, qr_ptr, qr_scales_ptr, scaled_ptr, q_norm_ptr, kv_norm_ptr, cos_ptr, sin_ptr,
    late_cos_ptr, late_sin_ptr, positions_ptr, slots_ptr, table_ptr, table_stride,
    ring_ptr, ring_scales_ptr, ring_slot, ring_row, ring_scales_slot, ring_scales_row, ring, entries_ptr,
    entry_scales_ptr, entry_page, entry_row, entry_scales_page, entry_scales_row, keys_ptr, key_scales_ptr, key_page,
    key_row, key_scales_page, key_scales_row, ape_ptr, norm_ptr, state_ptr, key_ape_ptr, key_norm_ptr, key_state_ptr,
    state_stride, pooled_ptr, met_ptr, compress_at, index_at, heads_at, heads, scale, q_lora, dim, key_dim, width, eps,
    RING_KIND: tl.constexpr, ENTRY_KIND: tl.constexpr, KEY_KIND: tl.constexpr, RATIO: tl.constexpr,
    OVERLAP: tl.constexpr, PAGE_TOKENS: tl.constexpr, NATIVE: tl.constexpr, ROUNDS: tl.constexpr, LEAVES: tl.constexpr,
    QUERY: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, PARTS: tl.constexpr, KEY: tl.constexpr,
    KEY_STEPS: tl.constexpr, KEY_ROOT: tl.constexpr,
):  # fmt: skip
    _let_go(LEAVES)
    r = tl.program_id(0).to(tl.int64)
    job = tl.program_id(1)
    front_ptr += r * front_stride
    position = tl.load(positions_ptr + r)
    slot = tl.load(slots_ptr + r).to(tl.int64)
    pairs = width // 2
    group = position // RATIO
    per_page: tl.constexpr = PAGE_TOKENS // RATIO
    half = dim * (2 if OVERLAP else 1)
    if job == 0:
        _query(front_ptr, qr_ptr, qr_scales_ptr, q_norm_ptr, r, q_lora, eps, NATIVE, ROUNDS, LEAVES, QUERY)
        _head_weights(front_ptr + heads_at, scaled_ptr + r * heads, heads, scale, NATIVE, HEADS)
    elif job == 1:
        d = tl.arange(0, DIM)
        x = _normed(_narrowed(front_ptr + q_lora + d, d < dim, NATIVE), d, dim, kv_norm_ptr, eps)
        x = _rotated(x, cos_ptr + r * pairs, sin_ptr + r * pairs, dim, width, DIM)
        values = ring_ptr + slot * ring_slot + (position % ring) * ring_row
        scales = ring_scales_ptr + slot * ring_scales_slot + (position % ring) * ring_scales_row
        put_entry(x, d, dim, width, values, scales, RING_KIND, NATIVE, DIM)
    elif job - 2 < PARTS:
        if RATIO > 1:
            here, state = front_ptr + compress_at, state_ptr + slot * state_stride * (2 * half)
            last, x = _group(
                here, state, ape_ptr, pooled_ptr + r * DIM, met_ptr + r, position, job - 2, dim, half,
                RATIO, OVERLAP, PARTS, DIM,
            )  # fmt: skip
            if last:
                d = tl.arange(0, DIM)
                x = _normed(x, d, dim, norm_ptr, eps)
                x = _rotated(x, late_cos_ptr + r * pairs, late_sin_ptr + r * pairs, dim, width, DIM)
                page = tl.load(table_ptr + r * table_stride + group // per_page).to(tl.int64)
                values = entries_ptr + page * entry_page + (group % per_page) * entry_row
                scales = entry_scales_ptr + page * entry_scales_page + (group % per_page) * entry_scales_row
                put_entry(x, d, dim, width, values, scales, ENTRY_KIND, NATIVE, DIM)
    else:
        if KEY > 1:
            here, state = front_ptr + index_at, key_state_ptr + slot * state_stride * (4 * key_dim)
            if (position + 1) % RATIO == 0:
                d = tl.arange(0, KEY)
                x = _pooled(here, state, key_ape_ptr, position, d, key_dim, 2 * key_dim, RATIO, OVERLAP, KEY)
                x = _normed(x, d, key_dim, key_norm_ptr, eps)
                x = _rotated(x, late_cos_ptr + r * pairs, late_sin_ptr + r * pairs, key_dim, width, KEY)
                page = tl.load(table_ptr + r * table_stride + group // per_page).to(tl.int64)
                values = keys_ptr + page * key_page + (group % per_page) * key_row
                scales = key_scales_ptr + page * key_scales_page + (group % per_page) * key_scales_row
                put_key(x, d, values, scales, KEY_KIND, NATIVE, KEY, KEY_STEPS, KEY_ROOT)
            _keep(here, state, key_ape_ptr, position, tl.arange(0, 2 * KEY), 2 * key_dim, RATIO, OVERLAP)
