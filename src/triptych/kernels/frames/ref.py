"""Frames that come up from the host, with their checksums, in plain PyTorch.

A checksum is the sum of a frame's words, each times a random odd number, modulo 2**64. One wrong word always changes
it, and its terms may be added in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

_AT_ONCE = 64  # frames whose products are in memory together, if words have 8 bytes


def factors_of(size: int) -> Tensor:
    """Odd numbers [words] int64 for frames of `size` bytes, the same ones each time.

    A word has 8 bytes, or 4, or 1, as many as divide the size.
    """
    words = size // (8 if size % 8 == 0 else 4 if size % 4 == 0 else 1)
    return torch.randint(-(1 << 62), 1 << 62, (words,), generator=torch.Generator().manual_seed(0)) * 2 + 1


def words_of(frames: Tensor, factors: Tensor) -> Tensor:
    """Frames [n, bytes] uint8 as the words [n, words] that have factors; no copy."""
    wide = frames.shape[1] // len(factors)
    return frames.view({8: torch.int64, 4: torch.int32, 1: torch.uint8}[wide])


def checksums(frames: Tensor, factors: Tensor) -> Tensor:
    """Checksums [n] int64 of frames [n, bytes] uint8."""
    words = words_of(frames, factors)
    # narrow words become eight times as wide, so only some at a time
    return torch.cat([(some * factors).sum(dim=1) for some in words.split(_AT_ONCE * words.element_size() // 8)])


def bring_up(memory: Tensor, frames: Tensor, places: Tensor, factors: Tensor, table: Tensor) -> Tensor:
    """Copy frames of the host's memory [H, bytes] uint8 into frames [F, bytes] uint8, and compare what arrives.

    places [2, n] int64, on the host: rows of `memory`, and the rows of `frames` that get them, each once. With the
    frames: factors [words] as `factors_of` makes them; table [H] int64, the checksums of what `memory` is to hold.
    Returns [n] int64, what each checksum lacks of the table's: 0 where a frame has arrived whole.
    """
    arrived = memory.index_select(0, places[0]).to(frames.device)
    there = places.to(frames.device)
    frames.index_copy_(0, there[1], arrived)
    return table.index_select(0, there[0]) - checksums(arrived, factors)
