"""The k highest of each row's ordered scores, in Gluon for Hopper, by one program a row, or by the last of several.

    scores   n of them; the k highest have their places in the k groups of 8 with the highest tops
    tops     the highest of each 8 scores, written with them
    peaks    the highest of each 8 tops, where those are too many for a program's registers

So k are chosen of a few thousand at each level, and what the chosen ones hold is what the next level chooses from. Ids
stay in order, and of equal ones the lower are taken, which is the reference's rule at every level.

The k-th highest is looked for among integers in proportion to the scores, three bits a step, until as many are above as
were asked for: four or five steps as a rule. Of floats the high bits would tell little apart.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triptych.kernels.select_rows.highest import GROUP  # of tops in a peak, too; the kernels have it as a number

_MOST: Any = gl.constexpr(1024)  # that are asked for
_LOWEST: Any = gl.constexpr(-2147483648)
_HIGHEST: Any = gl.constexpr(2147483647)
_BINS: Any = gl.constexpr(
    """
{
.reg .b32 t;
sub.s32 t, $1, $2;
shr.u32 t, t, $3;
and.b32 t, t, 0xfffffffc;
shl.b32 $0, 1, t;
}
"""
)
"""2^4j for what is j steps above $2, steps of 2^($3 + 2), and 0 for what is beyond eight of them or below."""


def fits(total: int, k: int) -> bool:
    """Whether a program can choose of so many scores."""
    return k <= _MOST.value and total <= GROUP * GROUP * width(total, k)


def highest(scores: Tensor, tops: Tensor, visible: Tensor, k: int) -> Tensor:
    """See highest.highest."""
    rows, total = scores.shape
    out = torch.empty(rows, k, dtype=torch.int32, device=scores.device)
    scratch = scratch_of(rows, total, k, scores.device)
    _highest[(rows,)](
        *(scores, tops, visible, out, scratch, scratch.stride(0), total, k),
        LEVELS=levels(total, k),
        WIDE=width(total, k),
        WARPS=8,
        num_warps=8,
    )
    return out


def width(total: int, k: int) -> int:
    """Scores, tops or peaks that are chosen from at once: what k groups hold, or all where those are few."""
    return 2048 if total <= 2048 else max(2048, GROUP * int(triton.next_power_of_2(k)))


def levels(total: int, k: int) -> int:
    """From how many levels it takes to choose among so many scores."""
    wide = width(total, k)
    return 1 if total <= wide else 2 if total <= GROUP * wide else 3


def scratch_of(rows: int, total: int, k: int, device: torch.device) -> Tensor:
    """Room for the ids of groups and, behind them, for peaks."""
    wide = width(total, k)
    peaks = wide if levels(total, k) > 2 else 0
    return torch.empty(rows, wide // GROUP + peaks, dtype=torch.int32, device=device)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.constexpr_function
def _line(wide, warps):
    """[wide]: neighbours lie in a thread."""
    return gl.BlockedLayout([wide // (32 * warps)], [32], [warps], [0])


@gluon.constexpr_function
def _groups(wide, warps):
    """[wide / 8, 8]: a thread has whole groups, those of _line."""
    return gl.BlockedLayout([max(1, wide // (256 * warps)), 8], [32, 1], [warps, 1], [1, 0])


@gluon.jit
def _said(said_s, WARPS: gl.constexpr):
    """What each warp said in shared memory [WARPS]: a thread has all of it."""
    return said_s.load(gl.BlockedLayout([WARPS], [32], [WARPS], [0]))


@gluon.jit
def _ends(x, said_s, WARPS: gl.constexpr):
    """The least and the highest of ordered scores x, as floats; _LOWEST is none."""
    x = gl.reshape(x, [WARPS, x.shape[0] // WARPS])
    said_s.index(4).store(gl.min(gl.where(x == _LOWEST, _HIGHEST, x), 1))
    said_s.index(5).store(gl.max(x, 1))
    gl.thread_barrier()
    return _score(gl.min(_said(said_s.index(4), WARPS), 0)), _score(gl.max(_said(said_s.index(5), WARPS), 0))


@gluon.jit
def _spread(x, low, high):
    """Ordered scores x as bits of a float in [1, 2) in proportion to the scores from `low` to `high`: 2^23 integers, so
    neighbours may be equal. Less where a score is below or there is none; out of all bounds where low is high."""
    part = gl.fma(_score(x) - low, gl.full_like(x, 0).to(gl.float32) + 0.9999997 / (high - low), 1.0)
    return gl.where(x == _LOWEST, 0, part.to(gl.int32, bitcast=True))


@gluon.jit
def _score(order):
    """The float that sorts like this."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(gl.float32, bitcast=True)


@gluon.jit
def _counted(y, least, shift, said_s, WARPS: gl.constexpr):
    """How many of y are in each of eight steps of 2^shift from `least` on, or in a later one of its half: of four steps
    and, 2^16 times as many, of the other four.

    A thread counts eight in a word of eight times four bits."""
    EACH: gl.constexpr = y.shape[0] // (32 * WARPS)
    zero = gl.full_like(y, 0)
    one = gl.inline_asm_elementwise(
        _BINS, "=r,r,r,r", [y, zero + least, zero + (shift - 2)], gl.uint32, is_pure=True, pack=1
    )
    word = gl.sum(gl.reshape(one, [WARPS, 32, EACH // 8, 8]), 3)
    for j in gl.static_range(4):
        some = gl.sum((word >> (4 * j)) & 0x000F000F, 2)
        said_s.index(j).store(gl.sum(some, 1).to(gl.int32, bitcast=True))
    gl.thread_barrier()
    d = gl.sum(_said(said_s.index(3), WARPS), 0)
    c = d + gl.sum(_said(said_s.index(2), WARPS), 0)
    b = c + gl.sum(_said(said_s.index(1), WARPS), 0)
    return b + gl.sum(_said(said_s.index(0), WARPS), 0), b, c, d


@gluon.jit
def _kth(y, k, said_s, WARPS: gl.constexpr):
    """A value that k of y reach and no others, and k; another number where there is none that it can tell apart."""
    least = 0x3F800000
    above = 0  # how many are beyond all steps
    count = y.numel
    shift = 20
    while (shift >= 2) & (count != k):
        counts = _counted(y, least, shift, said_s, WARPS)
        before = above
        digit = -1
        for j in gl.static_range(8):
            reach = before + ((counts[j % 4] >> 16) if j >= 4 else (counts[j] & 0xFFFF) + (counts[0] >> 16))
            enough = reach >= k
            digit += enough.to(gl.int32)
            count = gl.where(enough, reach, count)
            above = gl.where(enough, above, gl.maximum(above, reach))
        least += digit << shift
        shift -= 3
    return least, count


@gluon.jit
def _exactly(x, k):
    """The k-th highest of x, bit by bit."""
    least = _LOWEST
    for bit in range(32):
        trial = least + (1 << (31 - bit))
        least = gl.where(gl.sum((x >= trial).to(gl.int32), 0) >= k, trial, least)
    return least


@gluon.jit
def _members(base, WIDE: gl.constexpr, WARPS: gl.constexpr):
    """Numbers [WIDE] of what the groups `base` hold; negative where there is no group."""
    member = gl.arange(0, 8, layout=gl.SliceLayout(0, _groups(WIDE, WARPS)))
    at = gl.reshape(base[:, None] * 8 + member[None, :], [WIDE])
    return gl.convert_layout(at, _line(WIDE, WARPS), assert_trivial=True)


@gluon.jit
def _loaded(source, base, many, WIDE: gl.constexpr, WARPS: gl.constexpr):
    """What the groups `base` hold of `many` ordered scores at `source`."""
    member = gl.arange(0, 8, layout=gl.SliceLayout(0, _groups(WIDE, WARPS)))
    there = ((base >= 0) & (base * 8 < many))[:, None] & (member >= 0)[None, :]
    x = gl.load(source + (base[:, None] * 8 + member[None, :]), mask=there, other=_LOWEST)
    x = gl.convert_layout(gl.reshape(x, [WIDE]), _line(WIDE, WARPS), assert_trivial=True)
    return gl.where(_members(base, WIDE, WARPS) < many, x, _LOWEST)


@gluon.jit
def _choose(source, base, many, k, floor, put_ptr, said_s, WIDE: gl.constexpr, WARPS: gl.constexpr):
    """Write the numbers of the k highest of what the groups `base` hold, of equal ones the first, in order.

    `floor` is a score that k of them reach; returns one that is nearer."""
    x = _loaded(source, base, many, WIDE, WARPS)
    low, high = _ends(x, said_s, WARPS)
    low = gl.maximum(low, floor)
    y = _spread(x, low, high)
    least, count = _kth(y, k, said_s, WARPS)
    # eight less than it is, for what is lost by rounding
    floor = gl.fma((least - 8).to(gl.float32, bitcast=True) - 1.0, high - low, low)
    if count != k:  # it ends between scores that are equal, or nearly
        y = _loaded(source, base, many, WIDE, WARPS)
        least = _exactly(y, k)
        floor = _score(least)
    _write(y, least, base, k, put_ptr, said_s, WIDE, WARPS)
    return floor


@gluon.jit
def _write(y, least, base, k, put_ptr, said_s, WIDE: gl.constexpr, WARPS: gl.constexpr):
    """Write the numbers of what is above `least` in y, and of as many equal to it as are missing, the first, in order.

    y are of what the groups `base` hold."""
    EACH: gl.constexpr = WIDE // (32 * WARPS)
    L: gl.constexpr = gl.BlockedLayout([1, EACH], [32, 1], [WARPS, 1], [1, 0])
    y = gl.convert_layout(gl.reshape(y, [32 * WARPS, EACH]), L, assert_trivial=True)
    flag = (y > least).to(gl.int32) | ((y == least).to(gl.int32) << 16)
    lanes: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
    mine = gl.convert_layout(gl.reshape(gl.sum(flag, 1), [WARPS, 32]), lanes, assert_trivial=True)
    said_s.index(4).store(gl.sum(mine, 1))
    earlier = gl.associative_scan(mine, 1, _add) - mine
    gl.thread_barrier()
    T: gl.constexpr = gl.BlockedLayout([1, WARPS], [1, 32], [WARPS, 1], [1, 0])
    said = said_s.index(4).load(gl.SliceLayout(0, T))[None, :]
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, T))[:, None]
    other = gl.arange(0, WARPS, layout=gl.SliceLayout(0, T))[None, :]
    ahead = gl.sum(gl.where(other < warp, said, 0), 1)
    earlier += gl.convert_layout(ahead, gl.SliceLayout(1, earlier.type.layout), assert_trivial=True)[:, None]
    earlier = gl.convert_layout(gl.reshape(earlier, [32 * WARPS]), gl.SliceLayout(1, L), assert_trivial=True)
    # NaN and infinity may be above though nobody counted them
    wanted = gl.maximum(k - (gl.sum(_said(said_s.index(4), WARPS), 0) & 0xFFFF), 0)
    before = gl.associative_scan(flag, 1, _add) - flag + earlier[:, None]
    rank = before >> 16
    place = (before & 0xFFFF) + gl.minimum(rank, wanted)
    taken = (y > least) | ((y == least) & (rank < wanted))
    ids = gl.convert_layout(gl.reshape(_members(base, WIDE, WARPS), [32 * WARPS, EACH]), L, assert_trivial=True)
    gl.store(put_ptr + place, ids, mask=taken & (place < k))


@gluon.jit
def find_peaks(tops_ptr, peaks_ptr, many, WARPS: gl.constexpr):
    """The highest of each 8 of `many` tops, to memory."""
    SOME: gl.constexpr = 64 * WARPS
    L: gl.constexpr = gl.BlockedLayout([1, 4], [16, 2], [WARPS, 1], [1, 0])
    peak = gl.arange(0, SOME, layout=gl.SliceLayout(1, L))
    i = peak[:, None] * 8 + gl.arange(0, 8, layout=gl.SliceLayout(0, L))[None, :]
    for first in range(0, many, 8 * SOME):
        x = gl.load(tops_ptr + first + i, mask=first + i < gl.cdiv(many, 8) * 8, other=_LOWEST)
        x = gl.where(first + i < many, x, _LOWEST)
        gl.store(peaks_ptr + first // 8 + peak, gl.max(x, 1), mask=first + peak * 8 < many)


@gluon.jit
def narrowed(
    scores_ptr, tops_ptr, n, k, out_ptr, list_ptr, said_s,
    LEVELS: gl.constexpr, WIDE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Write the ids of the k highest of a row's n > k ordered scores, of which LEVELS are enough.

    list_ptr is a row of scratch_of, which has peaks already."""
    group = gl.arange(0, WIDE // 8, layout=gl.SliceLayout(1, _groups(WIDE, WARPS)))
    top = 0
    if LEVELS > 1:
        top = (n > WIDE).to(gl.int32) + (n > 8 * WIDE).to(gl.int32)
    floor = float("-inf")
    for down in range(top + 1):
        level = top - down
        source, many, put_ptr, base = scores_ptr, n, out_ptr, group
        if LEVELS > 1:
            if level > 0:
                source, many, put_ptr = tops_ptr, gl.cdiv(n, 8), list_ptr
            if level > 1:
                source, many = list_ptr + WIDE // 8, gl.cdiv(n, 64)
            if down > 0:
                base = gl.load(list_ptr + group, mask=group < k, other=_LOWEST // 8)
                gl.thread_barrier()  # all have read it before any writes the next
        floor = _choose(source, base, many, k, floor, put_ptr, said_s, WIDE, WARPS)
        gl.thread_barrier()


@gluon.jit
def all_of_them(n, k, out_ptr, WARPS: gl.constexpr):
    """Write the ids of n <= k scores, -1 behind."""
    line = gl.arange(0, _MOST, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    gl.store(out_ptr + line, gl.where(line < n, line, -1), mask=line < k)


@gluon.jit(do_not_specialize=["k"])
def _highest(
    scores_ptr, tops_ptr, visible_ptr, out_ptr, scratch_ptr, scratch_row, total, k,
    LEVELS: gl.constexpr, WIDE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    r = gl.program_id(0).to(gl.int64)
    n = gl.load(visible_ptr + r).to(gl.int32)
    said_s = gl.allocate_shared_memory(gl.int32, [6, WARPS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    tops_ptr += r * (total // 128 * 16)
    list_ptr = scratch_ptr + r * scratch_row
    if n <= k:
        all_of_them(n, k, out_ptr + r * k, WARPS)
    else:
        if LEVELS > 2:
            find_peaks(tops_ptr, list_ptr + WIDE // 8, gl.cdiv(n, 8), WARPS)
            gl.thread_barrier()
        narrowed(
            scores_ptr + r * total, tops_ptr, n, k, out_ptr + r * k, list_ptr, said_s, LEVELS, WIDE, WARPS,
        )  # fmt: skip
