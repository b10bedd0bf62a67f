"""Bytes against the reference's tables (sections 3.5, 4.1 to 4.3), and how memory is divided."""

from __future__ import annotations

import pytest

from triptych.cache import CacheCapacity, CacheGeometry, plan_capacity
from triptych.errors import ConfigError

FLASH = {"layers": 43, "csa_layers": tuple(range(2, 43, 2)), "hca_layers": tuple(range(3, 42, 2))}
PRO = {"layers": 61, "csa_layers": tuple(range(2, 61, 2)), "hca_layers": (0, 1, *range(3, 60, 2))}
DIMS = {"head_dim": 512, "rope_dim": 64, "index_head_dim": 128}
MIB = 1 << 20


def flash(kv: str = "fp8", index: str = "fp8") -> CacheGeometry:
    return CacheGeometry(**FLASH, **DIMS, kv_format=kv, index_format=index)


def pro(kv: str = "fp8", index: str = "fp8") -> CacheGeometry:
    return CacheGeometry(**PRO, **DIMS, kv_format=kv, index_format=index)


def test_layers_are_those_of_the_family() -> None:
    assert len(FLASH["csa_layers"]) == 21 and len(FLASH["hca_layers"]) == 20
    assert len(PRO["csa_layers"]) == 30 and len(PRO["hca_layers"]) == 31


def test_entry_sizes() -> None:
    geometry = flash()
    assert (geometry.main_entry_bytes, geometry.index_key_bytes, geometry.window_row_bytes) == (584, 132, 584)
    assert flash(index="mxfp4").index_key_bytes == 68
    assert (flash("bfloat16", "bfloat16").main_entry_bytes, flash("float32", "float32").main_entry_bytes) == (
        1024,
        2048,
    )
    assert (flash("bfloat16", "bfloat16").index_key_bytes, flash("float32", "float32").index_key_bytes) == (256, 512)


def test_page_sizes() -> None:
    assert flash().page_bytes == 492_832
    assert pro().page_bytes == 705_464
    assert flash().token_bytes == 3850.25
    assert flash(index="mxfp4").token_bytes == 3514.25
    assert pro().token_bytes == 5511.4375
    assert flash("bfloat16", "bfloat16").token_bytes == 6880
    assert pro("bfloat16", "bfloat16").token_bytes == 9848


def test_snapshot_and_slot_sizes() -> None:
    assert flash().snapshot_bytes == 43 * 128 * 584 == 3_214_336
    assert pro().snapshot_bytes == 61 * 128 * 584
    rings = 21 * 81_920 + 20 * 128 * 1024 * 4
    assert flash().slot_bytes == 43 * 260 * 584 + rings


def test_segments_tile_the_page() -> None:
    for geometry in (flash(), pro(), flash("float32", "float32")):
        at = 0
        for segment in geometry.segments:
            assert segment.offset == at
            at += segment.bytes
        assert at == geometry.page_bytes
        kinds = [segment.kind for segment in geometry.segments]
        assert kinds.count("csa_main") == kinds.count("csa_index") == len(geometry.csa_layers)
        assert kinds.count("hca") == len(geometry.hca_layers)
        assert [s.layer for s in geometry.segments] == sorted(s.layer for s in geometry.segments)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.25, 0.9])
@pytest.mark.parametrize("memory", [512 * MIB, 2048 * MIB, 49_000 * MIB])
def test_capacity_uses_the_memory_and_no_more(memory: int, share: float) -> None:
    geometry = flash()
    capacity = plan_capacity(geometry, memory, 16, share)
    used = capacity.bytes(geometry)
    assert memory - geometry.page_bytes < used <= memory
    assert capacity.slots == 16
    assert (capacity.snapshots > 0) == (share > 0)
    assert capacity.snapshots <= capacity.pages


def test_a_share_buys_snapshots_up_to_one_a_page() -> None:
    geometry = flash()
    rest = 4096 * MIB - 4 * geometry.slot_bytes
    assert plan_capacity(geometry, 4096 * MIB, 4, 0.25).snapshots == int(rest * 0.25) // geometry.snapshot_bytes
    most = plan_capacity(geometry, 4096 * MIB, 4, 0.9)
    assert most.snapshots == rest // (geometry.snapshot_bytes + geometry.page_bytes) <= most.pages


def test_too_little_memory_names_what_would_do() -> None:
    geometry = flash()
    least = 16 * geometry.slot_bytes + 2 * geometry.page_bytes + geometry.snapshot_bytes
    with pytest.raises(ConfigError, match=r"--kv-memory to at least .* or lower --max-running"):
        plan_capacity(geometry, least - 1, 16, 0.25)
    assert plan_capacity(geometry, least, 16, 0.25).pages >= 2


def test_capacity_without_pages_is_refused() -> None:
    with pytest.raises(ConfigError):
        CacheCapacity(0, 1, 0)


def test_the_banner_says_how_many_tokens_fit() -> None:
    capacity = plan_capacity(flash(), 4096 * MIB, 4, 0.25)
    line = capacity.describe(flash())
    assert f"{capacity.pages * 128:,} tokens" in line and "481.3 KiB" in line and "fp8" in line
