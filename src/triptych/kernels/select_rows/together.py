"""The k highest of a row's ordered scores by all the programs that made them, in Gluon for Hopper.

    peaks        the highest of each few scores, whichever: a thousand or two of all programs
    bound        what k peaks reach, or a few more: k scores reach it, too, and not many more than that
    candidates   scores that reach the bound, those of all programs side by side in order
    ids          of the k highest candidates, found exactly by the program that is last to be done

Peaks need not be of all scores, so programs write them a little before they are done; the warp that fetches keys has
nothing left to do by then and finds the bound meanwhile. Programs wait for each other's peaks, and for how many
candidates those before them have. Waiting ends after a while, whatever the others do; then, and where candidates come
to be too many, since high scores are neighbours, or too few, since some are infinite, the last program chooses from all
scores, see narrow.py. Ids stay in order, and of equal ones the lower are taken, which is the reference's rule.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triptych.kernels.select_rows.narrow import (
    _BINS,
    _HIGHEST,
    _LOWEST,
    _add,
    _exactly,
    _line,
    _score,
    _spread,
)
from triptych.kernels.select_rows.weigh import bits

PEAKS: Any = gl.constexpr(2048)
"""Of all programs at most."""
ENOUGH: Any = gl.constexpr(4096)
"""Scores that one program chooses from as fast."""
_CHUNK: Any = gl.constexpr(2048)
_PATIENCE: Any = gl.constexpr(2000)
"""How often a program looks whether the others are as far as it is, a microsecond a time at most."""
_LOOK: Any = gl.constexpr(
    """
{
.reg .pred p;
setp.ne.b32 p, $2, 0;
mov.b32 $0, 0;
@p ld.acquire.gpu.global.b32 $0, [$1];
}
"""
)
"""A word as others have left it, with all that they left before, and 0 where nobody looks."""
_GLANCE: Any = gl.constexpr(
    """
{
.reg .pred p;
setp.ne.b32 p, $2, 0;
mov.b32 $0, 0;
@p ld.relaxed.gpu.global.b32 $0, [$1];
}
"""
)
"""A word as others have left it."""
SECOND: Any = gl.constexpr(1 << 15)
"""How far a row's second counter is from its first."""
COUNTS: Any = gl.constexpr(60000)
"""How far from the first counter those of candidates begin, of all rows' programs."""


@gluon.jit
def _order(score):
    """The integer that sorts like this float."""
    bits_ = score.to(gl.int32, bitcast=True)
    return bits_ ^ ((bits_ >> 31) & 0x7FFFFFFF)


@gluon.constexpr_function
def _each(warps):
    """[warps, 4]: a warp has its own."""
    return gl.DistributedLinearLayout([[0, 1], [0, 2]], [[0, 0]] * 5, [[b, 0] for b in bits(warps)], [], [warps, 4])


@gluon.jit
def _told(a, b, c, d, said_s, WARPS: gl.constexpr):
    """What each warp says, four numbers [WARPS], as all threads hear it."""
    if WARPS == 1:
        return a, b, c, d
    else:
        L: gl.constexpr = _each(WARPS)
        R: gl.constexpr = gl.SliceLayout(1, L)
        i = gl.arange(0, 4, layout=gl.SliceLayout(0, L))[None, :]
        a = gl.convert_layout(a, R, assert_trivial=True)[:, None]
        b = gl.convert_layout(b, R, assert_trivial=True)[:, None]
        c = gl.convert_layout(c, R, assert_trivial=True)[:, None]
        d = gl.convert_layout(d, R, assert_trivial=True)[:, None]
        said_s = said_s._reinterpret(gl.int32, [WARPS, 4], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        said_s.store(gl.where(i < 2, gl.where(i == 0, a, b), gl.where(i == 2, c, d)))
        gl.thread_barrier()
        A: gl.constexpr = gl.BlockedLayout([WARPS, 4], [32, 1], [WARPS, 1], [1, 0])
        x = said_s.load(A)
        i = gl.arange(0, 4, layout=gl.SliceLayout(0, A))[None, :]
        return (
            gl.sum(gl.where(i == 0, x, 0), 1),
            gl.sum(gl.where(i == 1, x, 0), 1),
            gl.sum(gl.where(i == 2, x, 0), 1),
            gl.sum(gl.where(i == 3, x, 0), 1),
        )


@gluon.jit
def _ends(x, said_s, WARPS: gl.constexpr):
    """The least and the highest of ordered scores x, as floats; _LOWEST is none."""
    x = gl.reshape(x, [WARPS, x.shape[0] // WARPS])
    least, most = gl.min(gl.where(x == _LOWEST, _HIGHEST, x), 1), gl.max(x, 1)
    least, most, _, _ = _told(least, most, least, most, said_s, WARPS)
    return _score(gl.min(least, 0)), _score(gl.max(most, 0))


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
    a, b, c, d = _told(_share(word, 0), _share(word, 4), _share(word, 8), _share(word, 12), said_s, WARPS)
    d = gl.sum(d, 0)
    c = d + gl.sum(c, 0)
    b = c + gl.sum(b, 0)
    return b + gl.sum(a, 0), b, c, d


@gluon.jit
def _share(word, at: gl.constexpr):
    return gl.sum(gl.sum((word >> at) & 0x000F000F, 2), 1).to(gl.int32, bitcast=True)


@gluon.jit
def _roughly(y, k, most, said_s, WARPS: gl.constexpr):
    """A value that at least k of y reach and at most `most`, and how many; more where it cannot tell them apart."""
    least = 0x3F800000
    above = 0  # how many are beyond all steps
    count = y.numel
    shift = 20
    while (shift >= 2) & (count > most):
        a, b, c, d = _counted(y, least, shift, said_s, WARPS)
        far = above + (a >> 16)  # the upper four of the eight steps
        b7, b6, b5, b4 = above + (d >> 16), above + (c >> 16), above + (b >> 16), far
        b3, b2, b1, b0 = far + (d & 0xFFFF), far + (c & 0xFFFF), far + (b & 0xFFFF), far + (a & 0xFFFF)
        digit = _reached(b1, k) + _reached(b2, k) + (_reached(b3, k) + _reached(b4, k))
        digit += _reached(b5, k) + _reached(b6, k) + _reached(b7, k)
        count = gl.minimum(
            gl.minimum(
                gl.minimum(_if_enough(b0, k), _if_enough(b1, k)), gl.minimum(_if_enough(b2, k), _if_enough(b3, k))
            ),
            gl.minimum(
                gl.minimum(_if_enough(b4, k), _if_enough(b5, k)), gl.minimum(_if_enough(b6, k), _if_enough(b7, k))
            ),
        )
        above = gl.maximum(
            gl.maximum(gl.maximum(_if_not(b1, k), _if_not(b2, k)), gl.maximum(_if_not(b3, k), _if_not(b4, k))),
            gl.maximum(gl.maximum(_if_not(b5, k), _if_not(b6, k)), gl.maximum(_if_not(b7, k), above)),
        )
        least += digit << shift
        shift -= 3
    return least, count


@gluon.jit
def _reached(n, k):
    return (n >= k).to(gl.int32)


@gluon.jit
def _if_enough(n, k):
    return gl.where(n >= k, n, _HIGHEST)


@gluon.jit
def _if_not(n, k):
    return gl.where(n >= k, 0, n)


@gluon.jit
def _by_threads(x, WARPS: gl.constexpr):
    """x in _line as [threads, each]."""
    EACH: gl.constexpr = x.shape[0] // (32 * WARPS)
    L: gl.constexpr = gl.BlockedLayout([1, EACH], [32, 1], [WARPS, 1], [1, 0])
    return gl.convert_layout(gl.reshape(x, [32 * WARPS, EACH]), L, assert_trivial=True)


@gluon.jit
def _before(flag, said_s, WARPS: gl.constexpr):
    """Sums of all flags [threads, each] before each, and of all."""
    lanes: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
    mine = gl.convert_layout(gl.reshape(gl.sum(flag, 1), [WARPS, 32]), lanes, assert_trivial=True)
    says = gl.sum(mine, 1)
    earlier = gl.associative_scan(mine, 1, _add) - mine
    said, _, _, _ = _told(says, says, says, says, said_s, WARPS)
    T: gl.constexpr = gl.BlockedLayout([1, WARPS], [1, 32], [WARPS, 1], [1, 0])
    each = gl.convert_layout(said, gl.SliceLayout(0, T), assert_trivial=True)[None, :]
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, T))[:, None]
    other = gl.arange(0, WARPS, layout=gl.SliceLayout(0, T))[None, :]
    ahead = gl.sum(gl.where(other < warp, each, 0), 1)
    earlier += gl.convert_layout(ahead, gl.SliceLayout(1, earlier.type.layout), assert_trivial=True)[:, None]
    L: gl.constexpr = gl.SliceLayout(1, flag.type.layout)
    earlier = gl.convert_layout(gl.reshape(earlier, [32 * WARPS]), L, assert_trivial=True)
    return gl.associative_scan(flag, 1, _add) - flag + earlier[:, None], gl.sum(said, 0)


@gluon.jit
def _line_of(source, many, WIDE: gl.constexpr, WARPS: gl.constexpr):
    """`many` ordered scores at `source`, and their numbers."""
    i = gl.arange(0, WIDE, layout=_line(WIDE, WARPS))
    x = gl.load(source + i, mask=i // 4 * 4 < many, other=_LOWEST)  # 16 bytes at once
    return gl.where(i < many, x, _LOWEST), i


@gluon.jit
def peaks_each(parts):
    """How many peaks each of `parts` programs has: PEAKS of all at most."""
    each = gl.where(parts > 8, 128, 256)
    each = gl.where(parts > 16, 64, each)
    each = gl.where(parts > 32, 32, each)
    each = gl.where(parts > 64, 16, each)
    return gl.where(parts > 128, 8, each)


@gluon.jit
def can_together(n, parts, k):
    """Whether a row's n keys are enough, and the peaks of its programs, that they choose together."""
    return (n > ENOUGH) & (parts * peaks_each(parts) >= k + k // 4)


@gluon.jit
def keep_peaks(peaks_ptr, best, part, parts):
    """Write a program's peaks: `best` has the highest of what each thread has seen."""
    each = peaks_each(parts)
    for _ in gl.static_range(5):
        best = _halved(peaks_ptr, best, part, each)
    _halved(peaks_ptr, best, part, each)


@gluon.jit
def _halved(peaks_ptr, best, part, each):
    """The highest of each two; all are written if they are as many as wanted."""
    MANY: gl.constexpr = best.shape[0]
    i = gl.arange(0, MANY, layout=best.type.layout)
    gl.store(peaks_ptr + part * MANY + i, best, mask=i < gl.where(each == MANY, MANY, 0))
    return gl.max(gl.reshape(best, [MANY // 2, 2]), 1)


@gluon.jit
def bound_of_all(peaks_ptr, done_ptr, parts, k):
    """An ordered score that k of a row's reach, and hardly more, by one warp; it waits for all programs' peaks, and
    says _HIGHEST if they do not come in time."""
    i = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    at = i.to(gl.int64) * 0 + done_ptr.to(gl.int64)
    here = 0
    looks = 0
    while (here < parts) & (looks < _PATIENCE):
        here = gl.max(
            gl.inline_asm_elementwise(_LOOK, "=r,l,r", [at, (i == 0).to(gl.int32)], gl.int32, is_pure=False, pack=1), 0
        )
        looks += 1
    many = parts * peaks_each(parts)
    L: gl.constexpr = gl.BlockedLayout([PEAKS // 128, 1, 4], [1, 32, 1], [1, 1, 1], [2, 1, 0])
    a = gl.arange(0, PEAKS // 128, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None]
    b = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
    c = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    place = a * 128 + b * 4 + c
    x = gl.load(peaks_ptr + place, mask=place < many, other=_LOWEST)
    # in whichever order: a thread's side by side
    x = gl.convert_layout(gl.reshape(gl.permute(x, (1, 0, 2)), [PEAKS]), _line(PEAKS, 1), assert_trivial=True)
    low, high = _ends(x, x, 1)
    least, _ = _roughly(_spread(x, low, high), k, k + k // 8, x, 1)
    bound = gl.maximum(_order(_floor(least, low, high)), _LOWEST + 1)
    return gl.where(here >= parts, bound, _HIGHEST)


@gluon.jit
def _floor(least, low, high):
    """A score below all that _spread takes to `least` or beyond: eight steps, for what is lost by rounding."""
    return gl.fma((least - 8).to(gl.float32, bitcast=True) - 1.0, high - low, low)


@gluon.jit
def _counts_of_all(counts_ptr, part, parts, said_s, WARPS: gl.constexpr):
    """How many candidates programs before `part` have, how many all have, and whether all have said it in time."""
    i = gl.arange(0, 32 * WARPS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    at = (counts_ptr + i).to(gl.int64)
    before, total, missing = 0, 0, 1
    looks = 0
    while (missing > 0) & (looks < _PATIENCE):
        x = gl.inline_asm_elementwise(
            _GLANCE, "=r,l,r", [at, (i < parts).to(gl.int32)], gl.int32, is_pure=False, pack=1
        )
        x = gl.reshape(x, [WARPS, 32])
        n = gl.reshape(i, [WARPS, 32])
        none = gl.sum(((x == 0) & (n < parts)).to(gl.int32), 1)
        a, b, c, _ = _told(none, gl.sum(gl.where(n < part, x, 0), 1), gl.sum(x, 1), none, said_s, WARPS)
        missing, before, total = gl.sum(a, 0), gl.sum(b, 0), gl.sum(c, 0)
        looks += 1
    return before - part, total - parts, missing == 0


@gluon.jit
def chosen_together(
    scores_ptr, bound, begin, end, k, part, parts, out_ptr, list_ptr, done_ptr, counts_ptr, said_s,
    MOST: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Write the ids of the k highest of a row's ordered scores, as one of the `parts` programs that made them; or say
    that this is the last one and has to choose alone.

    Its own are those from `begin` to `end`, and bound_of_all has given the bound. list_ptr is a row of scratch;
    done_ptr is one of two counters, SECOND behind it the other, and counts_ptr has one a program; all are left 0."""
    i = gl.arange(0, 32 * WARPS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    ids_ptr, values_ptr = list_ptr + PEAKS, list_ptr + (PEAKS + MOST)
    x, at = _line_of(scores_ptr + begin, end - begin, _CHUNK, WARPS)
    x, at = _by_threads(x, WARPS), _by_threads(at, WARPS)
    place, found = _before((x >= bound).to(gl.int32), said_s, WARPS)
    rest = _CHUNK + begin
    more = 0
    if rest < end:
        more = _found(scores_ptr + rest, end - rest, bound, said_s, WARPS)
    gl.store(counts_ptr + part, gl.where(bound == _HIGHEST, MOST + 1, found + more) + 1)
    before, many, in_time = _counts_of_all(counts_ptr, part, parts, said_s, WARPS)
    fits = in_time & (many >= k) & (many <= MOST)
    if fits:
        gl.store(ids_ptr + before + place, at + begin, mask=x >= bound)
        gl.store(values_ptr + before + place, x, mask=x >= bound)
        for first in range(rest, end, _CHUNK):
            before += found
            x, at = _line_of(scores_ptr + first, end - first, _CHUNK, WARPS)
            x, at = _by_threads(x, WARPS), _by_threads(at, WARPS)
            place, found = _before((x >= bound).to(gl.int32), said_s, WARPS)
            gl.store(ids_ptr + before + place, at + first, mask=x >= bound)
            gl.store(values_ptr + before + place, x, mask=x >= bound)
    gl.thread_barrier()
    came = gl.atomic_add(done_ptr + SECOND, gl.where(fits, 1, 0x10001), sem="acq_rel")
    slow = False
    if (came & 0xFFFF) == parts - 1:
        gl.store(done_ptr, 0)
        gl.store(done_ptr + SECOND, 0)
        gl.store(counts_ptr + i, 0, mask=i < parts)
        slow = (came >= 0x10000) | (not fits)  # of this program's own waiting, too, nobody else knows that it ended
        if not slow:
            _choose_exactly(values_ptr, ids_ptr, many, k, out_ptr, said_s, MOST, WARPS)
    return slow


@gluon.jit
def _choose_exactly(
    values_ptr, ids_ptr, many, k, out_ptr, said_s, MOST: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """Write the ids of the k highest of `many` candidates, of equal ones the first."""
    x, at = _line_of(values_ptr, many, MOST, WARPS)
    low, high = _ends(x, said_s, WARPS)
    y = _spread(x, low, high)
    least, count = _roughly(y, k, k, said_s, WARPS)
    equal = count
    if count != k:  # it ends between scores that are equal, or nearly
        y, at = _line_of(values_ptr, many, MOST, WARPS)
        least = _exactly(y, k)
        equal = k - gl.sum((y > least).to(gl.int32), 0)
    ids = _by_threads(gl.load(ids_ptr + at, mask=at // 4 * 4 < many, other=0), WARPS)
    y = _by_threads(y, WARPS)
    before, _ = _before((y > least).to(gl.int32) | ((y == least).to(gl.int32) << 16), said_s, WARPS)
    ties = before >> 16
    taken = (y > least) | ((y == least) & (ties < equal))
    place = (before & 0xFFFF) + gl.minimum(ties, equal)
    gl.store(out_ptr + place, ids, mask=taken & (place < k))  # NaN and infinity may be beyond all that was counted


@gluon.jit
def _found(source, many, bound, said_s, WARPS: gl.constexpr):
    """How many of `many` ordered scores reach the bound."""
    mine = gl.sum(gl.zeros([WARPS, _CHUNK // WARPS], gl.int32, layout=_rows(_CHUNK, WARPS)), 1)
    for first in range(0, many, _CHUNK):
        x, _ = _line_of(source + first, many - first, _CHUNK, WARPS)
        mine += gl.convert_layout(
            gl.sum(gl.reshape((x >= bound).to(gl.int32), [WARPS, _CHUNK // WARPS]), 1),
            mine.type.layout,
            assert_trivial=True,
        )
    mine, _, _, _ = _told(mine, mine, mine, mine, said_s, WARPS)
    return gl.sum(mine, 0)


@gluon.constexpr_function
def _rows(wide, warps):
    """[warps, wide / warps]: a warp has its own."""
    return gl.BlockedLayout([1, wide // (32 * warps)], [1, 32], [warps, 1], [1, 0])
