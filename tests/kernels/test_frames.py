"""Frames come up from the host whole, and their checksums tell."""

from __future__ import annotations

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


def test_what_is_not_pinned_is_brought_by_the_reference() -> None:
    memory = torch.empty(2, 16, dtype=torch.uint8)
    assert bringer(memory, torch.device("cuda")) is bringer(memory, torch.device("cpu")) is ref.bring_up
