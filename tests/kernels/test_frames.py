"""Frames come up from the host whole, and their checksums tell."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from frames_cases import SIZES, comes_up
from in_interpreter import rows_of

from triptych.kernels.frames import bringer, ref


@pytest.mark.parametrize("size", SIZES)
def test_the_reference_brings_frames_up(size: int) -> None:
    assert comes_up(ref.bring_up, size, 4)


def test_kernels_bring_up_what_the_reference_does() -> None:
    found = rows_of("interpreted_frames.py")
    assert len(found) == 2 * 3 * len(SIZES)
    assert not [row["what"] for row in found if not row["ok"]]


@pytest.mark.parametrize("size", SIZES)
def test_a_flipped_bit_of_any_word_changes_the_checksum(size: int) -> None:
    frames = torch.randint(0, 256, (1, size), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    factors = ref.factors_of(size)
    wide = size // len(factors)
    flipped = frames.repeat(len(factors), 1)
    flipped[torch.arange(len(factors)), torch.arange(0, size, wide)] ^= 1 << torch.arange(len(factors)) % 8
    assert not (ref.checksums(flipped, factors) == ref.checksums(frames, factors)).any()


@pytest.mark.parametrize("name", ["cuMemcpyBatchAsync", "cuMemcpyBatchAsync_v2"])
def test_the_driver_is_asked_for_all_copies_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = _engines()
    asked = []

    def call(to: Any, from_: Any, sizes: Any, count: Any, *rest: Any) -> int:
        arrays = [ctypes.cast(array, ctypes.POINTER(ctypes.c_uint64))[: count.value] for array in (to, from_, sizes)]
        for each in zip(*arrays, strict=True):
            ctypes.memmove(*each)
        asked.append((len(rest), rest[0]._obj.order, rest[-1].value))
        return 0

    monkeypatch.setattr(ctypes, "PyDLL", lambda _: SimpleNamespace(**{name: call}))
    source = torch.arange(60, dtype=torch.uint8).view(5, 12)
    target = torch.zeros(3, 12, dtype=torch.uint8)
    rows = engines._rows(target, np.array([2, 0])), engines._rows(source, np.array([4, 1]))
    engines.driver_copies.__wrapped__()(*rows, 12, 7)
    assert torch.equal(target, torch.stack([source[1], torch.zeros_like(source[0]), source[4]]))
    assert asked == [(4 if name.endswith("v2") else 5, 1, 7)], "in the order of stream 7"


def test_a_driver_that_cannot_be_asked_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = _engines()
    monkeypatch.setattr(ctypes, "PyDLL", lambda _: SimpleNamespace(cuMemcpyAsync=None))
    assert engines.driver_copies.__wrapped__() is None
    monkeypatch.setattr(ctypes, "PyDLL", lambda _: SimpleNamespace(cuMemcpyBatchAsync=lambda *_: 801))
    with pytest.raises(RuntimeError, match=r"refuses to copy 1 frames from the host .error 801"):
        engines.driver_copies.__wrapped__()(np.zeros(1, np.uint64), np.zeros(1, np.uint64), 16, 7)


def _engines() -> Any:
    pytest.importorskip("triton")
    from triptych.kernels.frames import engines

    return engines


def test_what_is_not_pinned_is_brought_by_the_reference() -> None:
    memory = torch.empty(2, 16, dtype=torch.uint8)
    assert bringer(memory, torch.device("cuda")) is bringer(memory, torch.device("cpu")) is ref.bring_up
