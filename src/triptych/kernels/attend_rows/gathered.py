"""How programs of together.py, each of which has some keys of a row, come to a slice of the row's result.

    workspace   averages [program, dim, head]     of a program's keys by their weights; float16, two heads a word
                shares [program, slice, head]     log2 of what they count; float32, a copy for each who asks

A word that nobody has written is EMPTY, which no average or share ever is: who waits for one looks at nothing else, and
leaves EMPTY behind. So a launch finds the workspace as the one before did, and a graph may replay it. Shares are asked
for first; whose shares are there has its averages there soon, so that few are asked for in vain, which would keep
others from writing theirs. All programs run side by side, so all that is waited for comes; should one have looked a
million times, which takes a second, it stops the launch as a fault rather than hang or go on with something else.

Of sixteen heads a thread has a product's columns 2t, 2t + 1, 2t + 8 and 2t + 9. They lie side by side here, so a piece
of sixteen bytes is of heads `heads_of`, and of the two in a word one is the next of the other.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

EMPTY: Any = gl.constexpr(-1)
"""Two NaN that no instruction makes."""
WARPS: Any = gl.constexpr(8)
"""Of every program."""
_UNIT: Any = gl.constexpr(64.0)
"""Of averages: float16 then reaches four millions, and 1e-2 with all of its digits."""
_FEW: Any = gl.constexpr(16)
"""Pieces that a thread waits for at once, at most."""


def gathering(heads: int, slices: int, splits: int) -> tuple[int, int, int]:
    """Splits whose averages are asked for at once, how many times, and how many lanes of a warp share them.

    Raises ValueError where a slice has too few dims for all lanes.
    """
    eights, pairs = heads // 8, 256 // slices
    most = _FEW.value * 16 * WARPS.value // (eights * pairs)
    for lanes in (1, 2, 4, 8, 16, 32):
        wide = min(eights, 32 // lanes)
        beside = 32 // lanes // wide
        tall = min(WARPS.value, pairs // beside)
        if tall and wide * (WARPS.value // tall) <= eights:
            at_once = max(lanes, min(1 << (splits - 1).bit_length(), most))
            return at_once, -(-splits // at_once), lanes
    raise ValueError(f"a slice of {pairs} pairs of dims of {heads} heads is too small for {WARPS.value} warps")


@gluon.constexpr_function
def _gathered_layout(lanes, eights, pairs):
    """[splits, dims, pieces of a dim]: a thread has both dims of a pair, and no other thread has them."""
    wide = min(eights, 32 // lanes)
    beside = 32 // lanes // wide
    tall = min(WARPS.value, pairs // beside)
    return gl.BlockedLayout([1, 2, 1], [lanes, beside, wide], [1, tall, WARPS.value // tall], [2, 1, 0])


@gluon.constexpr_function
def _pairs_layout(layout):
    """Of one of each pair of dims [pairs, pieces] of what lies [dims, pieces] in `layout`."""
    return gl.SliceLayout(0, gl.BlockedLayout([1, 1, 1], layout.threads_per_warp, layout.warps_per_cta, [2, 1, 0]))


@gluon.constexpr_function
def _each(layout, splits, dims, eights):
    """Pieces of a thread in as many dims or, if 0, two for all of them."""
    threads = [n * m for n, m in zip(layout.threads_per_warp, layout.warps_per_cta, strict=True)]
    return splits // threads[0] * (dims // threads[1] if dims else 2) * (eights // threads[2])


@gluon.constexpr_function
def _waiting(n):
    """Reads n pieces of four words, until none is EMPTY; their places are $4n .., the base $5n. Negative: 0, unread."""
    words = [f"{{${i}, ${n + i}, ${2 * n + i}, ${3 * n + i}}}" for i in range(n)]
    named = [f".reg .pred w<{n}>, k, g; .reg .b32 c; .reg .b64 a<{n}>;", "mov.b32 c, 0;"]
    named += [f"mov.b32 ${i}, 0;" for i in range(4 * n)]
    named += [f"setp.ge.s32 w{i}, ${4 * n + i}, 0; mad.wide.s32 a{i}, ${4 * n + i}, 16, ${5 * n};" for i in range(n)]
    reads = [f"@w{i} ld.relaxed.gpu.global.v4.b32 {words[i]}, [a{i}];" for i in range(n)]
    tests = ["setp.eq.s32 k, $0, -1;"] + [f"setp.eq.or.s32 k, ${i}, -1, k;" for i in range(1, 4 * n)]
    ends = ["add.s32 c, c, 1;", "setp.lt.and.s32 g, c, 1048576, k;", "@g bra AGAIN;", "@k trap;"]
    return "{ " + " ".join([*named, "AGAIN:", *reads, *tests, *ends]) + " }"


@gluon.constexpr_function
def _leaving(n):
    """Writes EMPTY to n pieces; places follow $n, the base $2n."""
    named = [f".reg .pred w<{n}>; .reg .b32 e; .reg .b64 a<{n}>;", "mov.b32 e, -1;"]
    named += [f"setp.ge.s32 w{i}, ${n + i}, 0; mad.wide.s32 a{i}, ${n + i}, 16, ${2 * n};" for i in range(n)]
    writes = [f"@w{i} st.global.v4.b32 [a{i}], {{e, e, e, e}};" for i in range(n)]
    return "{ " + " ".join([*named, *writes, *[f"mov.b32 ${i}, 0;" for i in range(n)]]) + " }"


@gluon.constexpr_function
def _operands(results, n):
    return ",".join(["=&r"] * results + ["r"] * n + ["l"] * n)


@gluon.jit
def _gathered(base, place, N: gl.constexpr):
    """Four words of each piece of the workspace, as soon as all are there; N pieces at once."""
    return gl.inline_asm_elementwise(
        _waiting(N),
        _operands(4 * N, N),
        [place, base.to(gl.int64)],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=False,
        pack=N,
    )


@gluon.jit
def _leave(base, place, N: gl.constexpr):
    """EMPTY in each piece."""
    gl.inline_asm_elementwise(
        _leaving(N), _operands(N, N), [place, base.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=N
    )


@gluon.jit
def _quick(x, WHAT: gl.constexpr):
    """One over x, or log2 of x, to 22 bits: what is exact to the last takes a dozen instructions or two."""
    return gl.inline_asm_elementwise(
        WHAT + ".approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def tell_averages(at, sums, weight, N: gl.constexpr):
    """Sums of 128 dims [128, N] by their weights, to words from `at` on."""
    x = sums * _quick(_UNIT * weight, "rcp")
    left, right = gl.split(gl.reshape(x, [128, N // 2, 2]))
    word = gl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [left, right], dtype=gl.int32, is_pure=True, pack=1
    )
    if N == 16:
        word = gl.reshape(gl.permute(gl.reshape(word, [128, 2, 4]), (0, 2, 1)), [128, 8])
    else:
        word = gl.reshape(gl.permute(gl.reshape(word, [128, 2, 2, 4]), (0, 3, 1, 2)), [128, 16])
    word = gl.convert_layout(word, _told_layout(N), assert_trivial=True)
    d = gl.arange(0, 128, layout=gl.SliceLayout(1, word.type.layout))[:, None]
    gl.store(at + d * (N // 2) + gl.arange(0, N // 2, layout=gl.SliceLayout(0, word.type.layout))[None, :], word)


@gluon.constexpr_function
def _told_layout(heads):
    """Words [128, heads / 2] as products have them: those of a dim side by side in a thread."""
    if heads == 16:
        regs, lanes = [[0, 1], [8, 0]], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    else:
        regs, lanes = [[0, 1], [0, 2], [8, 0]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(regs, lanes, [[16, 0], [32, 0], [64, 0]], [], [128, heads // 2])


@gluon.jit
def tell_shares(at, peak, weight, copies, N: gl.constexpr):
    """What heads' keys count, 2^peak [1, N] * weight [128, N], whose rows are alike, to `copies` times N words."""
    share = peak + _quick(weight, "lg2")
    if N == 16:
        share = gl.reshape(gl.permute(gl.reshape(share, [128, 2, 4, 2]), (0, 3, 2, 1)), [128, 16])
    else:
        share = gl.reshape(gl.permute(gl.reshape(share, [128, 2, 2, 4, 2]), (0, 4, 3, 1, 2)), [128, 32])
    bits = share.to(gl.int32, bitcast=True)
    bits = gl.where(bits == EMPTY, 0x7FFFFFFF, bits)
    copy = gl.arange(0, 128, layout=gl.SliceLayout(1, share.type.layout))[:, None]
    h = gl.arange(0, N, layout=gl.SliceLayout(0, share.type.layout))[None, :]
    gl.store(at + copy * N + h, bits, mask=copy < copies)


@gluon.jit
def _places(
    line, slice_, s, there, N: gl.constexpr, SLICES: gl.constexpr, SHARES: gl.constexpr, G: gl.constexpr
):  # fmt: skip
    """Pieces with splits' averages [splits, dims, eights] and left and right shares; -1 where they are not `there`."""
    DIMS: gl.constexpr = 512 // SLICES
    d = slice_ * DIMS + gl.arange(0, DIMS, layout=gl.SliceLayout(0, gl.SliceLayout(2, G)))[None, :]
    e = gl.arange(0, N // 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, G)))
    row = ((line + s)[:, None] * 512 + d) * (N // 8)
    averages = gl.where(there[:, None, None], row[:, :, None] + e[None, None, :], -1)
    P: gl.constexpr = gl.SliceLayout(1, G)
    s = gl.convert_layout(s, gl.SliceLayout(1, P), assert_trivial=True)
    there = gl.convert_layout(there, gl.SliceLayout(1, P), assert_trivial=True)
    share = SHARES + ((line + s) * SLICES + slice_)[:, None] * (N // 4) + e[None, :]
    return averages, gl.where(there[:, None], share, -1), gl.where(there[:, None], share + N // 8, -1)


@gluon.jit
def _apart(x, there, L: gl.constexpr):
    """Shares of left and right heads [splits, eights]; next to nothing where there are none."""
    left, right = gl.split(x)
    left = gl.convert_layout(left, L, assert_trivial=True).to(gl.float32, bitcast=True)
    right = gl.convert_layout(right, L, assert_trivial=True).to(gl.float32, bitcast=True)
    return gl.where(there, left, -1.0e30), gl.where(there, right, -1.0e30)


@gluon.jit
def _halves(word):
    """Left and right heads' averages, as told."""
    return gl.inline_asm_elementwise(
        "{ .reg .b16 l, r; mov.b32 {l, r}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, r; }",
        "=f,=f,r",
        [word],
        dtype=(gl.float32, gl.float32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _none(sink_ptr, none):
    """A head's share and average before any split: the sink's."""
    sink = gl.load(sink_ptr) * 1.4426950408889634
    return sink, gl.full(sink.shape, 1.0, gl.float32, layout=sink.type.layout), none


@gluon.jit
def _merged(so_far, x, share):
    """Highest share, total in units of it, and sums [dims, eights] of heads, with those of more splits."""
    highest0, total, sums = so_far
    highest = gl.maximum(highest0, gl.max(share, 0))
    fade, factor = gl.exp2(highest0 - highest), gl.exp2(share - highest[None, :])
    faded = gl.convert_layout(fade, gl.SliceLayout(0, sums.type.layout), assert_trivial=True)[None, :]
    return highest, total * fade + gl.sum(factor, 0), sums * faded + gl.sum(x * factor[:, None, :], 0)


@gluon.jit
def _merged_pair(left, right, word, share, there):
    """_merged of the two heads of words [splits, dims, eights] with the shares [splits, eights, 2] of both."""
    x, y = _halves(word)
    share_x, share_y = _apart(share, there, gl.SliceLayout(1, word.type.layout))
    return _merged(left, x, share_x), _merged(right, y, share_y)


@gluon.jit
def _put(at, so_far, cos, sin, E: gl.constexpr):
    """Pairs of dims of heads, rotated back."""
    _, total, x = so_far
    x = x * gl.convert_layout(_UNIT / total, gl.SliceLayout(0, x.type.layout), assert_trivial=True)[None, :]
    even, odd = gl.split(gl.permute(gl.reshape(x, [x.shape[0] // 2, 2, x.shape[1]]), (0, 2, 1)))
    even, odd = gl.convert_layout(even, E, assert_trivial=True), gl.convert_layout(odd, E, assert_trivial=True)
    pair = gl.join(even * cos + odd * sin, odd * cos - even * sin).to(gl.bfloat16)
    both = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, pair.type.layout)))[None, None, :]
    gl.store(gl.convert_layout(at, gl.SliceLayout(2, pair.type.layout), assert_trivial=True)[:, :, None] + both, pair)


@gluon.jit
def _put_two(at, left, right, cos, sin, E: gl.constexpr):
    _put(at, left, cos, sin, E)
    _put(at + 512, right, cos, sin, E)


@gluon.jit
def _there(s, in_window, seen, REACH: gl.constexpr, KEYS: gl.constexpr):
    """Whether splits s have any keys."""
    return gl.where(s * KEYS < REACH, s * KEYS < in_window, s * KEYS - REACH < seen)


@gluon.jit
def put_result(
    work_ptr, sink_ptr, cos_ptr, sin_ptr, out_ptr, line, slice_, in_window, seen,
    REACH: gl.constexpr, KEYS: gl.constexpr, N: gl.constexpr, SLICES: gl.constexpr, SHARES: gl.constexpr,
    SPLITS: gl.constexpr, TIMES: gl.constexpr, LANES: gl.constexpr,
):  # fmt: skip
    """A slice of the dims of N heads, of what TIMES times SPLITS splits have, the first of them program `line`."""
    DIMS: gl.constexpr = 512 // SLICES
    G: gl.constexpr = _gathered_layout(LANES, N // 8, DIMS // 2)
    EACH: gl.constexpr = _each(G, SPLITS, DIMS, N // 8)
    BOTH: gl.constexpr = _each(G, SPLITS, 0, N // 8)
    E: gl.constexpr = _pairs_layout(G)
    P: gl.constexpr = gl.SliceLayout(1, G)
    # of the four words of a piece, the left heads: 0, 8, 2 and 10 beyond the piece's first, of 32 heads 0, 8, 16 and 24
    THIRD: gl.constexpr = 2 if N == 16 else 16
    pair = slice_ * (DIMS // 2) + gl.arange(0, DIMS // 2, layout=gl.SliceLayout(1, E))[:, None]
    cos = gl.load(cos_ptr + pair - 224, mask=pair >= 224, other=1.0)
    sin = gl.load(sin_ptr + pair - 224, mask=pair >= 224, other=0.0)
    at = out_ptr + gl.arange(0, N // 8, layout=gl.SliceLayout(0, E))[None, :] * (64 // N * 512) + 2 * pair
    sink_ptr += gl.arange(0, N // 8, layout=gl.SliceLayout(0, P)) * (64 // N)
    none = gl.zeros([DIMS, N // 8], gl.float32, layout=gl.SliceLayout(0, G))
    left0, right0 = _none(sink_ptr, none), _none(sink_ptr + 1, none)
    left1, right1 = _none(sink_ptr + 8, none), _none(sink_ptr + 9, none)
    left2, right2 = _none(sink_ptr + THIRD, none), _none(sink_ptr + THIRD + 1, none)
    left3, right3 = _none(sink_ptr + THIRD + 8, none), _none(sink_ptr + THIRD + 9, none)
    s = gl.arange(0, SPLITS, layout=gl.SliceLayout(1, gl.SliceLayout(2, G)))
    for n in gl.static_range(TIMES):
        there = _there(n * SPLITS + s, in_window, seen, REACH, KEYS)
        averages, left, right = _places(line, slice_, n * SPLITS + s, there, N, SLICES, SHARES, G)
        share0, share1, share2, share3 = _gathered(work_ptr, gl.join(left, right), BOTH)
        word0, word1, word2, word3 = _gathered(work_ptr, averages, EACH)
        left0, right0 = _merged_pair(left0, right0, word0, share0, left >= 0)
        left1, right1 = _merged_pair(left1, right1, word1, share1, left >= 0)
        left2, right2 = _merged_pair(left2, right2, word2, share2, left >= 0)
        left3, right3 = _merged_pair(left3, right3, word3, share3, left >= 0)
    _put_two(at, left0, right0, cos, sin, E)
    _put_two(at + 8 * 512, left1, right1, cos, sin, E)
    _put_two(at + THIRD * 512, left2, right2, cos, sin, E)
    _put_two(at + (THIRD + 8) * 512, left3, right3, cos, sin, E)
    gl.thread_barrier()  # all warps have read the shares
    for n in gl.static_range(TIMES):
        there = _there(n * SPLITS + s, in_window, seen, REACH, KEYS)
        averages, left, right = _places(line, slice_, n * SPLITS + s, there, N, SLICES, SHARES, G)
        _leave(work_ptr, averages, EACH)
        _leave(work_ptr, gl.join(left, right), BOTH)
