"""Operations on the rows of prefill chunks, on the shapes of Flash: against float64, and rows against their mates."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import packed_cases as cases

from triptych.kernels.attend.ref import WindowRows
from triptych.kernels.attend_rows import chunk
from triptych.kernels.attend_rows import ref as attend_ref
from triptych.kernels.attend_rows import triton as attend
from triptych.kernels.attend_rows.ref import Queries
from triptych.kernels.compress import ref as compress_ref
from triptych.kernels.compress import triton as compress
from triptych.kernels.compress.ref import Compressor, CompressPlan
from triptych.kernels.linear import ref as linear_ref
from triptych.kernels.linear import triton as linear
from triptych.kernels.mhc import ref as mhc_ref
from triptych.kernels.mhc import triton as mhc
from triptych.kernels.mhc.ref import MhcSite, Residual
from triptych.kernels.quant.formats import RowFormat
from triptych.kernels.quant.matrices import Fp8Matrix, FrontMatrix
from triptych.kernels.select_rows import triton as select

ENTRY = RowFormat("entry", 512, 64)


@pytest.fixture
def g() -> torch.Generator:
    torch.empty(64 << 20, device="cuda").fill_(float("nan"))  # what the allocator hands out next
    return torch.Generator(device="cuda").manual_seed(1)


def randn(g: torch.Generator | None, *size: int) -> Tensor:
    return torch.randn(*size, device="cuda", generator=g)


def heads_case(kind: str, count: int, g: torch.Generator) -> tuple[Any, ...]:
    """Arguments of attend_heads: raw queries of two sequences."""
    q, window, entries, ids, core = cases.step_case(kind, count, 1100, 64, ENTRY, 512, "cuda")
    turns = randn(g, count, 32) * 3
    raw = (q.flatten(1) * 2).to(torch.bfloat16)
    return Queries(raw, 64, 512, (turns.cos(), turns.sin()), 1e-6), window, entries, ids, core


@pytest.mark.parametrize("kind", ["csa", "hca", "swa"])
@pytest.mark.parametrize(("count", "converted"), [(1, False), (200, False), (200, True), (400, True)])
def test_attention_of_raw_queries(
    kind: str, count: int, converted: bool, g: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, window, entries, ids, core = heads_case(kind, count, g)
    monkeypatch.setattr(chunk, "fits", lambda *_: converted)
    got = attend.attend_heads(queries, window, entries, ids, core)
    wide = queries._replace(heads=queries.heads.double(), angles=tuple(turn.double() for turn in queries.angles))
    want = attend_ref.attend_heads(wide, window, entries, ids, core._replace(sink=core.sink.double()))
    assert cases.error(got, want) < 4e-3


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_selection_of_a_chunk(kind: str, g: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two sequences in one chunk share tiles of keys, but not where one ends."""
    count, topk = 333, 512
    queries, keys = cases.index_case(kind, [2500, 1800], 64, 128, "cuda")
    turns = randn(g, count, 32) * 3
    raw = (randn(g, count, 64 * 128 + 64) * 2).to(torch.bfloat16)
    weights = randn(g, count, 64) * 0.01
    queries = queries._replace(heads=raw, angles=(turns.cos(), turns.sin()), weights=weights)
    seq = (torch.arange(count, device="cuda") >= 149).long()
    visible = torch.where(seq == 0, 2000 + 2 * torch.arange(count, device="cuda"), 1500 + torch.arange(count).cuda())
    visible = torch.minimum(visible, torch.tensor([2500, 1800], device="cuda")[seq])
    visible[7], visible[200], visible[148] = 300, 0, 2500
    keys = keys._replace(seq=seq, visible=visible)
    ordered, tops = select.ordered_scores(queries, keys)
    far, scores = cases.index_errors(queries, keys, ordered)
    assert far < 2e-2
    assert cases.tops_are_right(ordered, tops, visible)
    assert torch.equal(select.select_rows(queries, keys, topk), cases.best(scores, visible, topk))
    one = slice(100, 101)
    alone = queries._replace(heads=raw[one], angles=(turns.cos()[one], turns.sin()[one]), weights=weights[one])
    mine, _ = select.ordered_scores(alone, keys._replace(seq=seq[one], visible=visible[one]))
    assert torch.equal(mine[0, :2100], ordered[100, :2100])
    monkeypatch.setattr(select, "_GATHERED", 0)  # as of more keys than may lie side by side
    assert torch.equal(select.select_rows(queries, keys, topk), cases.best(scores, visible, topk))


@pytest.mark.parametrize("rows", [512, 777])
def test_a_site_of_many_rows(rows: int, g: torch.Generator) -> None:
    dim = 4096
    site = MhcSite(randn(g, 24, 4 * dim) / 128, randn(g, 24), randn(g, 3), 20, 1e-6, 1e-6)
    comb = mhc_ref.sinkhorn(randn(g, rows, 4, 4), 20, 1e-6)
    before = Residual(randn(g, rows, 4, dim).bfloat16(), torch.rand(rows, 4, device="cuda", generator=g) * 2, comb)
    y, norm = randn(g, rows, dim).bfloat16(), randn(g, dim)
    got = mhc.mhc_rows(y, before, site, norm)
    for one, truth in zip(got, mhc_ref.mhc_rows(y, before, site, norm), strict=True):
        assert cases.error(one, truth) < 4e-3
    some = torch.arange(rows - 512, rows, device="cuda")
    alone = mhc.mhc_rows(y[some], Residual(*(part[some] for part in before)), site, norm)
    assert all(torch.equal(a, b[some]) for a, b in zip(alone, got, strict=True))
    table, ids = randn(g, 99, dim).bfloat16(), torch.randint(0, 99, (rows,), device="cuda", generator=g)
    for one, truth in zip(
        mhc.mhc_first(ids, table, site, norm), mhc_ref.mhc_first(ids, table, site, norm), strict=True
    ):
        assert cases.error(one, truth) < 4e-3


@pytest.mark.parametrize("kind", ["csa", "hca", "swa"])
def test_attention_of_a_row_does_not_depend_on_its_chunk(kind: str, g: torch.Generator) -> None:
    queries, window, entries, ids, core = heads_case(kind, 300, g)
    got = attend.attend_heads(queries, window, entries, ids, core)
    some = torch.arange(131, 300, device="cuda")
    assert chunk.fits(queries, entries)
    alone = attend.attend_heads(
        queries._replace(heads=queries.heads[some], angles=tuple(turn[some] for turn in queries.angles)),
        WindowRows(window.rows, window.first[some], window.count[some]),
        None if entries is None else entries._replace(seq=entries.seq[some], visible=entries.visible[some]),
        None if ids is None else ids[some],
        core,
    )
    assert torch.equal(alone, got[some])


def long_groups(g: torch.Generator | None) -> tuple[Any, ...]:
    """Arguments of compress: three HCA groups, of which the first begins in the ring."""
    weights = Compressor(randn(g, 128, 512), randn(g, 512), False, 1e-6)
    front, ring = randn(g, 300, 1100), randn(g, 128, 1024)
    positions = torch.arange(-84, 300, device="cuda").view(3, 128)
    src = torch.where(positions >= 0, positions, -1 - (positions % 128))
    none = src[:0, 0]
    plan = CompressPlan(src, none, none, (torch.arange(300, device="cuda") + 84) % 128, none, none)
    turns = randn(g, 3, 32)
    return front, 76, ring, plan, weights, (turns.cos(), turns.sin())


def test_long_groups_are_pooled(g: torch.Generator) -> None:
    given = long_groups(g)
    assert cases.error(compress.compress(*given), compress_ref.compress(*given)) < 1e-5


def fp8(g: torch.Generator, *size: int) -> Fp8Matrix:
    scales = 2.0 ** torch.randint(-9, -4, (*size[:-2], size[-2] // 128, size[-1] // 128), device="cuda", generator=g)
    return Fp8Matrix((randn(g, *size)).to(torch.float8_e4m3fn), scales)


def test_linears_of_a_chunk(g: torch.Generator) -> None:
    x = randn(g, 700, 4096).bfloat16()
    front = FrontMatrix(fp8(g, 1536, 4096), (randn(g, 192, 4096) / 64).bfloat16())
    assert cases.error(linear.front_linear(x, front), linear_ref.front_linear(x, front)) < 4e-3
    x, o_a = randn(g, 700, 8, 1024).bfloat16(), fp8(g, 8, 256, 1024)
    assert cases.error(linear.grouped_linear(x, o_a), linear_ref.grouped_linear(x, o_a)) < 4e-3
