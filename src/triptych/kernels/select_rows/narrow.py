"""The k highest of each row's ordered scores for NVIDIA GPUs, in Gluon: one program a row narrows them down.

    source      n scores, or the highest of each 16 of them, 64 a thread at most
    pillars     of those the highest of each 8, which lie far apart; their k-th is a lower bound of the k-th score
    candidates  scores that reach the bound, little more than k, in the order of their ids
    chosen      of these the k highest, found three bits a step

A search begins at the first bit in which the least and the highest differ, and ends as soon as as many are left as were
asked for: three to five steps as a rule. Of equal scores the lower ids are taken, which is the reference's rule. Where
so many scores are equal that the candidates do not fit, all scores are searched: slower, and the same ids.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_DEEP = 8  # scores or tops that share a pillar at most


def fits(total: int, k: int) -> bool:
    """Whether a program can hold the source of so many scores."""
    return k <= 1024 and total <= 16 * _DEEP * _pillars(k)


def highest(scores: Tensor, tops: Tensor, visible: Tensor, k: int) -> Tensor:
    """See highest.highest."""
    rows, total = scores.shape
    out = torch.empty(rows, k, dtype=torch.int32, device=scores.device)
    room = _pillars(k)
    scratch = torch.empty(rows, 2 * room, dtype=torch.int32, device=scores.device)
    warps = room // 256  # more of them have less to do each, and more to say to each other
    _highest[(rows,)](
        *(scores, tops, visible, out, scratch, total, k),
        DEEP=min(_DEEP, triton.next_power_of_2(triton.cdiv(total, room))),
        ROOM=room,
        WARPS=warps,
        num_warps=warps,
        maxnreg=128,
    )
    return out


def _pillars(k: int) -> int:
    """Four times k in whole powers of two: pillars, and room for candidates."""
    return max(1024, 4 * int(triton.next_power_of_2(k)))


@gluon.jit
def _add(a, b):
    return a + b


@gluon.constexpr_function
def _line(room, warps):
    """[room]: neighbours lie in a thread."""
    return gl.BlockedLayout([room // (32 * warps)], [32], [warps], [0])


@gluon.constexpr_function
def _deep(deep, room, warps):
    """[deep, room], as _line `deep` times."""
    return gl.BlockedLayout([deep, room // (32 * warps)], [1, 32], [1, warps], [1, 0])


@gluon.constexpr_function
def _groups(groups, warps):
    """[groups, 16] members of groups: a thread has whole ones."""
    return gl.BlockedLayout([groups // (32 * warps), 16], [32, 1], [warps, 1], [1, 0])


@gluon.jit
def _counted(x, least, shift, limit, counts_s, WARPS: gl.constexpr):
    """How many of x reach into each of `limit` (<= 8) steps of 2^shift from `least` on: of four steps, and of the
    other four 2^16 times as many.

    A thread counts its eight, or fewer, in a word of eight times four bits."""
    step = (x - least).to(gl.uint32, bitcast=True) >> shift.to(gl.uint32)
    one = gl.where((x >= least) & (step < limit), gl.full_like(step, 1) << (step * 4), 0)
    word = gl.sum(gl.reshape(one, [WARPS, 32, x.shape[0] // (32 * WARPS)]), 2)
    for j in gl.static_range(4):
        counts_s.index(j).store(gl.sum((word >> (4 * j)) & 0x000F000F, 1).to(gl.int32, bitcast=True))
    gl.thread_barrier()
    L: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    return (
        gl.sum(counts_s.index(0).load(L), 0),
        gl.sum(counts_s.index(1).load(L), 0),
        gl.sum(counts_s.index(2).load(L), 0),
        gl.sum(counts_s.index(3).load(L), 0),
    )


@gluon.jit
def _kth(x, lowest, highest, k, enough, counts_s, WARPS: gl.constexpr):
    """A value that k of x reach, and no more than `enough`, unless they are equal: then the k-th highest.

    What counts of x is from `lowest` to `highest`."""
    differ = lowest ^ highest
    bit = ((differ & 0x7FFFFFFF).to(gl.float32).to(gl.int32, bitcast=True) >> 23) - 127
    bit = gl.where((differ < 0) | (bit >= 30), 31, gl.maximum(bit, -1))
    least = gl.where(bit == 31, -2147483648, lowest & -(1 << (gl.minimum(bit, 29) + 1)))
    above = 0  # how many are beyond all steps
    count = x.numel
    while (bit >= 0) & (count > enough):
        shift = gl.maximum(bit - 2, 0)
        counts = _counted(x, least, shift, (2 << (bit - shift)).to(gl.uint32), counts_s, WARPS)
        reach = above
        digit = -1
        for j in gl.static_range(8):
            here = (counts[3 - j % 4] >> (16 - 16 * (j // 4))) & 0xFFFF
            first = (digit < 0) & (reach + here >= k)
            above = gl.where(first, reach, above)
            reach += here
            count = gl.where(first, reach, count)
            digit = gl.where(first, 7 - j, digit)
        least += digit << shift
        bit = shift - 1
    return least


@gluon.jit
def _places(flags):
    """How many flags [A, B] are set before each, row by row, and how many are in all."""
    place = gl.associative_scan(flags, 1, _add) - flags
    rows = gl.sum(flags, 1)
    if flags.shape[0] > 1:
        few = gl.convert_layout(rows, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        earlier = gl.convert_layout(gl.associative_scan(few, 0, _add) - few, rows.type.layout)
        place += earlier[:, None]
    return place, gl.sum(rows, 0)


@gluon.jit
def _listed(
    source, many, k, list_ptr, line, counts_s, DEEP: gl.constexpr, ROOM: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """Ids of what of the source reaches a lower bound of its k-th, to list_ptr: the bound, and how many there are."""
    L: gl.constexpr = _deep(DEEP, ROOM, WARPS)
    i = gl.arange(0, DEEP, layout=gl.SliceLayout(1, L))[:, None] * ROOM
    i += gl.arange(0, ROOM, layout=gl.SliceLayout(0, L))[None, :]
    x = gl.load(source + i, mask=i < gl.cdiv(many, 8) * 8, other=-2147483648)  # rows are whole tiles
    x = gl.where(i < many, x, -2147483648)
    pillars = gl.convert_layout(gl.max(x, 0), line.type.layout, assert_trivial=True)
    lowest = gl.min(gl.where(line < many, pillars, 2147483647), 0)
    bound = _kth(pillars, lowest, gl.max(pillars, 0), k, k + k // 8, counts_s, WARPS)
    above = (x >= bound) & (i < many)
    place, found = _places(above.to(gl.int32))
    if found <= ROOM:
        gl.store(list_ptr + place, i, mask=above)
    return bound, found


@gluon.jit
def _expand(scores_ptr, list_ptr, put_ptr, found, n, bound, ROOM: gl.constexpr, WARPS: gl.constexpr):
    """Ids of scores of the `found` groups of 16 listed that reach `bound`, to put_ptr in order; says how many."""
    SOME: gl.constexpr = ROOM // 2
    L: gl.constexpr = _groups(SOME, WARPS)
    group = gl.arange(0, SOME, layout=gl.SliceLayout(1, L))
    member = gl.arange(0, 16, layout=gl.SliceLayout(0, L))
    total = 0
    for first in range(0, found, SOME):
        listed = first + group < found
        base = gl.load(list_ptr + first + group, mask=listed, other=0) * 16
        at = base[:, None] + member[None, :]
        x = gl.load(scores_ptr + at, mask=(listed[:, None] & (member >= 0)[None, :]), other=-2147483648)
        among = listed[:, None] & (at < n) & (x >= bound)
        place, count = _places(gl.reshape(among.to(gl.int32), [1, SOME * 16]))
        if total + count <= ROOM:
            mine = gl.convert_layout(gl.reshape(place, [SOME, 16]), L, assert_trivial=True)
            gl.store(put_ptr + (total + mine), at, mask=among)
        total += count
    return total


@gluon.jit
def _chosen(x, ids, there, least, k, out_ptr):
    """Write the ids of those above `least`, and of as many equal to it as are missing, the first ones, in order."""
    higher = (there & (x > least)).to(gl.int32)
    ties = (there & (x == least)).to(gl.int32)
    both = gl.associative_scan(higher | (ties << 16), 0, _add)
    wanted = k - gl.sum(higher, 0)
    rank = (both >> 16) - ties
    place = (both & 0xFFFF) - higher + gl.minimum(rank, wanted)
    taken = (higher > 0) | ((ties > 0) & (rank < wanted))
    gl.store(out_ptr + place, ids, mask=taken & (place < k))


@gluon.jit
def _all(scores_ptr, n, k, out_ptr, line, ROOM: gl.constexpr):
    """The k highest of scores [n] in memory, found bit by bit: for rows whose candidates do not fit."""
    least = -2147483648
    for bit in range(32):
        trial = least + (1 << (31 - bit))
        count = 0
        for at in range(0, n, ROOM):
            x = gl.load(scores_ptr + at + line, mask=at + line < n, other=-2147483648)
            count += gl.sum(((x >= trial) & (at + line < n)).to(gl.int32), 0)
        least = gl.where(count >= k, trial, least)
    wanted = k
    for at in range(0, n, ROOM):
        x = gl.load(scores_ptr + at + line, mask=at + line < n, other=-2147483648)
        wanted -= gl.sum(((x > least) & (at + line < n)).to(gl.int32), 0)
    start = 0
    for at in range(0, n, ROOM):
        there = at + line < n
        x = gl.load(scores_ptr + at + line, mask=there, other=-2147483648)
        ties = (there & (x == least)).to(gl.int32)
        rank = gl.associative_scan(ties, 0, _add) - ties
        taken = (there & ((x > least) | ((ties > 0) & (rank < wanted)))).to(gl.int32)
        place = start + gl.associative_scan(taken, 0, _add) - taken
        gl.store(out_ptr + place, at + line, mask=(taken > 0) & (place < k))
        start += gl.sum(taken, 0)
        wanted -= gl.minimum(gl.sum(ties, 0), wanted)


@gluon.jit(do_not_specialize=["k"])
def _highest(
    scores_ptr, tops_ptr, visible_ptr, out_ptr, scratch_ptr, total, k,
    DEEP: gl.constexpr, ROOM: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    r = gl.program_id(0).to(gl.int64)
    n = gl.load(visible_ptr + r).to(gl.int32)
    scores_ptr += r * total
    out_ptr += r * k
    line = gl.arange(0, ROOM, layout=_line(ROOM, WARPS))
    if n <= k:
        gl.store(out_ptr + line, gl.where(line < n, line, -1), mask=line < k)
        return

    counts_s = gl.allocate_shared_memory(gl.int32, [4, WARPS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    source = scores_ptr
    many = n
    if n > DEEP * ROOM:
        source = tops_ptr + r * (total // 16)
        many = gl.cdiv(n, 16)
    list_ptr = scratch_ptr + r * (2 * ROOM)
    if DEEP > 2 and many <= 2 * ROOM:
        bound, found = _listed(source, many, k, list_ptr + ROOM, line, counts_s, 2, ROOM, WARPS)
    else:
        bound, found = _listed(source, many, k, list_ptr + ROOM, line, counts_s, DEEP, ROOM, WARPS)
    gl.thread_barrier()
    if n > DEEP * ROOM and found <= ROOM:
        found = _expand(scores_ptr, list_ptr + ROOM, list_ptr, found, n, bound, ROOM, WARPS)
        gl.thread_barrier()
    else:
        list_ptr += ROOM
    if found <= ROOM:
        ids = gl.load(list_ptr + line, mask=line < found, other=0)
        z = gl.load(scores_ptr + ids, mask=line < found, other=-2147483648)
        least = _kth(z, bound, gl.max(z, 0), k, k, counts_s, WARPS)
        _chosen(z, ids, line < found, least, k, out_ptr)
    else:
        _all(scores_ptr, n, k, out_ptr, line, ROOM)
