"""How programs of together.py that are many come to slices of a row's result: as gathered.py, by half of the bytes.

    workspace   averages [program, dim, place of a head]    of a program's keys by their weights; float16, two a word
                shares   [program, slice, place of a head]  log2 of what its keys count; a copy for each who asks

An average is as large as values are, whatever the scores, so float16 has it to an eighth of what bfloat16 makes of the
result. What has not been written is EMPTY, see gathered.py. Here averages are asked for when it is found what each
counts, those of the rest of the splits as well, and only what comes EMPTY is asked for again.

A product's thread has columns 2t, 2t + 1, 2t + 8, ... of its dims; they lie side by side, so that what it writes at
once are sixteen bytes, and four threads have whole lines. `_head` says which head is at a place.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triptych.kernels.attend_rows.gathered import WARPS, leave, there, told

_UNIT: Any = gl.constexpr(16.0)
"""Of averages: float16 then reaches a million, and a thousandth with all of its digits."""


def rounds_for(splits: int) -> tuple[int, int]:
    """Splits that each warp has at once, and of the rest: powers of two, for which tensors have room."""
    rounds = -(-splits // WARPS.value)
    most: int = 1 << (rounds.bit_length() - 1)
    return most, 1 << (rounds - most - 1).bit_length() if rounds > most else 0


def have_room(heads: int, slices: int, splits: int) -> bool:
    """Whether a thread asks for sixteen pieces at once at most, which take a quarter of its registers."""
    most, _ = rounds_for(splits)
    return bool(most * WARPS.value * heads <= 64 * slices)


@gluon.constexpr_function
def _pieces_layout(heads):
    """[splits, dims, pieces of eight heads]: a warp has some splits, and of them whole lines."""
    return gl.BlockedLayout([1, 1, 1], [1, 256 // heads, heads // 8], [WARPS.value, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def _values_layout(heads):
    """[splits, dims, heads] of the same threads."""
    return gl.BlockedLayout([1, 1, 8], [1, 256 // heads, heads // 8], [WARPS.value, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def _shares_layout(heads, each):
    """[splits, heads], of which a thread has four side by side, or [splits, quads] for an `each` of 1."""
    return gl.BlockedLayout([1, each], [128 // heads, heads // 4], [WARPS.value, 1], [1, 0])


@gluon.constexpr_function
def _warps_layout(dims, heads):
    """[warps, dims, heads] of what warps have added up: a thread has pairs of dims, of all warps."""
    across = min(32, heads)
    along = 32 // across
    tall = min(WARPS.value, dims // 2 // along)
    return gl.BlockedLayout([WARPS.value, 2, 1], [1, along, across], [1, tall, WARPS.value // tall], [0, 1, 2])


@gluon.constexpr_function
def _pairs_layout(layout):
    """Of one of each pair of dims [pairs, heads] of what lies [warps, dims, heads] in `layout`."""
    return gl.BlockedLayout([1, 1], layout.threads_per_warp[1:], layout.warps_per_cta[1:], [0, 1])


@gluon.constexpr_function
def _each(splits, dims, heads):
    """Pieces that a thread has of so many."""
    return splits * dims * (heads // 8) // (32 * WARPS.value)


@gluon.constexpr_function
def _asking(n):
    """Reads n times four words; places follow $4n, the base $5n. Negative: 0, unread."""
    words = [f"{{${i}, ${n + i}, ${2 * n + i}, ${3 * n + i}}}" for i in range(n)]
    named = [f".reg .pred w<{n}>; .reg .b64 a<{n}>;", *[f"mov.b32 ${i}, 0;" for i in range(4 * n)]]
    named += [f"setp.ge.s32 w{i}, ${4 * n + i}, 0; mad.wide.s32 a{i}, ${4 * n + i}, 16, ${5 * n};" for i in range(n)]
    reads = [f"@w{i} ld.relaxed.gpu.global.v4.b32 {words[i]}, [a{i}];" for i in range(n)]
    return "{ " + " ".join([*named, *reads]) + " }"


@gluon.constexpr_function
def _waiting(n):
    """Reads those of n times four words again of which one is EMPTY, until none is; places are $8n .., the base $9n."""
    words = [[i + n * word for word in range(4)] for i in range(n)]
    named = [f".reg .pred k<{n}>, g, any; .reg .b32 c; .reg .b64 a<{n}>;", "mov.b32 c, 0;"]
    named += [f"mad.wide.s32 a{i}, ${8 * n + i}, 16, ${9 * n};" for i in range(n)]
    tests = []
    for i, piece in enumerate(words):
        tests += [f"setp.eq.s32 k{i}, ${piece[0]}, -1;"]
        tests += [f"setp.eq.or.s32 k{i}, ${word}, -1, k{i};" for word in piece[1:]]
    tests += ["mov.pred any, k0;", *[f"or.pred any, any, k{i};" for i in range(1, n)], "@!any bra DONE;"]
    reads = ["{" + ", ".join(f"${word}" for word in piece) + "}" for piece in words]
    reads = [f"@k{i} ld.relaxed.gpu.global.v4.b32 {read}, [a{i}];" for i, read in enumerate(reads)]
    ends = ["add.s32 c, c, 1;", "setp.lt.s32 g, c, 1048576;", "@g bra AGAIN;", "trap;", "DONE:"]
    return "{ " + " ".join([*named, "AGAIN:", *tests, *reads, *ends]) + " }"


@gluon.constexpr_function
def _operands(n, again):
    tied = [str(i) for i in range(4 * n)] if again else []
    return ",".join(["=&r"] * (4 * n) + tied + ["r"] * n + ["l"] * n)


@gluon.jit
def _ask(base, place, N: gl.constexpr):
    """Four words from each place, of 16 bytes, on their way; a thread asks for N at once."""
    return gl.inline_asm_elementwise(
        _asking(N),
        _operands(N, False),
        [place, base.to(gl.int64)],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=False,
        pack=N,
    )


@gluon.jit
def _wait(words, base, place, N: gl.constexpr):
    """What has been asked for, as soon as all is there."""
    return gl.inline_asm_elementwise(
        _waiting(N),
        _operands(N, True),
        [words[0], words[1], words[2], words[3], place, base.to(gl.int64)],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=False,
        pack=N,
    )


@gluon.jit
def _head(place, N: gl.constexpr):
    """Which head is at a place of N."""
    if N == 16:
        return place // 2 % 2 * 8 + place // 4 * 2 + place % 2
    else:
        return place // 32 * 32 + place // 2 % 4 * 8 + place // 8 % 4 * 2 + place % 2


@gluon.constexpr_function
def _told_layout(heads):
    """Words [128, heads / 2] as products have them: those of a dim side by side in a thread."""
    if heads == 16:
        regs, lanes = [[0, 1], [8, 0]], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    else:
        regs, lanes = [[0, 1], [0, 2], [8, 0]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
        regs += [[0, 16]] if heads == 64 else []
    return gl.DistributedLinearLayout(regs, lanes, [[16, 0], [32, 0], [64, 0]], [], [128, heads // 2])


@gluon.jit
def _side_by_side(words, N: gl.constexpr):
    """Words [128, N / 2] of pairs of heads, in the order in which they lie."""
    if N == 16:
        words = gl.permute(gl.reshape(words, [128, 2, 4]), (0, 2, 1))
    else:
        words = gl.permute(gl.reshape(words, [128, N // 32, 4, 4]), (0, 1, 3, 2))
    return gl.convert_layout(gl.reshape(words, [128, N // 2]), _told_layout(N), assert_trivial=True)


@gluon.jit
def _quick(x, WHAT: gl.constexpr):
    """One over x, or log2 of x, to 22 bits: what is exact to the last takes a dozen instructions or two."""
    return gl.inline_asm_elementwise(
        WHAT + ".approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def tell_averages(at, sums, weight, N: gl.constexpr):
    """Sums of 128 dims [128, N] by their weights [N], to words from `at` on."""
    x = sums * _quick(_UNIT * weight, "rcp")[None, :]
    left, right = gl.split(gl.reshape(x, [128, N // 2, 2]))
    word = gl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [left, right], dtype=gl.int32, is_pure=True, pack=1
    )
    word = _side_by_side(word, N)
    d = gl.arange(0, 128, layout=gl.SliceLayout(1, word.type.layout))[:, None]
    gl.store(at + d * (N // 2) + gl.arange(0, N // 2, layout=gl.SliceLayout(0, word.type.layout))[None, :], word)


@gluon.jit
def tell_shares(at, peak, weight, SLICES: gl.constexpr, N: gl.constexpr):
    """What keys of heads count, of peaks and weights [N]: a copy for each slice of the result."""
    C: gl.constexpr = gl.BlockedLayout([1, 2], [64 // N, N // 2], [WARPS, 1], [1, 0])
    share = peak + _quick(weight, "lg2")
    if N == 16:
        share = gl.permute(gl.reshape(share, [2, 4, 2]), (1, 0, 2))
    else:
        share = gl.permute(gl.reshape(share, [N // 32, 4, 4, 2]), (0, 2, 1, 3))
    share = gl.convert_layout(told(gl.reshape(share, [N])), gl.SliceLayout(0, C))
    at = at + gl.arange(0, SLICES, layout=gl.SliceLayout(1, C))[:, None] * N
    at = at + gl.arange(0, N, layout=gl.SliceLayout(0, C))[None, :]
    gl.store(at, gl.broadcast(share[None, :], at)[0])


@gluon.jit
def _side(words, L: gl.constexpr):
    """Four values [a, b] each, as the four of [a, 4 * b]."""
    x = gl.permute(gl.join(gl.join(words[0], words[1]), gl.join(words[2], words[3])), (0, 1, 3, 2))
    return gl.convert_layout(gl.reshape(x, [x.shape[0], 4 * x.shape[1]]), L, assert_trivial=True)


@gluon.jit
def _factors(words, known, sink, L: gl.constexpr):
    """What averages [splits, heads] count in results, with the sinks [heads]."""
    share = gl.where(known[:, None], _side(words, L).to(gl.float32, bitcast=True), -1.0e30)
    sink = sink * 1.4426950408889634
    highest = gl.maximum(gl.max(share, 0), sink)
    factor = gl.exp2(share - highest[None, :])
    return factor * (_UNIT / (gl.sum(factor, 0) + gl.exp2(sink - highest)))[None, :]


@gluon.jit
def _halves(word):
    """Two averages of a word, side by side."""
    left, right = gl.inline_asm_elementwise(
        "{ .reg .b16 l, r; mov.b32 {l, r}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, r; }",
        "=f,=f,r",
        [word],
        dtype=(gl.float32, gl.float32),
        is_pure=True,
        pack=1,
    )
    return gl.join(left, right)


@gluon.jit
def _weighed(words, factor_s, V: gl.constexpr):
    """Averages in words [splits, dims, pieces] by their factors [splits, heads]; what a warp has of each, added up."""
    x = gl.join(gl.join(_halves(words[0]), _halves(words[1])), gl.join(_halves(words[2]), _halves(words[3])))
    x = gl.permute(x, (0, 1, 2, 5, 4, 3))
    x = gl.convert_layout(gl.reshape(x, [x.shape[0], x.shape[1], 8 * x.shape[2]]), V, assert_trivial=True)
    x *= factor_s.load(gl.SliceLayout(1, V))[:, None, :]
    each = gl.sum(gl.reshape(x, [x.shape[0] // WARPS, WARPS, x.shape[1], x.shape[2]]), 0)
    return gl.convert_layout(each, V, assert_trivial=True)


@gluon.jit
def _pieces(line, slice_, in_window, seen, FIRST: gl.constexpr, SPLITS: gl.constexpr, shape, P: gl.constexpr):
    """Where averages of a slice lie that SPLITS splits from FIRST on have; negative where there are none."""
    REACH: gl.constexpr = shape[0]
    KEYS: gl.constexpr = shape[1]
    N: gl.constexpr = shape[2]
    DIMS: gl.constexpr = 512 // shape[3]
    s = FIRST + gl.arange(0, SPLITS, layout=gl.SliceLayout(1, gl.SliceLayout(2, P)))[:, None, None]
    d = slice_ * DIMS + gl.arange(0, DIMS, layout=gl.SliceLayout(0, gl.SliceLayout(2, P)))[None, :, None]
    e = gl.arange(0, N // 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, P)))[None, None, :]
    return gl.where(there(s, in_window, seen, REACH, KEYS), ((line + s) * 512 + d) * (N // 8) + e, -1)


@gluon.jit
def put_result(
    averages_ptr, shares_ptr, sink_ptr, cos_ptr, sin_ptr, out_ptr, line, slice_, in_window, seen,
    REACH: gl.constexpr, KEYS: gl.constexpr, N: gl.constexpr, SLICES: gl.constexpr, SPLITS: gl.constexpr,
    MAIN: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """A slice of the dims of N heads, of what all splits have, of which the first is program `line`'s.

    A warp has MAIN splits and TAIL of the rest; of SPLITS, which are no fewer, it is found what they count.
    """
    DIMS: gl.constexpr = 512 // SLICES
    P: gl.constexpr = _pieces_layout(N)
    V: gl.constexpr = _values_layout(N)
    Q: gl.constexpr = _shares_layout(N, 1)
    F: gl.constexpr = _shares_layout(N, 4)
    W: gl.constexpr = _warps_layout(DIMS, N)
    O: gl.constexpr = _pairs_layout(W)  # noqa: E741
    s = gl.arange(0, SPLITS, layout=gl.SliceLayout(1, Q))
    q = gl.arange(0, N // 4, layout=gl.SliceLayout(0, Q))
    place = ((line + s) * SLICES + slice_)[:, None] * (N // 4) + q[None, :]
    place = gl.where(there(s, in_window, seen, REACH, KEYS)[:, None], place, -1)
    # what else is needed is asked for before anything is waited for
    sink = gl.load(sink_ptr + _head(gl.arange(0, N, layout=gl.SliceLayout(0, F)), N))
    pair = gl.arange(0, DIMS // 2, layout=gl.SliceLayout(1, O))[:, None] + slice_ * (DIMS // 2)
    cos = gl.load(cos_ptr + pair - 224, mask=pair >= 224, other=1.0)
    sin = gl.load(sin_ptr + pair - 224, mask=pair >= 224, other=0.0)
    SHARES: gl.constexpr = _each(SPLITS, 2, N)
    shares = _wait(_ask(shares_ptr, place, SHARES), shares_ptr, place, SHARES)
    shape: gl.constexpr = (REACH, KEYS, N, SLICES)
    EACH: gl.constexpr = _each(MAIN * WARPS, DIMS, N)
    main = _pieces(line, slice_, in_window, seen, 0, MAIN * WARPS, shape, P)
    leave(shares_ptr, place, SHARES)
    known = there(gl.arange(0, SPLITS, layout=gl.SliceLayout(1, F)), in_window, seen, REACH, KEYS)
    factor_s = gl.allocate_shared_memory(gl.float32, [SPLITS, N], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    factor_s.store(_factors(shares, known, sink, F))
    # not before: what else goes through the same pipe, as all does that warps add up, would wait behind it
    words = _ask(averages_ptr, main, EACH)
    if TAIL > 0:
        LEFT: gl.constexpr = _each(TAIL * WARPS, DIMS, N)
        tail = _pieces(line, slice_, in_window, seen, MAIN * WARPS, TAIL * WARPS, shape, P)
        rest = _ask(averages_ptr, tail, LEFT)
    words = _wait(words, averages_ptr, main, EACH)
    leave(averages_ptr, main, EACH)
    x = _weighed(words, factor_s.slice(0, MAIN * WARPS, 0), V)
    if TAIL > 0:
        rest = _wait(rest, averages_ptr, tail, LEFT)
        leave(averages_ptr, tail, LEFT)
        x += _weighed(rest, factor_s.slice(MAIN * WARPS, TAIL * WARPS, 0), V)
    # a sum across warps goes through shared memory as the compiler does it, too, but in places of the same banks
    warps_s = gl.allocate_shared_memory(gl.float32, [WARPS, DIMS, N], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    warps_s.store(x)
    _put(out_ptr, gl.sum(warps_s.load(W), 0), slice_ * DIMS, cos, sin, N)


@gluon.jit
def _put(out_ptr, x, first, cos, sin, N: gl.constexpr):
    """Dims from `first` on of heads [dims, N], pairs of dims rotated back."""
    x = gl.permute(gl.reshape(x, [x.shape[0] // 2, 2, N]), (0, 2, 1))
    even, odd = gl.split(x)
    even = gl.convert_layout(even, cos.type.layout, assert_trivial=True)
    odd = gl.convert_layout(odd, cos.type.layout, assert_trivial=True)
    both = gl.join(even * cos + odd * sin, odd * cos - even * sin).to(gl.bfloat16)
    L: gl.constexpr = both.type.layout
    pair = gl.arange(0, both.shape[0], layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None]
    head = _head(gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(2, L))), N)[None, :, None]
    side = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    gl.store(out_ptr + head * 512 + first + pair * 2 + side, both)
