"""Attention and selection over packed caches on the shapes of Flash and Pro, against float64; outputs start as NaN."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import packed_cases as cases

from triptych.kernels.attend import triton as attend
from triptych.kernels.attend_rows import triton as rows
from triptych.kernels.index import ref as index_ref
from triptych.kernels.index import triton as index
from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.linear.counters import counters
from triptych.kernels.quant.formats import RowFormat
from triptych.kernels.select_rows import triton as select
from triptych.kernels.select_rows.highest import highest
from triptych.kernels.select_rows.ref import IndexQueries, index_queries

ENTRY = RowFormat("entry", 512, 64)
VISIBLE = [1500, 900, 3, 64, 0]
TILINGS = {"default": None, "short": rows.Tiling(64, 64, 64, 0, 0), "portable": rows.Tiling(16, 32, 96, 4, 3)}
KINDS = ["random", "ties", "zero", "rising", "clustered", "bands", "outlier", "runs", "equal", "tiny"]
"""Of scores."""
MODELS = {"flash": (64, 512), "pro": (128, 1024)}


def poison() -> None:
    """Fill what the allocator will hand out next with NaN."""
    torch.empty(64 << 20, device="cuda").fill_(float("nan"))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["csa", "hca", "swa"])
@pytest.mark.parametrize("tiling", TILINGS)
def test_decode_attention(model: str, kind: str, tiling: str) -> None:
    heads, topk = MODELS[model]
    case = cases.decode_case(kind, VISIBLE, heads, ENTRY, topk, "cuda")
    poison()
    assert cases.decode_error(rows.attend_rows(*case, tiling=TILINGS[tiling]), case) < 4e-3


@pytest.mark.parametrize("kind", ["csa", "hca", "swa"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_few_rows_are_attended_in_one_launch(kind: str, count: int) -> None:
    """Again and again, from a graph too, as programs leave the workspace as they found it; some rows are short."""
    together = pytest.importorskip("triptych.kernels.attend_rows.together")
    visible = [1500 if kind == "csa" else 500 if count > 1 else 1000, 300, 3, 64, 0, 130, 501, 1][:count]
    case = cases.decode_case(kind, visible, 64, ENTRY, 512, "cuda")
    _, window, entries, ids, _ = case
    if kind != "swa" and count > 1:
        window.lowest[0] = window.positions[0] + 1  # no window
    assert together.tiling_of(torch.empty(count, 64, 512, device="cuda"), entries, ids) is not None
    attended_again_and_again(case)


LONG = [("flash", "hca", visible) for visible in ([8192], [7812], [4097], [2100])]
LONG += [("flash", "hca", visible) for visible in ([8192, 8000], [6000, 3], [3000, 4000], [2100, 2000], [1000, 1024])]
LONG += [("flash", "hca", visible) for visible in ([1024, 900, 3], [1024, 900, 3, 0], [800, 896, 3, 640])]
LONG += [("pro", "hca", visible) for visible in ([8192], [4000], [1024], [1024, 700])] + [("pro", "csa", [1500])]


@pytest.mark.parametrize(("model", "kind", "visible"), LONG)
def test_few_rows_of_long_lists_are_attended_in_one_launch(model: str, kind: str, visible: list[int]) -> None:
    """Programs tell averages, of scores that are alike and of such that a few keys have all weight."""
    together = pytest.importorskip("triptych.kernels.attend_rows.together")
    heads, topk = MODELS[model]
    case = cases.decode_case(kind, visible, heads, ENTRY, topk, "cuda")
    queries, window, entries, ids, core = case
    tiling = together.tiling_of(torch.empty(len(visible), heads, 512, device="cuda"), entries, ids)
    assert tiling is not None and tiling.averages
    attended_again_and_again(case)
    sharp = queries, window, entries, ids, core._replace(scale=8 * core.scale)
    assert cases.decode_error(rows.attend_rows(*sharp), sharp) < 8e-3


def attended_again_and_again(case: tuple[Any, ...]) -> None:
    """As the reference says, at once and three times from a graph; the workspace is EMPTY then."""
    together = pytest.importorskip("triptych.kernels.attend_rows.together")
    poison()
    got = rows.attend_rows(*case)
    assert cases.decode_error(got, case) < 4e-3
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = [rows.attend_rows(*case) for _ in range(3)]
    for _ in range(3):
        for one in again:
            one.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(one, got) for one in again)
    assert all(bool((words == -1).all()) for words in together.workspace(got.device))


@pytest.mark.parametrize("kind", ["csa", "hca"])
def test_deterministic_rows_do_not_depend_on_their_mates(kind: str) -> None:
    queries, window, entries, ids, core = cases.decode_case(kind, VISIBLE, 64, ENTRY, 512, "cuda")
    together = rows.attend_rows_deterministic(queries, window, entries, ids, core)
    for n in range(len(VISIBLE)):
        one = slice(n, n + 1)
        alone = rows.attend_rows_deterministic(
            queries._replace(heads=queries.heads[one], angles=tuple(turn[one] for turn in queries.angles)),
            window._replace(positions=window.positions[one], slots=window.slots[one], lowest=window.lowest[one]),
            entries._replace(page_table=entries.page_table[one], visible=entries.visible[one], seq=entries.seq[:1]),
            None if ids is None else ids[one],
            core,
        )
        assert torch.equal(together[n], alone[0])


@pytest.mark.parametrize("kind", ["csa", "hca", "swa"])
@pytest.mark.parametrize("count", [1, 200])
def test_prefill_attention(kind: str, count: int) -> None:
    case = cases.step_case(kind, count, 1100, 64, ENTRY, 512, "cuda")
    poison()
    assert cases.step_error(attend.attend(*case), case) < 4e-3


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
@pytest.mark.parametrize("visible", [[2048, 600, 512, 3, 0], [17000, 9000, 2049, 700]])
def test_selection_of_decode_rows(kind: str, visible: list[int]) -> None:
    queries, keys = cases.index_case(kind, visible, 64, 128, "cuda")
    ordered, tops = select.ordered_scores(queries, keys)
    far, own = cases.index_errors(queries, keys, ordered)
    assert far < 1e-3
    assert cases.tops_are_right(ordered, tops, keys.visible)
    for topk in (512, 1024):
        poison()
        assert torch.equal(select.select_rows(queries, keys, topk), cases.best(own, keys.visible, topk))


@pytest.mark.parametrize("visible", [[2048, 600, 1, 2000], [4096, 513, 4000], [33000, 2049, 0]])
@pytest.mark.parametrize("programs", [1, 7, 132])
@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_a_launch_selects_however_many_programs_a_row_has(kind: str, visible: list[int], programs: int) -> None:
    """Again and again, as the last program of a row leaves its counter as it was; the second row has ties only."""
    hopper = pytest.importorskip("triptych.kernels.select_rows." + {"fp8": "hopper", "mxfp4": "mxfp4"}[kind])
    queries, keys = cases.index_case(kind, visible, 64, 128, "cuda")
    queries.weights[1] = 0
    room = select.ordered_scores(queries, keys)
    _, own = cases.index_errors(queries, keys, room[0])
    for topk in (512, 1024, 512):
        poison()
        got = hopper.choose(queries, keys, room, topk, programs)
        assert torch.equal(got, cases.best(own, keys.visible, topk))


@pytest.mark.parametrize(("kind", "visible"), [("fp8", 250000), ("fp8", 33000), ("mxfp4", 250000)])
def test_many_rows_of_a_long_context_choose_as_each_alone(kind: str, visible: int) -> None:
    """Programs that share a multiprocessor, and chips' worth of them, one after the other."""
    queries, _ = cases.index_case(kind, [32] * 128, 64, 128, "cuda")
    _, keys = cases.index_case(kind, [visible], 64, 128, "cuda")
    sees = visible - torch.arange(128, device="cuda") // 4
    keys = keys._replace(seq=torch.zeros(128, dtype=torch.int64, device="cuda"), visible=sees)
    alone = select._some_at_a_time(queries, keys, 512, 1)
    for _ in range(5):
        poison()
        got = select.select_rows(queries, keys, 512)
        assert torch.equal(got, alone), (got != alone).any(1).nonzero().flatten().tolist()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("visible", "programs"),
    [([262144], 132), ([33000, 4500, 600], 44), ([140000, 9000], 16), ([250000, 249998, 120000, 5000], 33)],
)
def test_programs_choose_together_whatever_the_scores(name: str, visible: list[int], programs: int) -> None:
    """Scores of any kind are what equal keys have by their scales. Where candidates are too many, one program chooses
    alone; counters are left 0 in either case."""
    hopper = pytest.importorskip("triptych.kernels.select_rows.hopper")
    seen = torch.tensor(visible, device="cuda")
    queries, keys = keys_with(scores_of(name, seen, -(-max(visible) // 32) * 32), seen)
    room = select.ordered_scores(queries, keys)
    ordered = cases.floats(room[0])
    unseen = torch.arange(ordered.shape[1], device="cuda") >= seen.unsqueeze(1)
    for topk in (512, 1024, 512):
        poison()
        got = hopper.choose(queries, keys, room, topk, programs)
        assert torch.equal(got, cases.best(ordered.masked_fill(unseen, float("-inf")), seen, topk))
        assert not counters(got.device).any()


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("many", [1, 300, 2000, 5000])
def test_ids_are_a_rows_own_whatever_its_scores(value: float, many: int) -> None:
    """Scores that are no numbers cost their own row only: attention must not read where nothing is."""
    hopper = pytest.importorskip("triptych.kernels.select_rows.hopper")
    seen = torch.tensor([33000, 5000, 33000], device="cuda")
    values = scores_of("random", seen, 33024)
    for row in (0, 1):
        values[row, torch.randperm(5000, device="cuda")[:many]] = value
    queries, keys = keys_with(values, seen)
    room = select.ordered_scores(queries, keys)
    ordered = cases.floats(room[0][2:, :33000])
    for topk in (512, 1024):
        good = cases.best(ordered, seen[2:], topk)[0]
        for programs in (1, 44):
            poison()
            got = hopper.choose(queries, keys, room, topk, programs)
            assert own_and_different(got, seen)
            assert torch.equal(got[2], good)
            assert not counters(got.device).any()
        assert own_and_different(highest(*cases.ordered(values), seen, topk), seen)


@pytest.mark.parametrize("apart", [0, 2, 4, 10])
def test_scales_of_mxfp4_keys_may_lie_apart(apart: int) -> None:
    """Each group's by itself: products are float16, which holds all of a sum only where scales are much alike."""
    queries, keys = cases.index_case("mxfp4", [17000, 9000, 2049, 700], 64, 128, "cuda")
    scales = keys.pool.scales
    scales.copy_(torch.randint(127 - apart, 128, scales.shape, device="cuda").to(torch.uint8))
    ordered, _ = select.ordered_scores(queries, keys)
    far, own = cases.index_errors(queries, keys, ordered)
    assert far < 1e-3
    assert torch.equal(select.select_rows(queries, keys, 512), cases.best(own, keys.visible, 512))


@pytest.mark.parametrize("per_page", [16, 64, 128])
def test_mxfp4_keys_lie_in_pages_of_other_sizes(per_page: int) -> None:
    visible = [5000, 4097, 300]
    queries, _ = cases.index_case("mxfp4", visible, 64, 128, "cuda")
    g = torch.Generator().manual_seed(per_page)
    keys = cases.paged(torch.tensor(visible), per_page, RowFormat("mxfp4", 128), g, "cuda")
    far, own = cases.index_errors(queries, keys, select.ordered_scores(queries, keys)[0])
    assert far < 1e-3
    assert torch.equal(select.select_rows(queries, keys, 512), cases.best(own, keys.visible, 512))


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_selection_of_prefill_rows(kind: str) -> None:
    queries, keys = cases.index_case(kind, [3000, 2500], 64, 128, "cuda")
    seq = torch.arange(60, device="cuda") // 30
    visible = torch.randint(600, 2500, (60,), device="cuda")
    q = index_queries(queries._replace(heads=queries.heads.float()))[seq]
    keys = keys._replace(seq=seq, visible=visible, most=2500)
    got, want = (f(q, queries.weights[seq], keys, 512) for f in (index.select_entries, index_ref.select_entries))
    same = sum(len(set(a) & set(b)) for a, b in zip(got.tolist(), want.tolist(), strict=True))
    assert same >= 0.999 * want.numel(), "scores that differ by rounding may change places at the end"


def own_and_different(ids: torch.Tensor, seen: torch.Tensor) -> bool:
    """Whether all ids [B, k] are of what rows see, and none is there twice."""
    alike = any(len(set(line)) < ids.shape[1] for line in ids.tolist())
    return bool(((ids >= 0) & (ids < seen.unsqueeze(1))).all()) and not alike


def keys_with(values: torch.Tensor, seen: torch.Tensor) -> tuple[IndexQueries, PagedEntries]:
    """Queries, and keys whose scores are in proportion to values [B, total]: equal keys, by their scales."""
    batch = len(values)
    queries, keys = cases.index_case("fp8", [32] * batch, 64, 128, "cuda")
    queries.weights.abs_()
    pages = values.numel() // 32
    pool = cases.pool_of(pages, 32, RowFormat("fp8", 128), "cuda")
    pool.values[:] = keys.pool.values[keys.page_table[0, 0], 0]
    pool.scales[:] = values.view(pages, 32, 1).view(torch.uint8)
    table = torch.arange(pages, device="cuda", dtype=torch.int32).view(batch, -1)
    return queries, keys._replace(pool=pool, page_table=table, visible=seen, most=int(seen.max()))


def scores_of(name: str, visible: torch.Tensor, total: int) -> torch.Tensor:
    """Scores [B, total] of a kind, -inf where a row sees none."""
    rows = len(visible)
    values = torch.randn(rows, total, device="cuda")
    line = torch.arange(total, device="cuda")
    if name == "ties":
        values = torch.randint(-3, 4, values.shape, device="cuda").float()
    elif name == "zero":
        values = values * 0
    elif name == "rising":
        values = line.float().repeat(rows, 1)
    elif name == "clustered":
        values[:, :1200] += 100
    elif name == "bands":
        values += (line // 700 % 3 == 0) * 4
    elif name == "outlier":
        values[:, 77] = 1e30
    elif name == "runs":
        values = values[:, ::64].repeat_interleave(64, 1)[:, :total]
    elif name == "equal":
        values = values * 0 + torch.arange(rows, device="cuda").unsqueeze(1) - 2
    elif name == "tiny":
        values = -values.abs() * 1e-30
    return values.masked_fill(line >= visible.unsqueeze(1), float("-inf"))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("total", [2048, 4096, 8192, 262144])
@pytest.mark.parametrize("k", [512, 1024])
def test_the_highest_are_exact_whatever_the_scores(name: str, total: int, k: int) -> None:
    visible = torch.tensor([total, total - 5, total // 2 + 1, k + 1], device="cuda")
    values = scores_of(name, visible, total)
    assert torch.equal(highest(*cases.ordered(values), visible, k), cases.best(values, visible, k))
