"""Frames that come up from pinned host memory in one launch: a few programs read it over the link themselves.

A call for each copy costs the host as long as a page takes over the link, and more while it enqueues steps, so the
copies are the GPU's own. The programs share every frame, a block at a time by turns, and put it where it belongs; what
they add up on the way is its checksum. Blocks begin at lines of the host's memory, since the link carries whole ones.

Measured on an H200 whose link carries 55 GB/s in one plain copy: 512 pages take 4.93 ms, 51.2 GB/s, in order and
anywhere; with the mover 49 to 50. Neither 132 programs nor more bytes on their way nor loads by cp.async bring more;
bulk loads that do not begin at lines bring 40.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.frames.ref import words_of

_PROGRAMS = 32
_WARPS = 8
_BLOCK = 8192  # bytes that a program asks for at once: twice 16 a thread
_LINE = 128
_PIECE = 32768  # bytes of a frame that a program of `compare` adds up


def bring_up(memory: Tensor, frames: Tensor, places: Tensor, factors: Tensor, table: Tensor) -> Tensor:
    """See ref.bring_up. `memory` is pinned, or on the device itself; its rows follow each other."""
    source, target = words_of(memory, factors), words_of(frames, factors)
    wide = source.element_size()
    strides = len(factors), source.stride(0), target.stride(0)
    there = places.to(frames.device, non_blocking=True)
    left = table.index_select(0, there[0])
    _bring_up[(_PROGRAMS,)](
        *(source, target, there, factors, left, len(left)),
        **dict(zip(("WORDS", "SOURCE", "TARGET"), strides, strict=True)),
        **dict(LINE=_LINE // wide, BLOCK=_BLOCK // wide, EVEN=math.gcd(16 // wide, *strides)),
        num_warps=_WARPS,
    )
    return left


def compare(frames: Tensor, rows: Tensor, factors: Tensor, left: Tensor) -> Tensor:
    """Take the checksums of some rows [n] int64 of frames [F, bytes] uint8 off `left` [n] int64, which is returned."""
    words = words_of(frames, factors)
    block, strides = _PIECE // words.element_size(), (len(factors), words.stride(0))
    _compare[(triton.cdiv(len(factors), block), len(rows))](
        *(words, rows, factors, left),
        **dict(zip(("WORDS", "STRIDE"), strides, strict=True)),
        **dict(BLOCK=block, EVEN=math.gcd(16 // words.element_size(), *strides)),
        num_warps=_WARPS,
    )
    return left


@triton.jit
def _compare(
    frames_ptr, rows_ptr, factors_ptr, left_ptr,
    WORDS: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """STRIDE: words from one frame to the next, a multiple of EVEN as WORDS is."""
    i = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.multiple_of(tl.load(rows_ptr + i) * STRIDE, EVEN)
    some = tl.load(frames_ptr + row + at, mask=at < WORDS, other=0)
    factors = tl.load(factors_ptr + at, mask=at < WORDS, other=0)
    tl.atomic_add(left_ptr + i, -tl.sum(some.to(tl.int64) * factors), sem="relaxed")


@triton.jit(do_not_specialize=["count"])
def _bring_up(
    source_ptr, target_ptr, places_ptr, factors_ptr, left_ptr, count,
    WORDS: tl.constexpr, SOURCE: tl.constexpr, TARGET: tl.constexpr, LINE: tl.constexpr, BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """SOURCE and TARGET: words from one frame to the next, multiples of EVEN as WORDS is; LINE: words of a line."""
    words = tl.arange(0, BLOCK)
    for i in range(count):
        source, target = tl.load(places_ptr + i) * SOURCE, tl.load(places_ptr + count + i) * TARGET
        source, target = tl.multiple_of(source, EVEN), tl.multiple_of(target, EVEN)
        behind = tl.multiple_of(source % LINE, EVEN)  # the line that it begins in
        total = tl.zeros([], tl.int64)
        for block in range(tl.program_id(0), tl.cdiv(WORDS + LINE, BLOCK), tl.num_programs(0)):
            at = block * BLOCK - behind + words
            inside = (at >= 0) & (at < WORDS)
            some = tl.load(source_ptr + source + at, mask=inside, other=0, cache_modifier=".cg")
            factors = tl.load(factors_ptr + at, mask=inside, other=0)
            tl.store(target_ptr + target + at, some, mask=inside)
            total += tl.sum(some.to(tl.int64) * factors)
        tl.atomic_add(left_ptr + i, -total, sem="relaxed")
