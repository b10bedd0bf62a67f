"""The k highest of each row's ordered scores, by one program a row, on any GPU; narrow.py does it on Hopper.

    scores   s s s s s s s s s s s s s s s s ...     n of them, as integers that sort like the floats
    groups   [  top  ] [  top  ] [  top  ] ...       of 4, 8 or 32, so that a few thousand of them cover the row

The k-th highest of the groups' tops is a lower bound of the k-th highest score, because k groups have a score that is
not below it. Groups below the bound are out; what the others hold above it is little more than k. Among these the
k-th is found exactly, three bits a step, and of those equal to it the lower ids are taken until k are there, which is
the reference's rule. Where so many scores are equal that the candidates do not fit, all scores are searched: slower,
and the same ids.
"""

from __future__ import annotations

import importlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.gpu import is_hopper, multiprocessors

GROUP = 8
"""Scores that share one of the `tops`."""


def highest(scores: Tensor, tops: Tensor, visible: Tensor, k: int) -> Tensor:
    """Ids [B, k] int32, ascending, -1 behind, of the k highest of the first visible[r] ordered scores of each row."""
    if is_hopper(scores.device):
        narrow = importlib.import_module("triptych.kernels.select_rows.narrow")
        if narrow.fits(scores.shape[1], k):
            return narrow.highest(scores, tops, visible, k)  # type: ignore[no-any-return]
    rows, total = scores.shape
    out = torch.empty(rows, k, dtype=torch.int32, device=scores.device)
    wide = triton.next_power_of_2(k)
    room = 4 * wide
    alone = rows <= 4 * multiprocessors(scores.device)  # else rows are many, and shall not fill a multiprocessor each
    # scores or groups searched at once; all steps in which groups grow leave at least k of them. The sixteen warps of
    # few rows search twice as many, so that rows that just outgrow `room` need no groups yet
    listed = 2 * room if alone and total > room else room
    while total > 32 * listed:
        listed *= 2
    scratch = torch.empty(rows, 2 * room + 4 * wide, dtype=torch.int32, device=scores.device)
    _highest[(rows,)](
        *(scores, tops, visible, out, scratch, total, k),
        GROUPED=total > room,
        LISTED=listed,
        GROUPS=2 * wide,
        ROOM=room,
        PART=wide if alone else max(16, wide // 8),
        num_warps=(16 if total > room else 8) if alone else 4,
    )
    return out


@triton.jit
def _add3(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _pair(x, low, high):
    """How many of x are not below `low`, and 2^16 times how many are not below `high`."""
    return (x >= low).to(tl.int32) + ((x >= high).to(tl.int32) << 16)


@triton.jit
def _kth(x, k, STEPS: tl.constexpr):
    """The k-th highest of x [< 2^15]: its two top bits, then three at a time; the bits after STEPS are 0."""
    least = tl.full([], -2147483648, tl.int32)
    for n in range(STEPS):
        step = tl.full([], 1, tl.int32) << (30 - 3 * n)
        counts = tl.reduce(
            (
                _pair(x, least + step, least + 2 * step),
                _pair(x, least + 3 * step, least + 4 * step),
                _pair(x, least + 5 * step, least + 6 * step),
                (x >= least + 7 * step).to(tl.int32),
            ),
            0,
            _add3,
        )
        digit = ((counts[0] & 0xFFFF) >= k).to(tl.int32) + ((counts[0] >> 16) >= k).to(tl.int32)
        digit += ((counts[1] & 0xFFFF) >= k).to(tl.int32)
        if n > 0:
            digit += ((counts[1] >> 16) >= k).to(tl.int32) + ((counts[2] & 0xFFFF) >= k).to(tl.int32)
            digit += ((counts[2] >> 16) >= k).to(tl.int32) + (counts[3] >= k).to(tl.int32)
        least += digit * step
    return least


@triton.jit
def _kth_of_all(scores_ptr, n, k, ROOM: tl.constexpr):
    """The k-th highest of scores [n] in memory, bit by bit: for rows whose candidates do not fit."""
    i = tl.arange(0, ROOM)
    least = tl.full([], -2147483648, tl.int32)
    for bit in range(32):
        trial = least + (tl.full([], 1, tl.int32) << (31 - bit))
        count = tl.full([], 0, tl.int32)
        for at in range(0, n, ROOM):
            x = tl.load(scores_ptr + at + i, mask=at + i < n, other=-2147483648)
            count += tl.sum(((x >= trial) & (at + i < n)).to(tl.int32), 0)
        least = tl.where(count >= k, trial, least)
    return least


@triton.jit
def _expand(
    source_ptr,
    list_ptr,
    found,
    n,
    bound,
    put_ptr,
    value_ptr,
    members,
    MEMBERS: tl.constexpr,
    PART: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Members of the `found` groups listed at list_ptr, of `members` (<= MEMBERS) each, that are not below `bound`.

    Their numbers go to put_ptr in order, their values to value_ptr; returns how many there are, of which ROOM fit. PART
    groups are looked at at once.
    """
    total = tl.full([], 0, tl.int32)
    member = tl.arange(0, MEMBERS)
    for first in range(0, found, PART):
        group = first + tl.arange(0, PART)
        listed = group < found
        base = tl.load(list_ptr + group, mask=listed, other=0) * members
        at = tl.reshape(base[:, None] + member[None, :], [PART * MEMBERS])
        there = tl.reshape(listed[:, None] & (member < members)[None, :], [PART * MEMBERS]) & (at < n)
        x = tl.load(source_ptr + at, mask=there, other=-2147483648)
        among = (there & (x >= bound)).to(tl.int32)
        place = total + tl.cumsum(among, 0) - among
        fits = (among > 0) & (place < ROOM)
        tl.store(put_ptr + place, at, mask=fits)
        tl.store(value_ptr + place, x, mask=fits)
        total += tl.sum(among, 0)
    return total


@triton.jit
def _group_tops(scores_ptr, tops_ptr, i, n, size):
    """The highest of each group i of `size` scores (1, 4, 8 or 32) of the first n."""
    low = tl.full([], -2147483648, tl.int32)
    source = scores_ptr
    many = n
    if size >= 8:
        source = tops_ptr
        many = tl.cdiv(n, 8)
    if (size == 1) | (size == 8):
        x = tl.load(source + i, mask=i < many, other=low)
    else:
        x = tl.load(source + 4 * i, mask=4 * i < many, other=low)
        for j in tl.static_range(1, 4):
            x = tl.maximum(x, tl.load(source + 4 * i + j, mask=4 * i + j < many, other=low))
    return x


@triton.jit
def _highest(
    scores_ptr,
    tops_ptr,
    visible_ptr,
    out_ptr,
    scratch_ptr,
    total,
    k,
    GROUPED: tl.constexpr,
    LISTED: tl.constexpr,
    GROUPS: tl.constexpr,
    ROOM: tl.constexpr,
    PART: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    n = tl.load(visible_ptr + r).to(tl.int32)
    scores_ptr += r * total
    tops_ptr += r * (total // 8)
    out_ptr += r * k
    lowest = tl.full([], -2147483648, tl.int32)
    if n <= k:
        for first in range(0, k, ROOM):
            j = first + tl.arange(0, ROOM)
            tl.store(out_ptr + j, tl.where(j < n, j, -1), mask=j < k)
        return

    i = tl.arange(0, LISTED)
    if n <= LISTED:
        x = tl.load(scores_ptr + i, mask=i < n, other=lowest)
        least = _kth(x, k, 11)
        _write(x, i, i < n, least, k, out_ptr)
    elif GROUPED:
        # a lower bound of the k-th highest in 17 bits, from the highest of each group
        scratch_ptr += r * (2 * ROOM + 2 * GROUPS)
        list_ptr = scratch_ptr + 2 * ROOM
        size = tl.where(n <= 4 * LISTED, 4, tl.where(n <= 8 * LISTED, 8, 32))
        x = _group_tops(scores_ptr, tops_ptr, i, n, size)
        bound = _kth(x, k, 6)
        above = ((x >= bound) & (i < tl.cdiv(n, size))).to(tl.int32)
        place = tl.cumsum(above, 0) - above
        found = tl.sum(above, 0)
        fits = found <= GROUPS
        tl.store(list_ptr + place, i, mask=(above > 0) & (place < GROUPS))
        tl.debug_barrier()
        if size == 32:
            found = _expand(
                tops_ptr, list_ptr, tl.minimum(found, GROUPS), tl.cdiv(n, 8), bound,
                list_ptr + GROUPS, scratch_ptr, 4, 4, PART, GROUPS,
            )  # fmt: skip
            fits = fits & (found <= GROUPS)
            list_ptr += GROUPS
            tl.debug_barrier()
        found = _expand(
            scores_ptr, list_ptr, tl.minimum(found, GROUPS), n, bound,
            scratch_ptr + ROOM, scratch_ptr, tl.minimum(size, 8), 8, PART, ROOM,
        )  # fmt: skip
        tl.debug_barrier()
        _choose(scores_ptr, scratch_ptr, tl.where(fits, found, ROOM + 1), n, k, out_ptr, ROOM)


@triton.jit
def _choose(scores_ptr, scratch_ptr, found, n, k, out_ptr, ROOM: tl.constexpr):
    """The k highest of `found` candidates, or of all scores if those are more than ROOM."""
    if found <= ROOM:
        c = tl.arange(0, ROOM)
        z = tl.load(scratch_ptr + c, mask=c < found, other=-2147483648)
        ids = tl.load(scratch_ptr + ROOM + c, mask=c < found, other=0)
        least = _kth(z, k, 11)
        _write(z, ids, c < found, least, k, out_ptr)
    else:
        least = _kth_of_all(scores_ptr, n, k, ROOM)
        _write_all(scores_ptr, n, least, k, out_ptr, ROOM)


@triton.jit
def _write(x, ids, there, least, k, out_ptr):
    """The ids of those above `least`, and of as many equal to it as are missing, the first ones, in order."""
    higher = (there & (x > least)).to(tl.int32)
    ties = (there & (x == least)).to(tl.int32)
    wanted = k - tl.sum(higher, 0)
    both = tl.cumsum(higher | (ties << 16), 0)
    rank = (both >> 16) - ties
    place = (both & 0xFFFF) - higher + tl.minimum(rank, wanted)
    taken = (higher > 0) | ((ties > 0) & (rank < wanted))
    tl.store(out_ptr + place, ids, mask=taken & (place < k))


@triton.jit
def _write_all(scores_ptr, n, least, k, out_ptr, ROOM: tl.constexpr):
    """_write for scores [n] in memory."""
    i = tl.arange(0, ROOM)
    wanted = k
    for at in range(0, n, ROOM):
        x = tl.load(scores_ptr + at + i, mask=at + i < n, other=-2147483648)
        wanted -= tl.sum(((x > least) & (at + i < n)).to(tl.int32), 0)
    start = tl.full([], 0, tl.int32)
    for at in range(0, n, ROOM):
        there = at + i < n
        x = tl.load(scores_ptr + at + i, mask=there, other=-2147483648)
        ties = (there & (x == least)).to(tl.int32)
        rank = tl.cumsum(ties, 0) - ties
        taken = (there & ((x > least) | ((ties > 0) & (rank < wanted)))).to(tl.int32)
        place = start + tl.cumsum(taken, 0) - taken
        tl.store(out_ptr + place, at + i, mask=(taken > 0) & (place < k))
        start += tl.sum(taken, 0)
        wanted -= tl.minimum(tl.sum(ties, 0), wanted)
