"""Bytes against the reference's tables (sections 3.5, 4.1 to 4.3), and how memory is divided."""

from __future__ import annotations

from itertools import pairwise, product

import pytest

from triptych.cache import CacheCapacity, CacheGeometry, plan_capacity
from triptych.cache.geometry import trapezoid_start
from triptych.config import SHAPES, KvFormat
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
    assert pro().page_bytes == 705_464 + 8, "8 bytes make it a multiple of 16"
    assert flash().token_bytes == 3850.25
    assert flash(index="mxfp4").token_bytes == 3514.25
    assert pro().token_bytes == 5511.5
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
        assert at <= geometry.page_bytes < at + 16 and geometry.page_bytes % 16 == 0
        assert all(segment.offset % 16 == 0 for segment in geometry.segments)
        kinds = [segment.kind for segment in geometry.segments]
        assert kinds.count("csa_main") == kinds.count("csa_index") == len(geometry.csa_layers)
        assert kinds[-1] == "hca" and kinds.count("hca") == 1
        assert geometry.segments[-1].entries == len(geometry.segments[-1].layers) == len(geometry.hca_layers)


@pytest.mark.parametrize("memory", [512 * MIB, 2048 * MIB, 49_000 * MIB])
def test_capacity_uses_the_memory_and_no_more(memory: int) -> None:
    geometry = flash()
    capacity = plan_capacity(geometry, memory, 16)
    used = capacity.bytes(geometry)
    assert memory - geometry.page_bytes < used <= memory
    assert capacity.slots == 16


@pytest.mark.parametrize(("shape", "limit"), [("flash", 3_700_000), ("pro", 5_300_000)])
def test_a_resumable_position_costs_little(shape: str, limit: int) -> None:
    """Bytes of all frames that a snapshot takes, in the released FP8 format; other engines pay 22 and 31.6 MB."""
    geometry = CacheGeometry.of(SHAPES[shape], "fp8")
    assert geometry.snapshot_bytes <= geometry.snapshot_frames * geometry.page_bytes <= limit


@pytest.mark.parametrize(("shape", "kv_format"), [*product(["flash", "pro"], ["fp8", "bfloat16", "float32"])])
def test_snapshot_rows_never_straddle_frames(shape: str, kv_format: KvFormat) -> None:
    geometry = CacheGeometry.of(SHAPES[shape], kv_format)
    assert geometry.rows_per_frame * geometry.window_row_bytes <= geometry.page_bytes
    assert geometry.snapshot_frames * geometry.rows_per_frame >= geometry.layers * 128
    assert (geometry.snapshot_frames - 1) * geometry.rows_per_frame < geometry.layers * 128


@pytest.mark.parametrize("layers", [1, 2, 5, 43, 61])
def test_each_layer_of_a_trapezoid_starts_127_later(layers: int) -> None:
    boundary = 128 * 200
    starts = [trapezoid_start(boundary, layers, layer) for layer in range(layers)]
    assert starts[-1] == boundary - 132
    assert all(below - above == 127 for above, below in pairwise(starts))
    assert trapezoid_start(128, layers) == 0


@pytest.mark.parametrize("shape", ["flash", "pro"])
def test_a_trapezoid_is_half_of_the_rectangle(shape: str) -> None:
    layers = SHAPES[shape].num_layers
    boundary = 1 << 20
    run = sum(boundary - trapezoid_start(boundary, layers, layer) for layer in range(layers))
    assert 0.49 < run / (128 * layers * layers) <= 0.52


def test_too_little_memory_names_what_would_do() -> None:
    geometry = flash()
    least = 16 * geometry.slot_bytes + (2 + geometry.snapshot_frames) * geometry.page_bytes
    with pytest.raises(ConfigError, match=r"--kv-memory to at least .* or lower --max-running"):
        plan_capacity(geometry, least - 1, 16)
    assert plan_capacity(geometry, least, 16).frames >= 2


def test_capacity_without_frames_is_refused() -> None:
    with pytest.raises(ConfigError):
        CacheCapacity(0, 1)


def test_the_banner_says_how_many_tokens_fit() -> None:
    capacity = plan_capacity(flash(), 4096 * MIB, 4)
    line = capacity.describe(flash())
    assert f"{capacity.frames * 128:,} tokens" in line and "481.3 KiB" in line and "fp8" in line
