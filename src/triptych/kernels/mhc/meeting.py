"""How the programs of one launch wait for each other's numbers.

A number travels with the launch's number beside it, 64 bits in one piece, so who waits for it looks at nothing else:
there is no barrier among programs. All of them must run side by side. The launch's number comes from memory, so a graph
may replay it; once all warps have it, the next launch's is written.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

WARPS = gl.constexpr(4)
"""Of every program."""

_ROOM = 1 << 16


@cache
def meeting(device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers on their way [_ROOM] int64, and [launch, warps that have it] int32, for launches that never overlap.

    Made by the first call, which must not be one that is captured.
    """
    numbers = torch.zeros(_ROOM, dtype=torch.int64, device=device)
    return numbers, torch.tensor([1, 0], dtype=torch.int32, device=device)


@gluon.constexpr_function
def _lanes():
    return gl.BlockedLayout([1], [32], [4], [0])


@gluon.jit
def begin(launch_ptr):
    """The launch's number, and for `end` how many warps had it before each of these."""
    launch = gl.load(launch_ptr, volatile=True)
    lane = gl.arange(0, 32 * WARPS, _lanes())
    # what is added is 1 and depends on the number, so no warp says that it has it before it has it
    one = gl.where(lane + launch < 0, 2, 1)
    return launch, gl.atomic_add(launch_ptr + 1 + lane * 0, one, mask=lane % 32 == 0, sem="relaxed")


@gluon.jit
def end(launch_ptr, launch, before):
    """The last warp that got the number writes the next launch's."""
    lane = gl.arange(0, 32 * WARPS, _lanes())
    last = (lane % 32 == 0) & (before == WARPS * gl.num_programs(0) - 1)
    gl.store(launch_ptr + lane * 0, ((launch + lane * 0) & 0x3FFFFFFF) + 1, mask=last)  # never 0, as at first
    gl.store(launch_ptr + 1 + lane * 0, lane * 0, mask=last)


@gluon.jit
def tell(at, x, launch, mask):
    """float32 x and the launch's number, in one piece."""
    low = x.to(gl.int32, bitcast=True).to(gl.int64) & 0xFFFFFFFF
    gl.store(at, (launch.to(gl.int64) << 32) | low, mask=mask)


@gluon.jit
def gathered(at, mask, launch):
    """The numbers of this launch at `at`, float32, as soon as all are there; 0 where there is no mask."""
    got = gl.load(at, mask=mask, other=0, volatile=True)
    while _lacks(got, mask, launch):
        got = gl.load(at, mask=mask, other=0, volatile=True)
    return gl.where(mask, got.to(gl.int32).to(gl.float32, bitcast=True), 0.0)


@gluon.jit
def _lacks(got, mask, launch):
    lacks = (mask & ((got >> 32).to(gl.int32) != launch)).to(gl.int32)
    return gl.max(gl.reshape(lacks, [lacks.numel]), 0) > 0
