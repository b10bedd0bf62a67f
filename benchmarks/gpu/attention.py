"""python -m benchmarks.gpu.attention: attention and selection of decode rows from FP8 and MXFP4 caches, on true shapes.

Times are medians over replays of a CUDA graph whose calls rotate over inputs of more bytes than the L2 cache holds;
a call is all launches of one layer. The floor is the larger of two: bytes (each key read once, queries and results) at
the read bandwidth, products at the rate of their type. Contexts of a batch are equal, which is what peers were
measured with. Where `flash_mla` (the package sgl-flash-mla) can be imported, the same layers are timed in the same run
with it doing the work (`by_flash_mla_us`: its launches and ours around them), and its decode call alone on the same
sizes with its own plan (`flash_mla_us`), which takes queries that are normed and rotated and does not rotate back;
`engine` says which of the two the engine would use.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import peers
from benchmarks.gpu.timing import BF16, FP8, READ, Figures, against, timed
from triptych.config import CSA_RATIO, HCA_RATIO, PAGE, SHAPES, WINDOW, ModelShape
from triptych.kernels.attend.ref import Attention
from triptych.kernels.attend_rows.ref import Queries, RingRows
from triptych.kernels.attend_rows.triton import attend_rows
from triptych.kernels.attend_rows.vendor import by_flash_mla, faster
from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.quant.formats import PackedRows, RowFormat, packed
from triptych.kernels.select_rows.ref import IndexQueries
from triptych.kernels.select_rows.triton import ordered_scores, select_rows

CONTEXTS = {"8K": 1 << 13, "32K": 1 << 15, "128K": 1 << 17, "1M": 1 << 20}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
RING = 260
ROTATED = 120 << 20  # bytes that one graph reads at least
DEVICE = torch.device("cuda")


def main(argv: list[str] | None = None) -> int:
    """Print a table; `python -m benchmarks.gpu.table` keeps one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="flash,pro")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--only", default="csa,hca,swa,fp8,mxfp4")
    given = parser.parse_args(argv)
    batches = [int(n) for n in given.batches.split(",")]
    for line in cases(given.models.split(","), batches, given.only.split(",")):
        print(" ".join(f"{key}={value}" for key, value in line.items()), flush=True)
    return 0


def cases(models: list[str], batches: list[int], only: list[str]) -> Iterator[Figures]:
    """One line for each model, kind of layer, context and batch."""
    for model in models:
        shape = SHAPES[model]
        for kind in ("csa", "hca", "swa"):
            for context in CONTEXTS if kind == "hca" else ("1M",):
                for batch in batches if kind in only else ():
                    line = {"model": model, "op": f"attend {kind}", "context": context, "batch": batch}
                    yield line | attention(shape, kind, CONTEXTS[context], batch)
        for kind in ("fp8", "mxfp4"):
            for context, tokens in CONTEXTS.items():
                for batch in batches if kind in only else ():
                    line = {"model": model, "op": f"select {kind}", "context": context, "batch": batch}
                    yield line | selection(shape, kind, tokens, batch)


def attention(shape: ModelShape, kind: str, tokens: int, batch: int) -> Figures:
    """One attention layer of `batch` rows, each `tokens` into its sequence."""
    heads, dim = shape.num_heads, shape.head_dim
    seen = {"csa": tokens // CSA_RATIO, "hca": tokens // HCA_RATIO, "swa": 0}[kind]
    read = min(seen, shape.index_topk) if kind == "csa" else seen
    size = batch * ((WINDOW + read) * 584 + 2 * heads * dim * 2)
    # each copy of a CSA layer's inputs chooses other entries, so that they can share a pool, which is large
    shared = _entries(shape, kind, seen, batch) if kind == "csa" else None
    sets = [_attention_inputs(shape, kind, tokens, batch, shared) for _ in range(_copies(size))]
    us = timed([lambda one=one: attend_rows(*one) for one in sets])
    floor = max(size / READ, batch * heads * (WINDOW + read) * 4 * dim / BF16) * 1e6
    line: Figures = {**against(floor, us)}
    theirs = _vendor(shape, read, batch)
    if theirs is None:
        return line
    whole = timed([lambda one=one: by_flash_mla(*one) for one in sets])
    used = "FlashMLA" if faster(heads, batch, read) else "ours"
    return line | {"by_flash_mla_us": round(whole, 2), "flash_mla_us": round(theirs, 2), "engine": used}


def _entries(shape: ModelShape, kind: str, seen: int, batch: int) -> PagedEntries:
    per_page = PAGE // (CSA_RATIO if kind == "csa" else HCA_RATIO)
    return _pages(batch, seen, per_page, RowFormat("entry", shape.head_dim, shape.rope_dim))


def _attention_inputs(
    shape: ModelShape, kind: str, tokens: int, batch: int, shared: PagedEntries | None
) -> tuple[Any, ...]:
    form = RowFormat("entry", shape.head_dim, shape.rope_dim)
    turns = torch.randn(batch, shape.rope_dim // 2, device=DEVICE)
    heads = torch.randn(batch, shape.num_heads * shape.head_dim, device=DEVICE).to(torch.bfloat16)
    queries = Queries(heads, shape.num_heads, shape.head_dim, (turns.cos(), turns.sin()), 1e-6)
    each = torch.arange(batch, device=DEVICE)
    positions = torch.full_like(each, tokens - 1)
    window = RingRows(_pool(batch, RING, form), RING, RING, positions, each, torch.zeros_like(each))
    core = Attention(torch.randn(shape.num_heads, device=DEVICE), shape.head_dim**-0.5)
    if kind == "swa":
        return queries, window, None, None, core
    if shared is None:
        return queries, window, _entries(shape, kind, tokens // HCA_RATIO, batch), None, core
    ids = None
    step = tokens // CSA_RATIO // shape.index_topk
    if step > 1:  # one of each stretch of entries: as scattered as a random choice
        ids = torch.arange(shape.index_topk, device=DEVICE) * step
        ids = (ids + torch.randint(0, step, (batch, shape.index_topk), device=DEVICE)).to(torch.int32)
    return queries, window, shared, ids, core


def selection(shape: ModelShape, kind: str, tokens: int, batch: int, beside: peers.Peers | None = None) -> Figures:
    """Index scores and top-k of one CSA layer; `beside` it, from FP8 keys, vLLM's of the same inputs."""
    form = RowFormat("fp8" if kind == "fp8" else "mxfp4", shape.index_head_dim)
    seen, heads, dim = tokens // CSA_RATIO, shape.index_heads, shape.index_head_dim
    size = batch * seen * form.row_bytes
    sets = []
    for _ in range(_copies(size)):
        turns = torch.randn(batch, shape.rope_dim // 2, device=DEVICE)
        raw = torch.randn(batch, heads * dim, device=DEVICE).to(torch.bfloat16)
        weights = torch.randn(batch, heads, device=DEVICE)
        queries = IndexQueries(raw, heads, dim, (turns.cos(), turns.sin()), weights, True)
        sets.append((queries, _pages(batch, seen, PAGE // CSA_RATIO, form)))
    us = timed([lambda one=one: select_rows(*one, shape.index_topk) for one in sets])
    scores = timed([lambda one=one: ordered_scores(*one) for one in sets])
    floor = max(size / READ, batch * seen * heads * dim * 2 / FP8) * 1e6
    line = {**against(floor, us), "scores_us": round(scores, 2), "topk_us": round(us - scores, 2)}
    return line | (peers.selection(beside, sets, shape.index_topk) if beside and kind == "fp8" else {})


def _copies(size: int) -> int:
    return max(1, min(16, math.ceil(ROTATED / size)))


def _pages(batch: int, seen: int, per_page: int, form: RowFormat) -> PagedEntries:
    """`seen` rows for each of `batch` sequences behind a shuffled page table."""
    each = torch.arange(batch, device=DEVICE)
    pages = seen // per_page
    table = torch.randperm(batch * pages, device=DEVICE, dtype=torch.int32).view(batch, pages)
    return PagedEntries(_pool(batch * pages, per_page, form), table, each, torch.full_like(each, seen), seen)


def _pool(pages: int, rows: int, form: RowFormat) -> PackedRows:
    """Random finite rows whose scales are near 1."""
    memory = torch.randint(0x30, 0x40, (pages, -(-rows * form.row_bytes // 16) * 16), dtype=torch.uint8, device=DEVICE)
    pool = packed(memory, 0, rows, form)
    if form.kind == "fp8":
        pool.scales.copy_(torch.ones(1, device=DEVICE).view(torch.uint8))
    else:
        pool.scales.copy_(torch.randint(125, 129, (8 if form.kind == "entry" else 4,), dtype=torch.uint8))
    return pool


def _vendor(shape: ModelShape, read: int, batch: int) -> float | None:
    """Microseconds of FlashMLA's decode call over a window and `read` random entries; None where it is not there."""
    if importlib.util.find_spec("flash_mla") is None:
        return None
    decode: Callable[..., Any] = importlib.import_module("flash_mla._loader").get_ops(True).sparse_decode_fwd
    sink = torch.randn(shape.num_heads, device=DEVICE)
    sets = []
    for _ in range(_copies(batch * (WINDOW + read) * 584)):
        q = torch.randn(batch, 1, shape.num_heads, shape.head_dim, device=DEVICE).to(torch.bfloat16)
        some = [_vendor_rows(batch, count) if count else (None, None, None) for count in (WINDOW, read)]
        plan: list[Any] = [None, None]
        sets.append((q, some, plan))

    def call(q: Tensor, some: list[Any], plan: list[Any]) -> None:
        (window, places, length), (entries, chosen, most) = some
        scale = shape.head_dim**-0.5
        done = decode(q, window, places, length, sink, *plan, entries, chosen, most, shape.head_dim, scale, None)
        plan[:] = done[2:4]

    return timed([lambda one=one: call(*one) for one in sets])


def _vendor_rows(batch: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pages of 64 entries for FlashMLA, random places in them [B, 1, n] in whole 128s, and how many count."""
    pages, stride = batch * -(-count // 64) * 2, 37440
    memory = torch.randint(0x30, 0x40, (pages, stride), dtype=torch.uint8, device=DEVICE)
    memory[:, 64 * 576 :] = 127
    view = torch.as_strided(memory, (pages, 64, 1, 584), (stride, 584, 584, 1))
    places = torch.full((batch, 1, -(-count // 128) * 128), -1, dtype=torch.int32, device=DEVICE)
    places[:, 0, :count] = torch.randint(0, pages * 64, (batch, count), dtype=torch.int32, device=DEVICE)
    return view, places, torch.full((batch,), count, dtype=torch.int32, device=DEVICE)


if __name__ == "__main__":
    raise SystemExit(main())
