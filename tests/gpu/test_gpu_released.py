"""Products over released weights on the GPU against the references, at the shapes of V4-Flash and V4-Pro."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from triptych.kernels.linear import portable
from triptych.kernels.linear import ref as linear_ref
from triptych.kernels.linear.triton import front_linear, grouped_linear, linear, quantize
from triptych.kernels.mhc import ref as mhc_ref
from triptych.kernels.mhc import together
from triptych.kernels.mhc.ref import MhcSite, Residual, Uncollapsed
from triptych.kernels.mhc.triton import mhc_first, mhc_rows
from triptych.kernels.moe import portable as mixtures
from triptych.kernels.moe import ref as moe_ref
from triptych.kernels.moe.ref import Experts, Router
from triptych.kernels.moe.triton import experts, moe_rows
from triptych.kernels.quant.matrices import (
    BothRows,
    Fp8Matrix,
    Fp8Rows,
    FrontMatrix,
    Mxfp4Matrix,
    Unnormed,
    quantize_rows,
)
from triptych.kernels.quant.ref import fake_quant_fp8

DIMS = {"flash": (4096, 2048), "pro": (7168, 3072), "tiny": (256, 128)}
LINEARS = [(4096, 8192), (7168, 2048), (256, 256), (40960, 1024), (17280, 768)]


def fp8(*size: int) -> Fp8Matrix:
    *outer, n, k = size
    values = torch.randn(size, device="cuda").to(torch.float8_e4m3fn)
    scales = 2.0 ** torch.randint(-8, -4, (*outer, -(-n // 128), k // 128), device="cuda")
    return Fp8Matrix(values, scales)


def mxfp4(count: int, n: int, k: int) -> Mxfp4Matrix:
    values = torch.randint(0, 256, (count, n, k // 2), dtype=torch.uint8, device="cuda")
    return Mxfp4Matrix(values, torch.randint(114, 122, (count, n, k // 32), dtype=torch.uint8, device="cuda"))


def agree(run: Callable[[], Tensor], want: Tensor, limit: float = 5e-3) -> None:
    """Near the reference, whatever lay in memory before, and the same to the bit when run again."""
    torch.full((1 << 25,), float("nan"), device="cuda")
    _ = [torch.full((1 << 17,), float("nan"), device="cuda") for _ in range(8)]  # small ones have memory of their own
    got = run()
    near(got, want, limit)
    assert torch.equal(got, run())


def near(got: Tensor, want: Tensor, limit: float) -> None:
    """The distance between the two is small beside the reference."""
    error = float((got.double() - want.double()).norm() / want.double().norm())
    assert error < limit, error


def test_quantised_rows_equal_the_reference_to_the_bit() -> None:
    x = (torch.randn(77, 1536, device="cuda") * torch.logspace(-8, 4, 77, device="cuda")[:, None]).to(torch.bfloat16)
    got, want = quantize(x), quantize_rows(x)
    assert torch.equal(got.values.view(torch.uint8), want.values.view(torch.uint8))
    assert torch.equal(got.scales, want.scales)


@pytest.mark.parametrize("run", [linear, portable.linear], ids=("own", "portable"))
@pytest.mark.parametrize("size", LINEARS)
@pytest.mark.parametrize("rows", [1, 8, 17, 33, 64, 128, 260, 700])
def test_fp8_linears(size: tuple[int, int], rows: int, run: Callable[..., Tensor]) -> None:
    x, weight = torch.randn(rows, size[1], device="cuda").to(torch.bfloat16), fp8(*size)
    agree(lambda: run(x, weight), linear_ref.linear(x, weight))


@pytest.mark.parametrize("rows", [20, 50, 128])
def test_scales_of_rows_may_lie_either_way(rows: int) -> None:
    x, weight = quantize(torch.randn(rows, 1024, device="cuda").to(torch.bfloat16)), fp8(4096, 1024)
    ways = (x.scales.contiguous(), x.scales.T.contiguous().T)
    by_row, by_column = (linear(Fp8Rows(x.values, scales), weight) for scales in ways)
    assert torch.equal(by_row, by_column)


@pytest.mark.parametrize("columns", [(1536, 2624, 4096), (256, 1000, 1024), (192, 392, 256)])
@pytest.mark.parametrize("rows", [1, 5, 16, 30, 60, 100])
@pytest.mark.parametrize("run", [front_linear, portable.front_linear], ids=("own", "portable"))
def test_fronts(columns: tuple[int, int, int], rows: int, run: Callable[..., Tensor]) -> None:
    latent, rest, k = columns
    front = FrontMatrix(fp8(latent, k), torch.randn(rest, k, device="cuda").to(torch.bfloat16) / 64)
    x = torch.randn(rows, k, device="cuda").to(torch.bfloat16)
    agree(lambda: run(x, front), linear_ref.front_linear(x, front))


@pytest.mark.parametrize("size", [(32768, 1024), (40960, 1024), (192, 2048), (128, 1536)])
def test_a_row_is_normed_by_its_product(size: tuple[int, int]) -> None:
    weight, columns = fp8(*size), torch.randn(1, size[1] + 64, device="cuda").to(torch.bfloat16).float()
    x = Unnormed(columns[:, : size[1]], torch.rand(size[1], device="cuda") + 0.5, 1e-6)
    agree(lambda: linear(x, weight), linear_ref.linear(x, weight))


@pytest.mark.parametrize("size", [(8, 1024, 4096), (4, 64, 128)])
@pytest.mark.parametrize("rows", [1, 4, 7, 16, 32, 64, 100, 260, 600])
@pytest.mark.parametrize("run", [grouped_linear, portable.grouped_linear], ids=("own", "portable"))
def test_grouped_linears(size: tuple[int, int, int], rows: int, run: Callable[..., Tensor]) -> None:
    weight, x = fp8(*size), torch.randn(rows, size[0], size[2], device="cuda").to(torch.bfloat16)
    agree(lambda: run(x, weight), linear_ref.grouped_linear(x, weight))


@pytest.mark.parametrize("size", [(8, 1024, 4096), (16, 1024, 4096), (2, 128, 128)])
@pytest.mark.parametrize("rows", [1, 4, 9, 16, 24, 60, 128, 300])
def test_grouped_linears_round_for_who_would_round_their_result(size: tuple[int, int, int], rows: int) -> None:
    weight, x = fp8(*size), torch.randn(rows, size[0], size[2], device="cuda").to(torch.bfloat16)
    got, plain = grouped_linear(x, weight, rounds=True), grouped_linear(x, weight)
    assert isinstance(got, Fp8Rows) and isinstance(plain, Tensor)
    want = quantize_rows(plain)
    assert torch.equal(got.values.view(torch.uint8), want.values.view(torch.uint8))
    assert torch.equal(got.scales, want.scales)


@pytest.mark.parametrize("size", [1.0e-4, 1.0, 300.0])
@pytest.mark.parametrize("rows", [5, 20, 40, 128, 200])
def test_grouped_linears_lose_nothing_of_rows_of_any_size(rows: int, size: float) -> None:
    """Rows whose values differ by many powers of two, against float64."""
    weight, x = fp8(8, 1024, 4096), torch.randn(rows, 8, 4096, device="cuda") * size
    x = (x * 2.0 ** torch.randint(-12, 1, x.shape, device="cuda")).to(torch.bfloat16)
    want = torch.einsum("rgk,gnk->rgn", x.double(), weight.dequantize().double()).flatten(1)
    got = grouped_linear(x, weight)
    assert isinstance(got, Tensor)
    assert float((got.double() - want).norm() / want.norm()) < 2.5e-3  # of which bf16 is 1.7e-3


@pytest.mark.parametrize("power", [-90, -10, 20])
@pytest.mark.parametrize("rows", [5, 40, 128])
def test_grouped_linears_keep_the_smallest_weights(rows: int, power: int) -> None:
    """Those below e4m3's normal numbers, whatever their scale."""
    codes = torch.randint(0, 8, (2, 128, 512), device="cuda") + 128 * torch.randint(0, 2, (2, 128, 512), device="cuda")
    scales = torch.full((2, 1, 4), 2.0**power, device="cuda")
    weight = Fp8Matrix(codes.to(torch.uint8).view(torch.float8_e4m3fn), scales)
    x = torch.randn(rows, 2, 512, device="cuda").to(torch.bfloat16)
    want = torch.einsum("rgk,gnk->rgn", x.double(), weight.dequantize().double()).flatten(1)
    got = grouped_linear(x, weight)
    assert isinstance(got, Tensor)
    assert float((got.double() - want).norm() / want.norm()) < 2.5e-3


@pytest.mark.parametrize("dim", [4096, 7168])
def test_sites_and_fronts_round_to_the_bit(dim: int) -> None:
    fn, base, scale = (torch.randn(size, device="cuda") for size in ((24, 4 * dim), 24, 3))
    site = MhcSite(fn / 64, base, scale, 20, 1e-6, 1e-6, rounds=True)
    for rows in (1, 17, 300):
        embed = torch.randn(rows, dim, device="cuda").to(torch.bfloat16)
        x, *_ = mhc_first(torch.arange(rows, device="cuda"), embed, site, torch.ones(dim, device="cuda"))
        want = quantize_rows(x.plain)
        assert torch.equal(x.rounded.values.view(torch.uint8), want.values.view(torch.uint8))
        assert torch.equal(x.rounded.scales, want.scales)


def _layer(name: str, hashed: bool) -> tuple[Router, Experts, tuple[Fp8Matrix, Fp8Matrix]]:
    return layer_of(*DIMS[name], hashed=hashed)


def layer_of(dim: int, inner: int, *, hashed: bool) -> tuple[Router, Experts, tuple[Fp8Matrix, Fp8Matrix]]:
    """24 experts, of which a row takes 6."""
    table = torch.stack([torch.randperm(24, device="cuda")[:6] for _ in range(50)]) if hashed else None
    bias = None if hashed else torch.randn(24, device="cuda") * 0.1
    router = Router(torch.randn(24, dim, device="cuda") * dim**-0.5, bias, table, 6, 1.5)
    moe = Experts(mxfp4(24, 2 * inner, dim), mxfp4(24, dim, inner), 10.0)
    return router, moe, (fp8(2 * inner, dim), fp8(dim, inner))


def tiled(moe: Experts) -> Experts:
    """A copy as Hopper's own kernels read it."""
    w13, w2 = (Mxfp4Matrix(m.values.clone(), m.scales.clone()) for m in (moe.w13, moe.w2))  # type: ignore[union-attr]
    return Experts(w13.in_tiles(paired=True), w2.in_tiles(paired=False), moe.limit)


@pytest.mark.parametrize("name", DIMS)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_mixtures_of_few_rows_wait_for_their_own_hidden_values(name: str, rows: int) -> None:
    """Launch behind launch of a graph, over what the one before left: the counters by which programs wait are zero."""
    router, moe, shared = _layer(name, hashed=False)
    fast, tokens = tiled(moe), torch.zeros(rows, dtype=torch.int64, device="cuda")
    rest = [torch.randn(rows, DIMS[name][0], device="cuda").to(torch.bfloat16) for _ in range(3)]
    want = [moe_rows(x, tokens, router, fast, shared) for x in rest]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [moe_rows(x, tokens, router, fast, shared) for x in rest * 4]
    for _ in range(5):
        for out in got:
            out.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, want * 4, strict=True))


@pytest.mark.parametrize("name", DIMS)
@pytest.mark.parametrize("rows", [1, 2, 4, 7, 8, 31, 64, 128, 260, 999])
def test_mixtures(name: str, rows: int) -> None:
    router, moe, shared = _layer(name, hashed=rows % 2 == 0)
    x = torch.randn(rows, DIMS[name][0], device="cuda").to(torch.bfloat16)
    tokens = torch.randint(0, 50, (rows,), device="cuda")
    want = moe_ref.moe_rows(x, tokens, router, moe, shared)
    fast = tiled(moe)
    # where a sum of limited precision is a little off, a hidden value may lie an e4m3 step off; of many rows the shared
    # expert's gate and up are bf16 too
    agree(lambda: moe_rows(x, tokens, router, fast, shared), want, 1.2e-2 if rows <= 96 else 2e-2)


def _site_of(dim: int) -> tuple[Tensor, Residual, MhcSite, Tensor]:
    """A row of output of a block, what the site before it left, and a site."""
    fn, base, scale = (torch.randn(size, device="cuda") for size in ((24, 4 * dim), 24, 3))
    y, streams = torch.randn(1, dim, device="cuda"), torch.randn(1, 4, dim, device="cuda")
    post, comb = torch.rand(1, 4, device="cuda"), torch.rand(1, 4, 4, device="cuda") / 4
    site, norm = MhcSite(fn / 64, base, scale, 20, 1e-6, 1e-6), torch.randn(dim, device="cuda")
    return y.to(torch.bfloat16), Residual(streams.to(torch.bfloat16), post, comb), site, norm


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_a_site_of_a_single_row_takes_one_launch(name: str) -> None:
    y, before, site, norm = _site_of(DIMS[name][0])
    assert together.fits(before.streams)
    want = mhc_ref.mhc_rows(y, before, site, norm)
    graph, got = torch.cuda.CUDAGraph(), mhc_rows(y, before, site, norm)
    for some in (got, mhc_rows(y, before, site._replace(rounds=True), norm)):
        assert not isinstance(some[0], Uncollapsed)
        x = some[0].plain if isinstance(some[0], BothRows) else some[0]
        for one, other in zip((x, *some[1:]), want, strict=True):
            near(one, other, 2e-3 if one.dtype == torch.bfloat16 else 1e-4)
        if isinstance(some[0], BothRows):
            rounded = quantize_rows(x)
            assert torch.equal(some[0].rounded.dequantize(), rounded.dequantize())
    embed, tokens = torch.randn(50, DIMS[name][0], device="cuda").to(torch.bfloat16), torch.tensor([9], device="cuda")
    firsts = mhc_first(tokens, embed, site, norm), mhc_ref.mhc_first(tokens, embed, site, norm)
    for one, other in zip(*firsts, strict=True):
        assert isinstance(one, Tensor) and isinstance(other, Tensor)
        near(one, other, 2e-3 if one.dtype == torch.bfloat16 else 1e-4)
    with torch.cuda.graph(graph):
        again = mhc_rows(y, before, site, norm)
    for _ in range(50):
        for tensor in again:
            tensor.fill_(7.0)
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(again, got, strict=True))


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("name", ["flash", "pro"])
def test_a_mixture_runs_the_site_of_a_single_row(name: str, hashed: bool) -> None:
    router, moe, shared = _layer(name, hashed)
    y, before, site, norm = _site_of(DIMS[name][0])
    fast, tokens = tiled(moe), torch.tensor([7], device="cuda")
    x, *want = mhc_rows(y, before, site, norm)
    halfway, *got = mhc_rows(y, before, site._replace(leaves=True), norm)
    assert isinstance(x, Tensor) and isinstance(halfway, Uncollapsed)
    agree(lambda: moe_rows(halfway, tokens, router, fast, shared), moe_rows(x, tokens, router, fast, shared))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", DIMS)
@pytest.mark.parametrize("rows", [1, 999])
def test_experts_of_many_rows(name: str, rows: int) -> None:
    router, moe, _ = _layer(name, hashed=False)
    x = fake_quant_fp8(torch.randn(rows, DIMS[name][0], device="cuda").to(torch.bfloat16).float())
    ids, weights = moe_ref.route(x, torch.zeros(rows, dtype=torch.int64, device="cuda"), router)
    want = moe_ref.experts(x, ids, weights, moe, fake_quant_fp8)
    fast = tiled(moe)
    agree(lambda: experts(x, ids, weights, fast, fake_quant_fp8), want, 8e-3)
    agree(lambda: mixtures.experts(x, ids, weights, moe), want, 2.5e-2)
