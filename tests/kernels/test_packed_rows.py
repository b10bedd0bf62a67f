"""Packed pools: same bytes as the pages, exact round trips of rounded rows, and engines that say the same with them."""

from __future__ import annotations

import pytest
import torch

from triptych.cache.geometry import CacheCapacity, CacheGeometry
from triptych.config import SHAPES, ModelShape
from triptych.engine.pools import Pools
from triptych.kernels.quant import pages, ref
from triptych.kernels.quant.formats import PackedRows, RowFormat, packed, rounded_like, write_rows
from triptych.model.numerics import Native

SMALL = ModelShape(
    vocab_size=16, hidden_size=8, ratios=(0, 4, 128, 4, 128, 128), num_heads=2, head_dim=96, rope_dim=16,
    q_lora_rank=4, o_groups=2, o_lora_rank=2, index_heads=2, index_head_dim=32, index_topk=4, num_experts=2,
    experts_per_token=1, moe_intermediate_size=4, num_hash_layers=1, routed_scaling=1.0, num_mtp_layers=0,
)  # fmt: skip
FORMATS = [RowFormat("entry", 512, 64), RowFormat("entry", 96, 16), RowFormat("fp8", 128), RowFormat("mxfp4", 128)]


def native_rows(form: RowFormat, count: int, seed: int = 0) -> torch.Tensor:
    """Rows as native numerics leave them."""
    x = torch.randn(count, form.dim, generator=torch.Generator().manual_seed(seed)) * 3
    return Native().latent(x, form.rope) if form.kind == "entry" else Native().index(x)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_native_rows_come_back_bit_for_bit(form: RowFormat) -> None:
    pool = packed(torch.full((5, 7 * form.row_bytes + 48), 0xFF, dtype=torch.uint8), 16, 7, form)
    rows = native_rows(form, 6)
    page, offset = torch.tensor([4, 0, 2, 2, 4, 3]), torch.tensor([0, 6, 1, 2, 5, 3])
    write_rows(pool, (page, offset), rows)
    assert torch.equal(pool[page, offset], rows)
    assert torch.equal(pool[page.view(2, 3), offset.view(2, 3)], rows.view(2, 3, -1))
    assert torch.equal(rounded_like(pool, rows), rows)
    assert pool[torch.tensor([1]), torch.tensor([1])].isnan().all() or form.kind == "fp8", "the rest is untouched"


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_pool_has_the_bytes_of_a_page(form: RowFormat) -> None:
    memory = torch.zeros(1, 9 * form.row_bytes, dtype=torch.uint8)
    rows = torch.randn(9, form.dim, generator=torch.Generator().manual_seed(1))
    packed(memory, 0, 9, form)[torch.zeros(9, dtype=torch.int64), torch.arange(9)] = rows
    page = {
        "entry": lambda: pages.pack_entries(rows, form.rope),
        "fp8": lambda: pages.pack_index_keys_fp8(rows),
        "mxfp4": lambda: pages.pack_index_keys_mxfp4(rows),
    }[form.kind]()
    assert torch.equal(memory[0], page)


def pools(index: str) -> Pools:
    geometry = CacheGeometry.of(SMALL, "fp8", index)  # type: ignore[arg-type]
    made = Pools(SMALL, geometry, CacheCapacity(frames=4 + geometry.snapshot_frames, slots=2))
    made.frames.view(torch.uint8).fill_(0xFF)
    made.window.fill_(0xFF)
    return made


@pytest.mark.parametrize("index", ["fp8", "mxfp4", "bfloat16", "float32"])
def test_no_two_rows_of_a_page_share_bytes(index: str) -> None:
    made = pools(index)
    written = []
    for cache in made.layers:
        for pool in (cache.entries, cache.index_keys):
            if pool is None:
                continue
            rows = torch.randn(pool.shape[1], pool.shape[2], generator=torch.Generator().manual_seed(len(written)))
            rows = ref.fake_quant_fp4(rows)
            offset = torch.arange(pool.shape[1])
            write_rows(pool, (torch.ones_like(offset), offset), rows)
            written.append((pool, offset, rounded_like(pool, rows)))
    assert all(torch.equal(pool[torch.ones_like(at), at].to(rows.dtype), rows) for pool, at, rows in written)
    assert bool((made.frames[0] == 0xFF).all()) and bool((made.frames[2] == 0xFF).all())


def test_rings_of_layers_and_slots_are_apart_and_snapshots_keep_them() -> None:
    made = pools("fp8")
    form = RowFormat("entry", 96, 16)
    flat = torch.cat([slot * made.window_stride + torch.arange(260) for slot in (0, 1)])
    rows = [native_rows(form, 520, seed) for seed in range(SMALL.num_layers)]
    for cache, mine in zip(made.layers, rows, strict=True):
        write_rows(cache.window, flat, mine)
    assert all(torch.equal(c.window[flat], mine) for c, mine in zip(made.layers, rows, strict=True))
    frames = range(4, 4 + len(made.frames) - 4)
    made.save(1, 256, frames)
    made.restore(0, 256, frames)
    ring = (torch.arange(256 - 132, 252)) % 260
    for cache, mine in zip(made.layers, rows, strict=True):
        assert torch.equal(cache.window[ring], mine[260 + ring])
        assert torch.equal(cache.window[torch.tensor([253])], mine[253:254])
    for layer, mine in enumerate(rows):
        row = layer * 128 + torch.arange(128)
        there = made.layers[0].frames[torch.tensor(frames)[row // made.rows_per_frame], row % made.rows_per_frame]
        assert torch.equal(there, mine[260 + ring])


@pytest.mark.parametrize("shape", ["flash", "pro"])
@pytest.mark.parametrize("index", ["fp8", "mxfp4"])
def test_values_lie_where_wide_loads_can_read_them(shape: str, index: str) -> None:
    geometry = CacheGeometry.of(SHAPES[shape], "fp8", index)  # type: ignore[arg-type]
    made = Pools(SHAPES[shape], geometry, CacheCapacity(frames=1, slots=1))
    for cache in made.layers:
        for pool in (cache.window, cache.frames, cache.entries, cache.index_keys):
            if isinstance(pool, PackedRows):
                steps = (pool.values.storage_offset(), *pool.values.stride()[:2])
                assert all(step % 16 == 0 for step in steps)
                assert pool.scales.stride(1) % 4 == 0 and pool.scales.storage_offset() % 4 == 0
