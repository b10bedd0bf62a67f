"""Decode rows and step rows over packed caches: random inputs at odd places, and how far kernels are from float64.

Bytes that no row may read are 255, which is NaN as e4m3 and as a scale. Run as a script under Triton's interpreter it
prints a JSON line for each case; tests/gpu runs the same cases on true shapes.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from triptych.kernels.attend import ref as attend_ref
from triptych.kernels.attend.ref import Attention, WindowRows
from triptych.kernels.attend_rows.ref import Queries, RingRows
from triptych.kernels.attend_rows.ref import attend_heads as attend_heads_truth
from triptych.kernels.attend_rows.ref import attend_rows as attend_rows_truth
from triptych.kernels.index.ref import PagedEntries, index_scores, select_entries
from triptych.kernels.quant.formats import PackedRows, RowFormat, packed, write_rows
from triptych.kernels.select_rows.ref import IndexQueries, index_queries
from triptych.model.numerics import Native

RING, LAYERS = 260, 3


def pool_of(pages: int, rows: int, form: RowFormat, device: str) -> PackedRows:
    """Pages of unwritten rows, 16 bytes into wider memory."""
    wide = -(-(rows * form.row_bytes + 16) // 16) * 16
    return packed(torch.full((pages, wide), 255, dtype=torch.uint8, device=device), 16, rows, form)


def paged(
    visible: Tensor, per_page: int, form: RowFormat, g: torch.Generator, device: str, *, native: bool = True
) -> PagedEntries:
    """Entries of one sequence for each of `visible`, which its row sees, behind a shuffled page table."""
    most, batch = int(visible.max()), len(visible)
    pages = max(1, -(-most // per_page))
    pool = pool_of(batch * pages + 1, per_page, form, device)
    table = torch.randperm(batch * pages + 1, generator=g)[: batch * pages].view(batch, pages)
    for line, count in zip(table, visible.tolist(), strict=True):
        at = torch.arange(count)
        rows = torch.randn(count, form.dim, generator=g)
        rows = Native().index(rows) if native and form.kind != "entry" else rows
        if count:
            write_rows(pool, (line[at // per_page].to(device), (at % per_page).to(device)), rows.to(device))
    each = torch.arange(batch, device=device)
    return PagedEntries(pool, table.to(torch.int32).to(device), each, visible.to(device), most)


def some_ids(visible: Tensor, topk: int, g: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Up to `topk` ids of what each row sees, ascending, -1 behind."""
    ids = torch.full((len(visible), topk), -1, dtype=dtype)
    for line, count in zip(ids, visible.tolist(), strict=True):
        taken = torch.randperm(count, generator=g)[:topk].sort().values
        line[: len(taken)] = taken
    return ids


def decode_case(
    kind: str, visible: list[int], heads: int, form: RowFormat, topk: int, device: str, seed: int = 0
) -> tuple[Any, ...]:
    """Arguments of attend_rows: rows at any phase of a group, some with a short window."""
    g = torch.Generator().manual_seed(seed)
    seen, batch = torch.tensor(visible), len(visible)
    ratio = 128 if kind == "hca" else 4
    positions = seen * ratio + torch.randint(0, ratio, (batch,), generator=g)
    lowest = (positions - torch.randint(0, 200, (batch,), generator=g)).clamp(min=0)
    slots = torch.randperm(batch + 1, generator=g)[:batch]
    memory = torch.full((batch + 1, LAYERS, RING * form.row_bytes), 255, dtype=torch.uint8, device=device)
    ring = packed(memory[:, 1], 0, RING, form, LAYERS * RING)
    for slot, low, high in zip(slots.tolist(), lowest.tolist(), positions.tolist(), strict=True):
        place = slot * LAYERS * RING + torch.arange(max(low, high - 127), high + 1) % RING
        write_rows(ring, place.to(device), torch.randn(len(place), form.dim, generator=g).to(device))
    turns = torch.randn(batch, form.rope // 2, generator=g) * 3
    raw = (torch.randn(batch, heads * form.dim + 24, generator=g) * 2).to(torch.bfloat16)
    queries = Queries(raw.to(device), heads, form.dim, (turns.cos().to(device), turns.sin().to(device)), 1e-6)
    window = RingRows(ring, LAYERS * RING, RING, positions.to(device), slots.to(device), lowest.to(device))
    core = Attention(torch.randn(heads, generator=g).to(device), form.dim**-0.5)
    if kind == "swa":
        return queries, window, None, None, core
    entries = paged(seen, 32 if kind == "csa" else 1, form, g, device)
    ids = some_ids(seen, topk, g, torch.int32).to(device) if kind == "csa" else None
    return queries, window, entries, ids, core


def decode_error(got: Tensor, case: tuple[Any, ...]) -> float:
    """Norm-wise distance of a result from the reference in float64."""
    queries, window, entries, ids, core = case
    angles = (queries.angles[0].double(), queries.angles[1].double())
    wide = queries._replace(heads=queries.heads.double(), angles=angles)
    return error(got, attend_rows_truth(wide, window, entries, ids, core._replace(sink=core.sink.double())))


def step_case(kind: str, rows: int, most: int, heads: int, form: RowFormat, topk: int, device: str) -> tuple[Any, ...]:
    """Arguments of attend: step rows of two sequences over a flat packed window."""
    g = torch.Generator().manual_seed(rows)
    flat = packed(
        torch.full((1, (rows + 130) * form.row_bytes), 255, dtype=torch.uint8, device=device), 0, rows + 130, form
    )
    write_rows(flat, torch.arange(rows + 130, device=device), torch.randn(rows + 130, form.dim, generator=g).to(device))
    count = torch.randint(1, 129, (rows,), generator=g).to(device)
    window = WindowRows(flat, torch.arange(rows, device=device), count)
    q = torch.randn(rows, heads, form.dim, generator=g).to(device)
    core = Attention(torch.randn(heads, generator=g).to(device), form.dim**-0.5)
    if kind == "swa":
        return q, window, None, None, core
    visible = torch.randint(0, most + 1, (rows,), generator=g)
    entries = paged(torch.tensor([most, most]), 32 if kind == "csa" else 1, form, g, device)
    seq = torch.sort(torch.randint(0, 2, (rows,), generator=g)).values
    entries = entries._replace(seq=seq.to(device), visible=visible.to(device))
    ids = some_ids(visible, topk, g, torch.int64).to(device) if kind == "csa" else None
    return q, window, entries, ids, core


def heads_case(kind: str, rows: int, most: int, heads: int, form: RowFormat, topk: int, device: str) -> tuple[Any, ...]:
    """Arguments of attend_heads: raw queries of the step rows of `step_case`."""
    q, *rest = step_case(kind, rows, most, heads, form, topk, device)
    g = torch.Generator().manual_seed(most)
    turns = torch.randn(rows, form.rope // 2, generator=g) * 3
    raw = torch.cat([q.flatten(1).cpu() * 2, torch.randn(rows, 24, generator=g)], 1).to(torch.bfloat16)
    angles = (turns.cos().to(device), turns.sin().to(device))
    return Queries(raw.to(device), heads, form.dim, angles, 1e-6), *rest


def heads_error(got: Tensor, case: tuple[Any, ...]) -> float:
    """Norm-wise distance of a result from the reference in float64."""
    queries, window, entries, ids, core = case
    angles = (queries.angles[0].double(), queries.angles[1].double())
    wide = queries._replace(heads=queries.heads.double(), angles=angles)
    return error(got, attend_heads_truth(wide, window, entries, ids, core._replace(sink=core.sink.double())))


def step_error(got: Tensor, case: tuple[Any, ...]) -> float:
    """Norm-wise distance of a result from the reference in float64."""
    q, window, entries, selected, core = case
    core = core._replace(sink=core.sink.double())
    return error(got, attend_ref.attend(q.double(), window, entries, selected, core))


def index_case(kind: str, visible: list[int], heads: int, dim: int, device: str) -> tuple[IndexQueries, PagedEntries]:
    """Queries and keys of select_rows, native."""
    g = torch.Generator().manual_seed(len(visible))
    keys = paged(torch.tensor(visible), 32, RowFormat(kind, dim), g, device)  # type: ignore[arg-type]
    turns = torch.randn(len(visible), 8, generator=g) * 3
    raw = (torch.randn(len(visible), 40 + heads * dim, generator=g) * 2).to(torch.bfloat16).to(device)
    weights = torch.randn(len(visible), heads, generator=g).to(device) * 0.01
    return IndexQueries(raw, heads, dim, (turns.cos().to(device), turns.sin().to(device)), weights, True), keys


def index_errors(queries: IndexQueries, keys: PagedEntries, ordered: Tensor) -> tuple[float, Tensor]:
    """How far ordered scores are from float64, and the scores themselves, -inf where a row sees none."""
    scores = floats(ordered)[:, : keys.most]
    wide = index_queries(queries._replace(heads=queries.heads.float())).double()
    want = index_scores(wide, queries.weights.double(), keys)
    seen = torch.arange(scores.shape[1], device=scores.device) < keys.visible.unsqueeze(1)
    return error(scores[seen], want[seen]), scores.masked_fill(~seen, float("-inf"))


def tops_are_right(ordered: Tensor, tops: Tensor, visible: Tensor) -> bool:
    """Whether `tops` are the highest of each 8 of what a row sees of ordered scores [B, 8 n]."""
    seen = torch.arange(ordered.shape[1], device=ordered.device) < visible.unsqueeze(1)
    highest = ordered.masked_fill(~seen, -(1 << 31)).view(len(ordered), -1, 8).amax(2)
    there = seen.view(len(ordered), -1, 8).any(2)
    return torch.equal(tops[there], highest[there])


def best(scores: Tensor, visible: Tensor, k: int) -> Tensor:
    """Ids [B, k] int32 of the k highest, ascending, ties to the lower id, -1 behind: what `highest` must say."""
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k]
    order = torch.where(order < visible.unsqueeze(1), order, 1 << 40).sort(dim=1).values
    ids = torch.full((len(scores), k), -1, dtype=torch.int32, device=scores.device)
    ids[:, : order.shape[1]] = torch.where(order < 1 << 40, order, -1).to(torch.int32)
    return ids


def floats(ordered: Tensor) -> Tensor:
    """Ordered scores int32 as the floats that they sort like."""
    return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)


def ordered(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [B, 8 n] as integers of the same order, and the highest of each 8."""
    bits = torch.where(scores == 0, 0.0, scores).view(torch.int32)
    out = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).contiguous()
    return out, out.view(len(out), -1, 8).amax(2).contiguous()


def error(got: Tensor, want: Tensor) -> float:
    """Norm-wise relative distance; NaN where either has one."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def main() -> None:
    """All cases at small sizes, for the interpreter."""
    from triptych.kernels.attend import triton as attend
    from triptych.kernels.attend_rows import triton as rows
    from triptych.kernels.index import triton as index
    from triptych.kernels.select_rows import triton as select
    from triptych.kernels.select_rows.highest import highest

    def say(what: str, ok: bool, distance: float = 0.0) -> None:
        print(json.dumps({"what": what, "ok": ok, "error": distance}))

    form = RowFormat("entry", 96, 16)
    for kind in ("csa", "hca", "swa"):
        case = decode_case(kind, [90, 3, 40], 5, form, 30, "cpu")
        for tiling in (None, rows.Tiling(16, 16, 48, 4, 2)):
            far = decode_error(rows.attend_rows(*case, tiling=tiling), case)
            say(f"decode {kind} {tiling}", far < 1e-2, far)  # the interpreter cuts bfloat16 off
        steps = step_case(kind, 9, 60, 5, form, 20, "cpu")
        far = step_error(attend.attend(*steps), steps)
        say(f"steps {kind}", far < 1e-5, far)
    for kind in ("fp8", "mxfp4"):
        queries, keys = index_case(kind, [300, 130, 20], 5, 64, "cpu")
        scores, tops = select.ordered_scores(queries, keys)
        far, own = index_errors(queries, keys, scores)
        chosen = highest(scores, tops, keys.visible, 40)
        # the interpreter cuts bfloat16 off, and so takes other e2m1 values for some queries
        right = torch.equal(chosen, best(own, keys.visible, 40)) and tops_are_right(scores, tops, keys.visible)
        say(f"select {kind}", far < 0.1 and right, far)
        q = index_queries(queries._replace(heads=queries.heads.float()))
        same = index.select_entries(q, queries.weights, keys, 40) == select_entries(q, queries.weights, keys, 40)
        say(f"select entries {kind}", bool(same.all()))
    visible = torch.tensor([1024, 600, 129, 128])
    for name in ("random", "ties", "rising"):
        g = torch.Generator().manual_seed(0)
        values = (
            torch.randint(0, 4, (4, 1024), generator=g).float() if name == "ties" else torch.randn(4, 1024, generator=g)
        )
        values = torch.arange(1024).float().expand(4, 1024).contiguous() if name == "rising" else values
        values = values.masked_fill(torch.arange(1024) >= visible.unsqueeze(1), float("-inf"))
        say(f"highest {name}", torch.equal(highest(*ordered(values), visible, 32), best(values, visible, 32)))


if __name__ == "__main__":
    main()
