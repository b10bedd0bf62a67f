"""Frames on the host, where they are to go on a device, and whether all of them have come."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from triptych.kernels.frames import BringUp
from triptych.kernels.frames.ref import checksums, factors_of

SIZES = (16, 4096, 4104, 4100, 4097, 33024)
"""Bytes of a frame: words of 8, 4 and 1 bytes, rows that begin at multiples of 16 bytes and elsewhere; one block and
several."""


def comes_up(bring_up: BringUp, size: int, count: int, device: str = "cpu") -> bool:
    """True if `count` of 9 frames come to scattered places between others that stay as they are, and are compared."""
    draw = torch.Generator().manual_seed(size)
    memory = torch.empty(9, size, dtype=torch.uint8, pin_memory=device != "cpu")
    memory.random_(0, 256, generator=draw)
    wide = torch.full((11, size + 64), 7, dtype=torch.uint8)
    places = torch.stack([torch.randperm(9, generator=draw)[:count], torch.randperm(11, generator=draw)[:count]])
    factors, there = factors_of(size), wide.to(device)
    table = checksums(memory, factors)
    table[::2] += 3
    given = there[:, :size], places, factors.to(device), table.to(device)
    with nullcontext() if device == "cpu" else torch.cuda.stream(torch.cuda.Stream()):
        left = bring_up(memory, *given).cpu()
    wide[places[1], :size] = memory[places[0]]
    return torch.equal(there.cpu(), wide) and torch.equal(left, (places[0] + 1) % 2 * 3)
