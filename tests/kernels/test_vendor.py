"""Vendors' kernels without a GPU: when they are chosen, how they see our caches, and what is handed to them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import pytest
import torch
from in_interpreter import rows_of

from triptych.errors import ConfigError
from triptych.kernels import registry, vendors
from triptych.kernels.quant.formats import PackedRows, RowFormat, packed

FORM = RowFormat("entry", 512, 64)
HOPPER = (9, 0)


def chosen(**options: Any) -> registry.Choice:
    """What serves attention of decode rows on a GPU."""
    [row] = [row for row in registry.table(device="cuda", **options) if row.op == "attend_rows"]
    return row


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every vendor's package in its supported version, as far as metadata tell."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    versions = {vendor.package: vendor.version for vendor in vendors.VENDORS.values()}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions[name])


@pytest.mark.usefixtures("installed")
def test_an_installed_vendor_is_chosen_on_its_gpus_unless_ours_is_asked_for() -> None:
    auto, forced, ours = (chosen(backend=b, capability=HOPPER) for b in ("auto", "vendor", "triton"))
    assert auto.backend == forced.backend == "vendor" and ours.backend == "triton"
    assert (
        "for long lists" in auto.reason and "wherever it can serve" in forced.reason and "not asked for" in ours.reason
    )
    newer = chosen(capability=(12, 0))
    assert newer.backend == "triton" and "needs a GPU of compute capability 9.0" in newer.reason
    assert chosen(backend="ref", capability=HOPPER).backend == "ref"


def test_a_missing_vendor_is_named_with_its_remedy() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    row = chosen(capability=HOPPER)
    assert row.backend == "triton" and "FlashMLA is not installed" in row.reason
    assert "pip install --no-deps sgl-flash-mla==" in row.reason
    with pytest.raises(ConfigError, match="No vendor's kernel can run here"):
        chosen(backend="vendor", capability=HOPPER)


def test_vendors_kernels_are_refused_on_a_processor() -> None:
    with pytest.raises(ConfigError, match="vendor kernels run on an NVIDIA GPU"):
        registry.table("vendor")


@pytest.mark.usefixtures("installed")
def test_deterministic_results_are_not_left_to_a_vendor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_refuse", lambda *given: None)  # whatever else it minds
    row = chosen(capability=HOPPER, deterministic=True)
    assert row.backend == "triton" and "not deterministic" in row.reason
    with pytest.raises(ConfigError, match="FlashMLA is not deterministic"):
        chosen(backend="vendor", capability=HOPPER, deterministic=True)


@pytest.mark.usefixtures("installed")
def test_another_version_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")
    assert "9.9 is installed, and 1.0.0 is what is supported" in chosen(capability=HOPPER).reason


@pytest.mark.usefixtures("installed")
def test_a_package_that_does_not_load_leaves_our_kernel(caplog: pytest.LogCaptureFixture) -> None:
    from triptych.kernels.attend_rows import triton, vendor

    registry._cannot_load.cache_clear()
    vendor.load.cache_clear()
    kernels = registry.select(device="cuda", capability=HOPPER)  # metadata lie: there is no such package here
    assert kernels.attend_rows is triton.attend_rows
    assert "FlashMLA is installed and cannot be loaded" in caplog.text
    with pytest.raises(ConfigError, match="cannot be loaded"):
        registry.select("vendor", device="cuda", capability=HOPPER)
    registry._cannot_load.cache_clear()


@pytest.mark.parametrize(
    ("heads", "visible", "who"),
    [
        (128, [3] * 8, "ours"),
        (128, [2000] * 32, "ours"),
        (128, [2100], "ours"),
        (128, [2100] * 32, "vendor"),
        (64, [2100] * 32, "ours"),
    ],
)
def test_each_call_goes_where_its_shape_was_measured_faster(
    heads: int, visible: list[int], who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    import packed_cases as cases

    from triptych.kernels.attend_rows import triton, vendor

    case = cases.decode_case("hca", visible, heads, FORM, 512, "cpu")
    assert not vendor.serves(*case[:2]), "it needs a Hopper GPU"
    monkeypatch.setattr(vendor, "serves", lambda *given: True)
    monkeypatch.setattr(vendor, "by_flash_mla", lambda *given: "vendor")
    monkeypatch.setattr(triton, "attend_rows", lambda *given: "ours")
    assert vendor.attend_rows(*case) == who
    assert vendor.attend_rows_forced(*case) == "vendor"


def test_more_rows_and_longer_lists_never_make_flash_mla_the_slower_one() -> None:
    pytest.importorskip("triton")
    from triptych.kernels.attend_rows.vendor import faster

    reaches, rows = (0, 64, 256, 640, 1024, 8192), (1, 2, 4, 8, 16, 64, 200)
    for heads in (64, 128):
        table = [[faster(heads, n, reach) for n in rows] for reach in reaches]
        for line in (*table, *map(list, zip(*table, strict=True))):
            assert line == sorted(line)


def filled(pool: PackedRows) -> PackedRows:
    """The pool with random rows."""
    pages, rows, dim = pool.shape
    at = torch.arange(pages * rows)
    pool[at // rows, at % rows] = torch.randn(pages * rows, dim)
    return pool


def pools() -> dict[str, PackedRows]:
    """Rows as the engine's caches hold them: of a page, of one layer between others, of a layer's ring in a slot."""
    page = packed(torch.zeros(5, 64 + 32 * 584 + 4224, dtype=torch.uint8), 64, 32, FORM)
    every = packed(torch.zeros(5, 32 + 80 * 584, dtype=torch.uint8), 32, 80, FORM)
    slots = torch.zeros(3, 4, 260 * 584, dtype=torch.uint8)
    layers = {f"layer {n} of 80": every.only(n) for n in (0, 1, 19, 71, 72, 79)}
    return {"page": page, "ring": packed(slots[:, 2], 0, 260, FORM, 4 * 260), **layers}


@pytest.mark.parametrize("name", pools())
def test_a_pool_is_read_in_place_through_pages_of_the_vendors(name: str) -> None:
    pytest.importorskip("triton")
    from flash_mla_model import read

    from triptych.kernels.attend_rows.vendor import grid_of

    pool = filled(pools()[name])
    grid = grid_of(pool)
    page, row = torch.meshgrid(torch.arange(pool.shape[0]), torch.arange(pool.shape[1]), indexing="ij")
    places = page * grid.rows + grid.first + row
    assert grid.first + pool.shape[1] <= grid.rows, "a place would name a row of the next page"
    assert torch.equal(read(grid.view, places.flatten()).float(), pool[page.flatten(), row.flatten()])


def test_rows_of_another_kind_are_refused() -> None:
    pytest.importorskip("triton")
    from triptych.kernels.attend_rows.vendor import grid_of

    page = packed(torch.zeros(5, 32 * 584, dtype=torch.uint8), 0, 32, FORM)
    apart = PackedRows(page.values, page.scales.clone(), FORM, 32)
    narrow = packed(torch.zeros(5, 32 * 584, dtype=torch.uint8), 0, 32, RowFormat("fp8", 128))
    for pool in (apart, narrow):
        with pytest.raises(ValueError, match="do not lie as FlashMLA reads them"):
            grid_of(pool)


def test_what_flash_mla_gets_gives_the_references_attention_in_the_interpreter() -> None:
    results = rows_of("flash_mla_model.py")
    assert len(results) == 15
    assert not [result for result in results if not result["ok"]]
