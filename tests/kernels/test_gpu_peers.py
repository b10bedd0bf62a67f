"""Vendors' kernels in the table: they get the keys, rows and choices that ours get, in the order that they want."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.quant.formats import RowFormat, packed
from triptych.kernels.quant.matrices import Fp8Matrix, quantize_rows

pytest.importorskip("triton", reason="ours, which are measured beside them, are Triton's")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT))
    yield importlib.import_module("benchmarks.gpu.peers")


def test_keys_are_the_same_in_pages_of_another_size(peers: ModuleType) -> None:
    form, batch, per_page, seen = RowFormat("fp8", 16), 3, 4, 32
    pages = batch * seen // per_page
    pool = packed(torch.randint(0, 256, (pages, per_page * form.row_bytes), dtype=torch.uint8), 0, per_page, form)
    each = torch.arange(batch)
    table = torch.randperm(pages, dtype=torch.int32).view(batch, -1)
    memory, places = peers.in_pages(PagedEntries(pool, table, each, torch.full_like(each, seen), seen), 8)
    assert memory.shape == (pages // 2, 8, 1, form.row_bytes) and places.shape == (batch, seen // 8)
    assert sorted(places.flatten().tolist()) == list(range(pages // 2))
    flat = memory.flatten(1)
    values, scales = flat[:, : 8 * 16].unflatten(1, (8, 16)), flat[:, 8 * 16 :].unflatten(1, (8, 4))
    for row in range(batch):
        for at in range(seen):
            page, offset = int(table[row, at // per_page]), at % per_page
            mine = int(places[row, at // 8])
            assert torch.equal(values[mine, at % 8], pool.values[page, offset])
            assert torch.equal(scales[mine, at % 8], pool.scales[page, offset])


def test_what_both_choose_is_counted(peers: ModuleType) -> None:
    ours = torch.tensor([[0, 3, 5, 9], [1, 2, -1, -1]])
    assert peers.in_common(ours, ours.flip(1), 10) == 1.0
    assert peers.in_common(ours, torch.tensor([[0, 3, 5, 8], [1, 7, -1, -1]]), 10) == pytest.approx(4 / 6)
    assert peers.in_common(ours, torch.full_like(ours, -1), 10) == 0.0, "a peer that writes nothing agrees with nothing"


@pytest.mark.parametrize(
    ("rows", "experts", "block"), [(1, 256, 8), (128, 256, 8), (512, 256, 16), (1024, 256, 32), (8192, 256, 64)]
)
def test_blocks_of_experts_are_those_of_vllm(peers: ModuleType, rows: int, experts: int, block: int) -> None:
    assert peers.block_of(6 * rows, experts) == block


def test_a_folder_without_the_libraries_is_refused_with_what_would_fill_it(peers: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "_C_stable_libtorch.abi3.so").touch()
    with pytest.raises(FileNotFoundError, match=r"_moe_C.*pip install --no-deps --target .* vllm==0.26.0"):
        peers.load(tmp_path)


def test_products_get_the_rows_and_weights_that_ours_get(peers: ModuleType) -> None:
    library = SimpleNamespace(fp8_gemm_nt=gemm, fp8_einsum=einsum, get_mn_major_tma_aligned_tensor=by_columns)
    given = peers.Peers(library, None, None)
    rows, weight = quantize_rows(torch.randn(5, 256)), fp8(384, 256)
    [got] = peers.product(given, rows, weight)()
    close(got, rows.dequantize() @ weight.dequantize().T)
    x, stack = torch.randn(5, 2, 256), fp8(2, 128, 256)
    [got] = peers.product(given, x, stack)()
    rounded = quantize_rows(x.view(-1, 256)).dequantize().view_as(x)
    close(got, torch.einsum("bgk,gnk->bgn", rounded, stack.dequantize()).flatten(1))


def fp8(*size: int) -> Fp8Matrix:
    scales = 2.0 ** torch.randint(-3, 3, (*size[:-2], size[-2] // 128, size[-1] // 128))
    return Fp8Matrix(torch.randn(size).to(torch.float8_e4m3fn), scales)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.float(), want, rtol=1e-2, atol=1e-1)


# ---- a library that takes what DeepGEMM takes


def gemm(rows: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], out: Tensor, *, disable_ue8m0_cast: bool) -> None:
    assert disable_ue8m0_cast, "scales are float32 on Hopper"
    assert rows[1].stride(0) == 1 and rows[1].stride(1) % 4 == 0
    out.copy_(scaled(*rows) @ Fp8Matrix(*weight).dequantize().T)


def einsum(
    what: str, rows: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], out: Tensor, *, recipe: tuple[int, ...]
) -> None:
    assert recipe == (1, 128, 128)
    assert rows[1].stride(0) == 1 and rows[1].stride(2) % 4 == 0
    out.copy_(torch.einsum(what, scaled(*rows), Fp8Matrix(*weight).dequantize()))


def by_columns(scales: Tensor) -> Tensor:
    rows, columns = scales.shape
    return torch.zeros(columns, -(-rows // 4) * 4)[:, :rows].copy_(scales.T).T


def scaled(values: Tensor, scales: Tensor) -> Tensor:
    return values.float() * scales.repeat_interleave(128, -1)
