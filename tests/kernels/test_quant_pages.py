"""Byte pages of entries and index keys: sizes, layouts byte for byte, and lossless round trips of rounded values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from triptych.cache.geometry import CacheGeometry
from triptych.config import SHAPES
from triptych.kernels.quant import pages, ref


def rounded_entries(count: int, head_dim: int, rope_dim: int, seed: int = 0) -> Tensor:
    """Entries as native numerics leave them: e4m3 in groups of 64, bf16 in the rope dims."""
    x = torch.randn(count, head_dim, generator=torch.Generator().manual_seed(seed)) * 3
    nope = ref.fake_quant_fp8(x[:, : head_dim - rope_dim], 64)
    return torch.cat([nope, x[:, head_dim - rope_dim :].bfloat16().float()], 1)


@pytest.mark.parametrize("count", [1, 2, 3, 32, 64])
@pytest.mark.parametrize(("head_dim", "rope_dim"), [(512, 64), (64, 16), (48, 16), (100, 2)])
def test_rounded_entries_come_back_bit_for_bit(count: int, head_dim: int, rope_dim: int) -> None:
    entries = rounded_entries(count, head_dim, rope_dim)
    for align in (1, pages.ENTRY_ALIGN):
        page = pages.pack_entries(entries, rope_dim, align)
        assert page.numel() % align == 0
        assert torch.equal(pages.unpack_entries(page, count, head_dim, rope_dim), entries)


def test_sizes_of_released_pages() -> None:
    """Reference section 4.1: 64 entries take 37,376 bytes, 37,440 padded; 2 take 1,168, 1,728 padded."""
    for count, plain, padded in ((64, 37376, 37440), (2, 1168, 1728)):
        entries = rounded_entries(count, 512, 64)
        assert pages.pack_entries(entries, 64).numel() == plain == count * 584
        assert pages.pack_entries(entries, 64, pages.ENTRY_ALIGN).numel() == padded


def test_layout_of_an_entry_page() -> None:
    entries = rounded_entries(3, 512, 64)
    entries[1, :448] = 0.0
    entries[1, 64] = 448.0 * 2
    entries[1, 65] = -(2.0**-3)
    page = pages.pack_entries(entries, 64)
    row, scales = page[576 : 2 * 576], page[3 * 576 :].view(3, 8)
    assert row[64].item() == 0x7E and row[65].item() == 0x98  # 448 and -2^-4, to be multiplied by 2
    assert torch.equal(row[448:].clone().view(torch.bfloat16).float(), entries[1, 448:])
    assert scales[1].tolist() == [127 - 22, 128, 105, 105, 105, 105, 105, 0]


def test_entries_are_rounded_on_the_way_in() -> None:
    raw = torch.randn(5, 512, generator=torch.Generator().manual_seed(1))
    back = pages.unpack_entries(pages.pack_entries(raw, 64), 5, 512, 64)
    assert torch.equal(back[:, :448], ref.fake_quant_fp8(raw[:, :448], 64))
    assert torch.equal(back[:, 448:], raw[:, 448:].bfloat16().float())


@given(st.integers(1, 7), st.sampled_from([32, 64, 128]), st.integers(0, 2**32 - 1))
def test_index_keys_come_back_rounded(count: int, dim: int, seed: int) -> None:
    keys = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    page = pages.pack_index_keys_fp8(keys)
    assert page.numel() == count * (dim + 4)
    assert torch.equal(pages.unpack_index_keys_fp8(page, count, dim), ref.fake_quant_fp8(keys, dim))
    page = pages.pack_index_keys_mxfp4(keys)
    assert page.numel() == count * (dim // 2 + dim // 32)
    assert torch.equal(pages.unpack_index_keys_mxfp4(page, count, dim), ref.fake_quant_fp4(keys, 32))


def test_layouts_of_index_pages() -> None:
    keys = torch.zeros(2, 128)
    keys[1, 0], keys[1, 1], keys[1, 127] = 6.0, -0.5, 3.0
    page = pages.pack_index_keys_mxfp4(keys)
    assert page[64].item() == 0x97 and page[127].item() == 0x70  # codes 7 and 9; 0 and 7
    assert page[128:].tolist() == [1, 1, 1, 1, 127, 1, 1, 126]
    page = pages.pack_index_keys_fp8(keys)
    assert page[128:131].tolist() == [0x7C, 0xE0, 0x00]  # 384 and -32, to be multiplied by 2^-6
    assert page[256:].clone().view(torch.float32).tolist() == [2.0**-22, 2.0**-6]


def test_cache_geometry_counts_the_same_bytes() -> None:
    for shape in SHAPES.values():
        geometry = CacheGeometry.of(shape, "fp8")
        entry = pages.pack_entries(torch.zeros(1, shape.head_dim), shape.rope_dim)
        assert geometry.main_entry_bytes == entry.numel() == 584
        key = torch.zeros(1, shape.index_head_dim)
        assert geometry.index_key_bytes == pages.pack_index_keys_fp8(key).numel() == 132
        narrow = CacheGeometry.of(shape, "fp8", "mxfp4")
        assert narrow.index_key_bytes == pages.pack_index_keys_mxfp4(key).numel() == 68
