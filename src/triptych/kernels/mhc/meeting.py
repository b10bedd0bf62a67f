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
    """The launch's number."""
    return gl.load(launch_ptr, volatile=True)


@gluon.jit
def count(launch_ptr, launch):
    """Says that this warp has the launch's number. Returns, for `end`, how many had it before each of these."""
    lane = gl.arange(0, 32 * WARPS, _lanes())
    # what is added is 1 and depends on the number, so no warp says that it has it before it has it
    one = gl.where(lane + launch < 0, 2, 1)
    return gl.atomic_add(launch_ptr + 1 + lane * 0, one, mask=lane % 32 == 0, sem="relaxed")


@gluon.jit
def end(launch_ptr, launch, before):
    """The last warp that got the number writes the next launch's, never 0, which was there at first."""
    lane = gl.arange(0, 32 * WARPS, _lanes())
    last = (lane % 32 == 0) & (before == WARPS * gl.num_programs(0) - 1)
    gl.store(launch_ptr + lane * 0, ((launch + lane * 0) & 0x3FFFFFFF) + 1, mask=last)
    gl.store(launch_ptr + 1 + lane * 0, lane * 0, mask=last)


@gluon.jit
def in_order():
    """Keeps the compiler from moving loads and stores across, which it would to save registers."""
    gl.inline_asm_elementwise("bar.warp.sync 0xffffffff; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def tell(at, x, launch, mask):
    """float32 x and the launch's number, in one piece."""
    low = x.to(gl.int32, bitcast=True).to(gl.int64) & 0xFFFFFFFF
    gl.store(at, (launch.to(gl.int64) << 32) | low, mask=mask)


@gluon.constexpr_function
def _per_thread(numel):
    """How many numbers a thread asks for at once."""
    return min(16, numel // 128)


@gluon.constexpr_function
def _waiting(n):
    """Reads n numbers until all are of the launch: $0 .. are their values, $n .. addresses, $2n .. the launch."""
    reads = [f"ld.relaxed.gpu.global.b64 x{i}, [${n + i}];" for i in range(n)]
    parts = [f"mov.b64 {{${i}, t{i}}}, x{i};" for i in range(n)]
    tests = ["setp.eq.s32 p, t0, $" + str(2 * n) + ";"]
    tests += [f"setp.eq.and.s32 p, t{i}, ${2 * n + i}, p;" for i in range(1, n)]
    named = [f".reg .pred p; .reg .b64 x<{n}>; .reg .b32 t<{n}>;", "AGAIN:"]
    return "{ " + " ".join([*named, *reads, *parts, *tests, "@!p bra AGAIN;"]) + " }"


@gluon.constexpr_function
def _operands(n):
    return ",".join(["=&r"] * n + ["l"] * n + ["r"] * n)


@gluon.jit
def gathered(first, at, mask, launch):
    """The numbers of this launch at `first` + `at`, float32, as soon as all are there; 0 where there is no mask.

    Each thread waits for its own. What is told at `first` itself is waited for anyway.
    """
    COUNT: gl.constexpr = _per_thread(at.numel)
    at = gl.where(mask, at, 0)
    own = launch + at * 0
    address = (first + at).to(gl.int64)
    got = gl.inline_asm_elementwise(
        _waiting(COUNT), _operands(COUNT), [address, own], dtype=gl.int32, is_pure=False, pack=COUNT
    )
    return gl.where(mask, got.to(gl.float32, bitcast=True), 0.0)
