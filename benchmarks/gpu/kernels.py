"""python -m benchmarks gpu: attention and indexer on V4-Flash's true shapes, against reference and byte floor.

Each case is checked against the float32 reference on random data first, then timed: a CUDA graph of many calls that
rotate over sets of inputs larger than the L2 cache, replayed; the median over replays of the time of one call.
The floor is the larger of bytes (each key and query read once, each result written once) over the copy bandwidth and
arithmetic over the bfloat16 rate, both measured in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks import rows
from benchmarks.gpu.timing import ceilings, timed
from triptych.config import CSA_RATIO, HCA_RATIO, PAGE, SHAPES, WINDOW
from triptych.kernels.attend import ref as attend_ref
from triptych.kernels.attend import triton as attend
from triptych.kernels.attend.ref import Attention, WindowRows
from triptych.kernels.index import ref as index_ref
from triptych.kernels.index import triton as index
from triptych.kernels.index.ref import PagedEntries

FLASH = SHAPES["flash"]
BATCHES = (1, 8, 64)
CONTEXTS = {"8K": 8192, "128K": 131072, "1M": 1048576}
ROTATED = 160 << 20  # bytes that one graph reads at least, so that the L2 cache cannot hold them
CHECKED = 8  # rows whose reference is computed: its gathered keys are large
Inputs = tuple[Any, ...]


def main(argv: list[str]) -> int:
    """Measure and append rows to results/gpu_kernels.jsonl."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--commit", default="", help="what is measured, where git is absent")
    parser.add_argument("--sweep", action="store_true", help="also time other tilings of attention")
    parser.add_argument("--warm", type=int, help="only compile the sweep's tiling of this number, beside others")
    parser.add_argument("--dry", action="store_true", help="print only")
    given = parser.parse_args(argv)
    if given.warm is not None:
        compile_tiling(SWEEP[given.warm])
        return 0
    bandwidth, rate = ceilings()
    card = torch.cuda.get_device_name()
    print(f"{card}: copy {bandwidth / 1e12:.2f} TB/s, bf16 {rate / 1e12:.0f} TFLOP/s")
    table = []
    for line in cases(bandwidth, rate, sweep=given.sweep):
        table.append(line)
        print(" ".join(f"{key}={value}" for key, value in line.items()), flush=True)
    if not given.dry:
        values = {"card": card, "copy_tb_s": round(bandwidth / 1e12, 3), "bf16_tflop_s": round(rate / 1e12, 1)}
        values |= {"command": "python -m benchmarks gpu", "table": table}
        values |= {"commit": given.commit} if given.commit else {}
        rows.append("gpu_kernels", values, kv_bytes={"entry": 2 * FLASH.head_dim}, threads=1)
    return 0


def cases(bandwidth: float, rate: float, *, sweep: bool) -> Iterator[dict[str, Any]]:
    """One line for each kernel, batch and context."""
    for context, tokens in CONTEXTS.items():
        for batch in BATCHES:
            yield _indexer(context, tokens, batch, (bandwidth, rate))
            torch.cuda.empty_cache()
    makers: dict[str, Callable[[int, int], tuple[Inputs, int, int]]] = {"csa": _csa, "hca": _hca, "swa": _swa}
    for name, make in makers.items():
        for context, tokens in CONTEXTS.items():
            if name != "hca" and context != "1M":
                continue  # what they read does not depend on the context
            for batch in BATCHES:
                yield from _attention(name, context, tokens, batch, make, (bandwidth, rate), sweep=sweep)


def _attention(
    name: str,
    context: str,
    tokens: int,
    batch: int,
    make: Callable[[int, int], tuple[Inputs, int, int]],
    ceiling: tuple[float, float],
    *,
    sweep: bool,
) -> Iterator[dict[str, Any]]:
    one, size, flops = make(batch, tokens)
    some = _first_rows(one, CHECKED)
    want = attend_ref.attend(*some)
    sets = [one, *(make(batch, tokens)[0] for _ in range(min(7, ROTATED // size)))]
    floor = max(size / ceiling[0], flops / ceiling[1]) * 1e6
    head = {"op": f"attend {name}", "context": context, "batch": batch}
    for tiling in [None, *(_tilings(batch, size) if sweep and context == "1M" else [])]:
        try:
            error = _relative(attend.attend(*some, tiling), want)
            us = timed([lambda given=given, tiling=tiling: attend.attend(*given, tiling) for given in sets])
        except OutOfResources as refused:
            print("  ", tiling, refused)
            continue
        line = {**head, "us": round(us, 2), "floor_us": round(floor, 2), "of_floor": round(floor / us, 3)}
        yield {**line, "error": f"{error:.1e}", **({"tiling": tuple(tiling)} if tiling else {})}


def _tilings(batch: int, size: int) -> Iterator[attend.Tiling]:
    """Other ways to cut the work: tiles that fit, with about one, two and four programs for each multiprocessor."""
    for heads, keys, warps, stages in SWEEP:
        programs = batch * FLASH.num_heads // heads
        longest = max(1, (size // batch - 8 * FLASH.num_heads * FLASH.head_dim) // 1024 // keys)
        for fill in sorted({max(1, min(longest, 64, 66 * n // programs)) for n in (1, 2, 4)}):
            yield attend.Tiling(heads, keys, fill, warps, stages)


SWEEP = ((64, 32, 8, 3), (64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 3), (16, 32, 4, 3), (32, 16, 4, 4))
"""Heads and keys of a tile, warps and stages of a program."""


def compile_tiling(cut: tuple[int, int, int, int]) -> None:
    """Have Triton compile all that the sweep needs of one tiling; what it compiled is found on disk by others."""
    heads, keys, warps, stages = cut
    for make in (_swa, _csa, _hca):
        one = make(1, 8192)[0]
        for splits in (1, 2):
            attend.attend(*one, attend.Tiling(heads, keys, splits, warps, stages))
    torch.cuda.synchronize()


def _indexer(context: str, tokens: int, batch: int, ceiling: tuple[float, float]) -> dict[str, Any]:
    one, size, flops = _index_inputs(batch, tokens)
    few = _first_rows(one, 2)
    q, weights, keys, topk = few
    got, want = index.index_scores(q, weights, keys), index_ref.index_scores(q, weights, keys)
    error = _relative(got, want)
    order = torch.sort(got, dim=1, descending=True, stable=True).indices[:, :topk].sort(dim=1).values
    right = bool((index.highest(got, keys.visible, topk) == order).all())
    sets = [one, *(_index_inputs(batch, tokens)[0] for _ in range(min(7, ROTATED // size)))]
    scores = index.index_scores(*one[:3])
    us = timed([lambda given=given: index.select_entries(*given) for given in sets])
    only_scores = timed([lambda given=given: index.index_scores(*given[:3]) for given in sets])
    only_topk = timed([lambda: index.highest(scores, one[2].visible, topk)])
    floor = max(size / ceiling[0], flops / ceiling[1]) * 1e6
    return {
        **{"op": "index + top-512", "context": context, "batch": batch, "us": round(us, 2)},
        **{"scores_us": round(only_scores, 2), "topk_us": round(only_topk, 2)},
        **{"floor_us": round(floor, 2), "of_floor": round(floor / us, 3), "error": f"{error:.1e}", "ids_right": right},
    }


def _relative(got: Tensor, want: Tensor) -> float:
    """Norm-wise relative error over what is finite; infinity where they disagree about what is."""
    if not torch.equal(got.isfinite(), want.isfinite()):
        return float("inf")
    got, want = got.masked_fill(~got.isfinite(), 0).double(), want.masked_fill(~want.isfinite(), 0).double()
    return float((got - want).norm() / want.norm())


# ---- inputs: random data, pages in random order


def _randn(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*size, device="cuda", dtype=dtype)


def _window(batch: int) -> WindowRows:
    first = torch.arange(batch, device="cuda") * WINDOW
    return WindowRows(_randn(batch * WINDOW, FLASH.head_dim), first, torch.full((batch,), WINDOW, device="cuda"))


def _paged(batch: int, entries: int, per_page: int, dim: int, most_pages: int) -> PagedEntries:
    """Tables over a shared pool of at most `most_pages` pages: beyond that, pages stand in several tables."""
    pages = -(-entries // per_page)
    pool = _randn(min(batch * pages, most_pages), per_page, dim)
    table = torch.randint(0, len(pool), (batch, pages), device="cuda")
    if batch * pages <= most_pages:
        table = torch.randperm(len(pool), device="cuda").view(batch, pages)
    seq = torch.arange(batch, device="cuda")
    return PagedEntries(pool, table, seq, torch.full((batch,), entries, device="cuda"), entries)


def _core() -> Attention:
    return Attention(_randn(FLASH.num_heads, dtype=torch.float32), FLASH.head_dim**-0.5)


def _sized(batch: int, keys: int) -> tuple[int, int]:
    """Bytes and FLOP of attention: keys of bf16 once, queries and results of float32 once."""
    io = 2 * 4 * FLASH.num_heads * FLASH.head_dim
    return batch * (keys * 2 * FLASH.head_dim + io), batch * keys * 4 * FLASH.num_heads * FLASH.head_dim


def _query(batch: int) -> Tensor:
    return _randn(batch, FLASH.num_heads, FLASH.head_dim, dtype=torch.float32)


def _swa(batch: int, tokens: int) -> tuple[Inputs, int, int]:
    return (_query(batch), _window(batch), None, None, _core()), *_sized(batch, WINDOW)


def _csa(batch: int, tokens: int) -> tuple[Inputs, int, int]:
    entries = _paged(batch, tokens // CSA_RATIO, PAGE // CSA_RATIO, FLASH.head_dim, 1 << 16)
    picks = [torch.randperm(tokens // CSA_RATIO, device="cuda")[: FLASH.index_topk].sort().values for _ in range(batch)]
    chosen = torch.stack(picks)
    return (_query(batch), _window(batch), entries, chosen, _core()), *_sized(batch, WINDOW + FLASH.index_topk)


def _hca(batch: int, tokens: int) -> tuple[Inputs, int, int]:
    entries = _paged(batch, tokens // HCA_RATIO, 1, FLASH.head_dim, 1 << 20)
    return (_query(batch), _window(batch), entries, None, _core()), *_sized(batch, WINDOW + tokens // HCA_RATIO)


def _index_inputs(batch: int, tokens: int) -> tuple[Inputs, int, int]:
    heads, dim, entries = FLASH.index_heads, FLASH.index_head_dim, tokens // CSA_RATIO
    keys = _paged(batch, entries, PAGE // CSA_RATIO, dim, 1 << 20)
    q, weights = _randn(batch, heads, dim, dtype=torch.float32), _randn(batch, heads, dtype=torch.float32)
    size = batch * (entries * dim * 2 + heads * dim * 4 + FLASH.index_topk * 8)
    return (q, weights, keys, FLASH.index_topk), size, batch * entries * 2 * heads * dim


def _first_rows(given: Inputs, count: int) -> Inputs:
    """The same inputs for the first rows only."""
    out: list[Any] = []
    for value in given:
        if isinstance(value, Tensor):
            out.append(value[:count])
        elif isinstance(value, WindowRows):
            out.append(WindowRows(value.rows, value.first[:count], value.count[:count]))
        elif isinstance(value, PagedEntries):
            out.append(value._replace(seq=value.seq[:count], visible=value.visible[:count]))
        else:
            out.append(value)
    return tuple(out)
