"""Random inputs for each operation, shaped as a real step would make them: several sequences at odd positions.

A maker takes the number of rows and a generator and returns the operation's arguments. Memory that no row may read
is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from triptych.config import PAGE, WINDOW
from triptych.kernels.attend.ref import Attention, WindowRows
from triptych.kernels.attend_rows.ref import Queries, RingRows
from triptych.kernels.compress.ref import ABSENT, Compressor, CompressPlan
from triptych.kernels.front.ref import DecodeRows, FrontCaches, FrontWeights
from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.mhc.ref import MhcHead, MhcSite, Residual
from triptych.kernels.moe.ref import Experts, Router
from triptych.kernels.quant.matrices import Fp8Matrix, FrontMatrix
from triptych.kernels.select_rows.ref import IndexQueries
from triptych.kernels.window.ref import WindowPlan

D, HEADS, DIM, ROPE, LORA = 48, 3, 40, 8, 24  # sizes that are no power of two
EXPERTS, HIDDEN, VOCAB = 7, 20, 31
SEQUENCES, PAGES = 3, 11
SNAPSHOT_FRAMES = 6  # two layers of 128 rows, 50 in each frame


WRITES = {"keep_window": (1, 2), "compress": (2,), "front_rows": (2,), "likeliest": (2, 3)}
"""Positions of the arguments that an operation is there to change."""


def _randn(g: Generator, *size: int) -> Tensor:
    return torch.randn(*size, generator=g)


def _angles(rows: int, g: Generator) -> tuple[Tensor, Tensor]:
    angle = _randn(g, rows, ROPE // 2) * 3
    return angle.cos(), angle.sin()


def _site(g: Generator) -> MhcSite:
    return MhcSite(_randn(g, 24, 4 * D), _randn(g, 24), _randn(g, 3), 20, 1e-6, 1e-6)


def _mhc_pre(rows: int, g: Generator) -> tuple[Any, ...]:
    return _randn(g, rows, 4, D) * 3, _site(g), _randn(g, D)


def _mhc_post(rows: int, g: Generator) -> tuple[Any, ...]:
    return _randn(g, rows, D), _randn(g, rows, 4, D), _randn(g, rows, 4), _randn(g, rows, 4, 4)


def _mhc_head(rows: int, g: Generator) -> tuple[Any, ...]:
    return _randn(g, rows, 4, D), _mhc_head_weights(g)


def _mhc_head_weights(g: Generator) -> MhcHead:
    return MhcHead(_randn(g, 4, 4 * D), _randn(g, 4), _randn(g, 1), 1e-6, 1e-6)


def _residual(rows: int, g: Generator) -> Residual:
    return Residual(_randn(g, rows, 4, D), _randn(g, rows, 4), _randn(g, rows, 4, 4))


def _mhc_rows(rows: int, g: Generator) -> tuple[Any, ...]:
    return _randn(g, rows, D), _residual(rows, g), _site(g), _randn(g, D)


def _mhc_first(rows: int, g: Generator) -> tuple[Any, ...]:
    return torch.randint(0, VOCAB, (rows,), generator=g), _randn(g, VOCAB, D), _site(g), _randn(g, D)


def _mhc_last(rows: int, g: Generator) -> tuple[Any, ...]:
    return _randn(g, rows, D), _residual(rows, g), _mhc_head_weights(g), _randn(g, D)


def _rms_norm(rows: int, g: Generator) -> tuple[Any, ...]:
    return _randn(g, rows, D), _randn(g, D), 1e-6


def _latent_rows(rows: int, g: Generator) -> tuple[Any, ...]:
    return _randn(g, rows, LORA + DIM + 9), LORA, (_randn(g, LORA), _randn(g, DIM)), _angles(rows, g), 1e-6


def _query_rows(rows: int, g: Generator) -> tuple[Any, ...]:
    return _randn(g, rows, HEADS * DIM + 5), HEADS, DIM, _angles(rows, g), 1e-6


def _index_query_rows(rows: int, g: Generator) -> tuple[Any, ...]:
    return _randn(g, rows, HEADS * DIM + 5), HEADS, DIM, _angles(rows, g)


def _index_round(rows: int, g: Generator) -> tuple[Any, ...]:
    return (_randn(g, rows, HEADS, 64).to(torch.bfloat16).float(),)


def _derotate(rows: int, g: Generator) -> tuple[Any, ...]:
    return _randn(g, rows, HEADS, DIM), _angles(rows, g)


def _window_plan(rows: int, g: Generator) -> WindowPlan:
    past = 5
    order = torch.randperm(rows + past, generator=g)
    places = torch.randperm(2 * rows + past, generator=g)
    return WindowPlan(
        total=rows + past,
        past_src=torch.randperm(2 * rows + past, generator=g)[:past],
        past_dst=order[:past],
        step_dst=order[past:],
        first=torch.zeros(rows, dtype=torch.int64),
        count=torch.ones(rows, dtype=torch.int64),
        keep_src=torch.randperm(rows, generator=g)[: rows // 2 + 1],
        keep_dst=places[: rows // 2 + 1],
        snap_src=torch.arange(past),
        snap_row=torch.randperm(WINDOW, generator=g)[:past],
        snap_of=torch.arange(past) % 2,
        snap_table=torch.randperm(2 * SNAPSHOT_FRAMES, generator=g).view(2, SNAPSHOT_FRAMES),
    )


def _window_rows(rows: int, g: Generator) -> tuple[Any, ...]:
    return _randn(g, rows, DIM), _randn(g, 2 * rows + 5, DIM), _window_plan(rows, g)


def _keep_window(rows: int, g: Generator) -> tuple[Any, ...]:
    """Layer 1 of a model whose snapshots take several frames of 50 rows."""
    frames = _randn(g, 2 * SNAPSHOT_FRAMES, 50 * DIM + 3)[:, : 50 * DIM].unflatten(1, (50, DIM))
    return _randn(g, rows + 5, DIM), _randn(g, 2 * rows + 5, DIM), frames, 1, _window_plan(rows, g)


def _compress(rows: int, g: Generator) -> tuple[Any, ...]:
    """CSA: entry 0 without A rows, the others from the step and from the ring."""
    groups, ring = rows // 4 + 1, 16
    src = torch.randint(-ring, rows, (groups, 8), generator=g)
    src[0, :4] = ABSENT
    steps = torch.arange(rows)
    keep = torch.randperm(rows, generator=g)[:8]
    plan = CompressPlan(src, steps[:0], steps[:0], steps % 4, keep, torch.randperm(ring, generator=g)[: len(keep)])
    # step rows carry the phase of the place they are pooled in, as real plans do
    phase = torch.randint(0, 4, (rows,), generator=g)
    src[:, :8] = torch.where(src >= 0, _row_of_phase(phase, src, g), src)
    weights = Compressor(_randn(g, 4, 2 * DIM), _randn(g, DIM), True, 1e-6)
    front = _randn(g, rows, 4 * DIM + 11)
    return front, 7, _randn(g, ring, 4 * DIM), plan._replace(src=src, phase=phase), weights, _angles(groups, g)


def _step_rows(rows: int, g: Generator) -> tuple[Any, ...]:
    return (
        torch.randint(0, 1 << 20, (rows,), generator=g),
        torch.rand(12, generator=g),
        torch.rand(12, generator=g),
        (4, 128),
    )


def _front_rows(rows: int, g: Generator, native: bool = False) -> tuple[Any, ...]:
    """A CSA layer, an HCA layer or one with neither, by the number of rows; every third row completes a group."""
    ratio = (4, 128, 0)[rows % 3]
    at, key = LORA + DIM, 32
    main = (
        None
        if not ratio
        else Compressor(_randn(g, ratio, DIM * (2 if ratio == 4 else 1)), _randn(g, DIM), ratio == 4, 1e-6)
    )
    index = Compressor(_randn(g, 4, 2 * key), _randn(g, key), True, 1e-6) if ratio == 4 else None
    wide = {4: 4 * DIM, 128: 2 * DIM, 0: 0}[ratio]
    front = _randn(g, rows, at + wide + 4 * key + HEADS)
    weights = FrontWeights(
        *(_randn(g, LORA), _randn(g, DIM), main, index, at, at + wide),
        *((at + wide + 4 * key, at + wide + 4 * key + HEADS), 0.3, 1e-6, native),
    )
    slots, reach = rows + 2, {4: 8, 128: 128, 0: 0}[ratio]
    state = _randn(g, 3 * slots * reach, wide)[reach:] if ratio else None
    caches = FrontCaches(
        *(_randn(g, 2 * slots * 130, DIM)[130:], 2 * 130, 130),
        _randn(g, 6 * rows, PAGE // ratio, DIM) if ratio else None,
        _randn(g, 6 * rows, PAGE // 4, key) if index else None,
        state,
        _randn(g, 3 * slots * reach, 4 * key)[reach:] if index else None,
        3 * reach,
    )
    positions = torch.randint(0, 5 * PAGE, (rows,), generator=g)
    positions[::3] = positions[::3] // max(ratio, 1) * ratio + max(ratio, 1) - 1
    table = torch.randperm(6 * rows, generator=g).view(rows, 6)
    where = DecodeRows(positions, torch.randperm(slots - 1, generator=g)[:rows], table)
    return front, weights, caches, where, (_angles(rows, g), _angles(rows, g) if ratio else None)


def _row_of_phase(phase: Tensor, src: Tensor, g: Generator) -> Tensor:
    """For each place k of each entry some step row whose phase is k mod 4, or a ring row if there is none."""
    out = torch.empty_like(src)
    for k in range(src.shape[1]):
        rows = torch.nonzero(phase == k % 4).flatten()
        pick = torch.randint(0, max(len(rows), 1), (src.shape[0],), generator=g)
        out[:, k] = rows[pick] if len(rows) else -1 - pick
    return out


def _entries(rows: int, g: Generator, dim: int, per_page: int) -> PagedEntries:
    """Entries behind page tables; pages and offsets that no row may see are NaN."""
    wide = torch.full((PAGES * SEQUENCES, per_page * dim + 13), float("nan"))
    table = torch.randperm(PAGES * SEQUENCES, generator=g).view(SEQUENCES, PAGES)
    seq = torch.sort(torch.randint(0, SEQUENCES, (rows,), generator=g)).values
    visible = torch.zeros(rows, dtype=torch.int64)
    for s in range(SEQUENCES):
        mine = seq == s
        visible[mine] = torch.sort(torch.randint(0, PAGES * per_page, (int(mine.sum()),), generator=g)).values
    pool = wide[:, 13:].unflatten(1, (per_page, dim))
    for s in range(SEQUENCES):
        most = int(visible[seq == s].max()) if bool((seq == s).any()) else 0
        for at in range(most):
            pool[table[s, at // per_page], at % per_page] = _randn(g, dim)
    return PagedEntries(pool, table, seq, visible)


def _select_entries(rows: int, g: Generator) -> tuple[Any, ...]:
    entries = _entries(rows, g, DIM, per_page=32)
    if int(entries.visible.max()) == 0:
        entries = entries._replace(visible=entries.visible.clone().fill_(0))
    return _randn(g, rows, HEADS, DIM), _randn(g, rows, HEADS), entries, 6


def _attend(rows: int, g: Generator) -> tuple[Any, ...]:
    entries = _entries(rows, g, DIM, per_page=4)
    first, count, total = _window_of(entries.seq, g)
    window = WindowRows(_randn(g, total, DIM), first, count)
    steps = torch.arange(6)
    selected = torch.where(steps < entries.visible.unsqueeze(1), steps * 1, -1)
    return _randn(g, rows, HEADS, DIM), window, entries, selected, Attention(_randn(g, HEADS), DIM**-0.5)


def _attend_rows(rows: int, g: Generator) -> tuple[Any, ...]:
    """Rows of CSA, HCA or SWA kind, by the number of rows; one of them is new and sees its own window row only."""
    size, slots, heads = 130, rows + 1, HEADS
    positions = torch.randint(0, PAGES * 16, (rows,), generator=g)
    positions[0] = 0
    lowest = (positions - torch.randint(0, 140, (rows,), generator=g)).clamp(min=0)
    ring = _randn(g, 2 * slots * size, DIM)[size:]
    window = RingRows(ring, 2 * size, size, positions, torch.randperm(slots, generator=g)[:rows], lowest)
    queries = Queries(_randn(g, rows, heads * DIM + 7), heads, DIM, _angles(rows, g), 1e-6)
    core = Attention(_randn(g, heads), DIM**-0.5)
    if rows % 3 == 0:
        return queries, window, None, None, core
    entries = _row_entries(positions, g, DIM, per_page=4)
    ids = torch.where(torch.arange(6) < entries.visible.unsqueeze(1), torch.arange(6), -1).to(torch.int32)
    return queries, window, entries, ids if rows % 3 == 1 else None, core


def _attend_heads(rows: int, g: Generator) -> tuple[Any, ...]:
    """As `_attend`, of raw queries."""
    _, window, entries, ids, core = _attend(rows, g)
    queries = Queries(_randn(g, rows, HEADS * DIM + 7), HEADS, DIM, _angles(rows, g), 1e-6)
    entries = entries._replace(most=int(entries.visible.max()))
    return queries, window, entries, ids if rows % 3 else None, core


def _row_entries(positions: Tensor, g: Generator, dim: int, per_page: int) -> PagedEntries:
    """Entries of decode rows: each row is its own sequence and sees one entry for each four positions."""
    rows = len(positions)
    pool, table = _randn(g, rows * PAGES, per_page, dim), torch.randperm(rows * PAGES, generator=g).view(rows, PAGES)
    visible = ((positions + 1) // 4).clamp(max=PAGES * per_page)
    return PagedEntries(pool, table.to(torch.int32), torch.arange(rows), visible, PAGES * per_page)


def _select_rows(rows: int, g: Generator) -> tuple[Any, ...]:
    heads, dim = 4, 32
    queries = IndexQueries(
        *(_randn(g, rows, heads * dim + 5), heads, dim, _angles(rows, g), _randn(g, rows, heads), False)
    )
    positions = torch.randint(0, PAGES * PAGE, (rows,), generator=g)
    return queries, _row_entries(positions, g, dim, per_page=32), 24


def _window_of(seq: Tensor, g: Generator) -> tuple[Tensor, Tensor, int]:
    """first, count and the number of window rows for rows of sequences that start at random positions."""
    first, count, base = torch.zeros_like(seq), torch.zeros_like(seq), 0
    for s in range(SEQUENCES):
        mine = torch.nonzero(seq == s).flatten()
        past = int(torch.randint(0, 140, (1,), generator=g))
        ends = past + 1 + torch.arange(len(mine))
        count[mine] = ends.clamp(max=128)
        first[mine] = base + ends - count[mine]
        base += past + len(mine)
    return first, count, base


def _router(g: Generator, hashed: bool) -> Router:
    table = torch.stack([torch.randperm(EXPERTS, generator=g)[:2] for _ in range(VOCAB)]) if hashed else None
    return Router(_randn(g, EXPERTS, D) * 3, None if hashed else _randn(g, EXPERTS), table, 2, 1.5)


def _route(rows: int, g: Generator) -> tuple[Any, ...]:
    return _randn(g, rows, D), torch.randint(0, VOCAB, (rows,), generator=g), _router(g, hashed=rows % 2 == 0)


def _experts(rows: int, g: Generator) -> tuple[Any, ...]:
    ids = torch.stack([torch.randperm(EXPERTS, generator=g)[:2] for _ in range(rows)])
    moe = Experts(_randn(g, EXPERTS, 2 * HIDDEN, D), _randn(g, EXPERTS, D, HIDDEN), 10.0)
    return _randn(g, rows, D) * 2, ids, torch.rand(rows, 2, generator=g), moe


def _shared_expert(rows: int, g: Generator) -> tuple[Any, ...]:
    return _randn(g, rows, D) * 2, _randn(g, 2 * HIDDEN, D), _randn(g, D, HIDDEN), 10.0


def _moe_rows(rows: int, g: Generator) -> tuple[Any, ...]:
    """Dense weights, which the reference serves on every device."""
    x, w13, w2, limit = _shared_expert(rows, g)
    moe = Experts(_randn(g, EXPERTS, 2 * HIDDEN, D), _randn(g, EXPERTS, D, HIDDEN), limit)
    return x, torch.randint(0, VOCAB, (rows,), generator=g), _router(g, hashed=rows % 2 == 0), moe, (w13, w2)


def _linear(rows: int, g: Generator) -> tuple[Any, ...]:
    return _randn(g, rows, D), _randn(g, HIDDEN, D)


def _grouped_linear(rows: int, g: Generator) -> tuple[Any, ...]:
    return _randn(g, rows, 3, D), _randn(g, 3, HIDDEN, D)


def _front_linear(rows: int, g: Generator) -> tuple[Any, ...]:
    # powers of two: their products with quantised inputs are the same in whatever order they are summed
    values = 2.0 ** torch.randint(-2, 3, (2 * HIDDEN, D), generator=g)
    latent = Fp8Matrix(values.to(torch.float8_e4m3fn), torch.full((1, 1), 0.5))
    return _randn(g, rows, D), FrontMatrix(latent, _randn(g, HIDDEN, D).to(torch.bfloat16))


def _newest_rows(rows: int, g: Generator) -> tuple[Any, ...]:
    """Every other token is one that only its slot knows; tables are wider than what is asked for."""
    slots, newest = torch.randperm(rows + 2, generator=g)[:rows], torch.randint(0, VOCAB, (rows + 2,), generator=g)
    tokens = torch.randint(0, VOCAB, (rows,), generator=g)
    tokens[::2] = -1
    return tokens, slots, newest, torch.randint(0, PAGES, (rows + 2, 9), generator=g, dtype=torch.int32), 7


def _head_rows(rows: int, g: Generator) -> tuple[Any, ...]:
    return _randn(g, rows, D), _randn(g, VOCAB, D)


def _likeliest(rows: int, g: Generator) -> tuple[Any, ...]:
    """Rows of several equal maxima, and the first of one value alone."""
    logits = (_randn(g, rows, 5000) * 2).round()
    logits[:1] = -torch.inf
    slots = torch.randperm(rows + 2, generator=g)[:rows]
    return logits, slots, torch.zeros(rows + 2, dtype=torch.int64), torch.zeros(2, rows, dtype=torch.float64)


def on_device(value: Any, device: torch.device) -> Any:
    """`value` with every tensor inside it on `device`, with its strides: pools are views into wider memory."""
    if isinstance(value, Tensor):
        if value.device == device:
            return value
        moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return moved.copy_(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{item.name: on_device(getattr(value, item.name), device) for item in fields(value)})
    if isinstance(value, tuple):
        parts = [on_device(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


MAKERS: dict[str, Callable[[int, Generator], tuple[Any, ...]]] = {
    "mhc_pre": _mhc_pre,
    "mhc_post": _mhc_post,
    "mhc_head": _mhc_head,
    "mhc_rows": _mhc_rows,
    "mhc_first": _mhc_first,
    "mhc_last": _mhc_last,
    "rms_norm": _rms_norm,
    "latent_rows": _latent_rows,
    "query_rows": _query_rows,
    "index_query_rows": _index_query_rows,
    "index_round": _index_round,
    "derotate": _derotate,
    "window_rows": _window_rows,
    "keep_window": _keep_window,
    "compress": _compress,
    "step_rows": _step_rows,
    "front_rows": _front_rows,
    "select_entries": _select_entries,
    "attend": _attend,
    "attend_rows": _attend_rows,
    "attend_heads": _attend_heads,
    "select_rows": _select_rows,
    "route": _route,
    "experts": _experts,
    "shared_expert": _shared_expert,
    "moe_rows": _moe_rows,
    "linear": _linear,
    "front_linear": _front_linear,
    "grouped_linear": _grouped_linear,
    "newest_rows": _newest_rows,
    "head_rows": _head_rows,
    "likeliest": _likeliest,
}
