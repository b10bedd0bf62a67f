"""How programs of together.py, each of which has some keys of a row, come to a slice of the row's result.

    workspace   sums [program, dim, head]              of a program's keys by their weights; float32
                shares [program, slice, 2, head]       peaks of scores, and weights; a copy for each who asks

A word that nobody has written is EMPTY, which no sum or share ever is: who waits for one looks at nothing else, and
leaves EMPTY behind. So a launch finds the workspace as the one before did, and a graph may replay it. Shares are asked
for first; whose shares are there has its sums there soon, so that few are asked for in vain, which would keep others
from writing theirs. All programs run side by side, so all that is waited for comes; should one have looked a million
times, which takes a second, it stops the launch as a fault rather than hang or go on with something else.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

EMPTY: Any = gl.constexpr(-1)
"""A NaN that no instruction makes."""
WARPS: Any = gl.constexpr(8)
"""Of every program."""


def lanes_for(heads: int, slices: int) -> int:
    """How many lanes of a warp share the splits of a sum: as few as leave each lane a pair of a slice's dims.

    Raises ValueError where a slice has too few dims for all lanes.
    """
    quads, pairs = heads // 4, 256 // slices
    for lanes in (1, 2, 4, 8):
        wide = min(quads, 4)
        tall = min(WARPS.value, pairs // (32 // lanes // wide))
        if tall and wide * (WARPS.value // tall) <= quads:
            return lanes
    raise ValueError(f"a slice of {pairs} pairs of dims of {heads} heads is too small for {WARPS.value} warps")


@gluon.constexpr_function
def _gathered_layout(lanes, quads, pairs):
    """[splits, dims, quads of heads]: a thread has both dims of a pair, and no other thread has them."""
    wide = min(quads, 4)
    beside = 32 // lanes // wide
    tall = min(WARPS.value, pairs // beside)
    return gl.BlockedLayout([1, 2, 1], [lanes, beside, wide], [1, tall, WARPS.value // tall], [2, 1, 0])


@gluon.constexpr_function
def _pairs_layout(layout):
    """Of one of each pair of dims [pairs, quads] of what lies [dims, quads] in `layout`."""
    return gl.SliceLayout(0, gl.BlockedLayout([1, 1, 1], layout.threads_per_warp, layout.warps_per_cta, [2, 1, 0]))


@gluon.constexpr_function
def _each(layout, splits, dims, quads):
    """How many quads of heads a thread asks for at once, of as many dims or, if 0, two for all: 16 at most."""
    threads = [n * m for n, m in zip(layout.threads_per_warp, layout.warps_per_cta, strict=True)]
    return min(16, splits // threads[0] * (dims // threads[1] if dims else 2) * (quads // threads[2]))


@gluon.constexpr_function
def _waiting(n):
    """Reads n times four words, until none is EMPTY; their places are $4n .., the base $5n. Negative: 0, unread."""
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
    """Writes EMPTY to n times four words; places follow $n, the base $2n."""
    named = [f".reg .pred w<{n}>; .reg .b32 e; .reg .b64 a<{n}>;", "mov.b32 e, -1;"]
    named += [f"setp.ge.s32 w{i}, ${n + i}, 0; mad.wide.s32 a{i}, ${n + i}, 16, ${2 * n};" for i in range(n)]
    writes = [f"@w{i} st.global.v4.b32 [a{i}], {{e, e, e, e}};" for i in range(n)]
    return "{ " + " ".join([*named, *writes, *[f"mov.b32 ${i}, 0;" for i in range(n)]]) + " }"


@gluon.constexpr_function
def _operands(results, n):
    return ",".join(["=&r"] * results + ["r"] * n + ["l"] * n)


@gluon.jit
def _gathered(base, place, N: gl.constexpr):
    """Four float32 from each place, of 16 bytes, as soon as all are there; a thread asks for N at once."""
    a, b, c, d = gl.inline_asm_elementwise(
        _waiting(N),
        _operands(4 * N, N),
        [place, base.to(gl.int64)],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=False,
        pack=N,
    )
    a, b = a.to(gl.float32, bitcast=True), b.to(gl.float32, bitcast=True)
    return a, b, c.to(gl.float32, bitcast=True), d.to(gl.float32, bitcast=True)


@gluon.jit
def leave(base, place, N: gl.constexpr):
    """EMPTY in the four words at each place."""
    gl.inline_asm_elementwise(
        _leaving(N), _operands(N, N), [place, base.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=N
    )


@gluon.jit
def told(x):
    """Bits of float32 x, never EMPTY."""
    bits = x.to(gl.int32, bitcast=True)
    return gl.where(bits == EMPTY, 0x7FFFFFFF, bits)


@gluon.jit
def there(s, in_window, seen, REACH: gl.constexpr, KEYS: gl.constexpr):
    """Whether splits s of KEYS keys have any of a row's, which are in its window or entries that it sees."""
    return gl.where(s * KEYS < REACH, s * KEYS < in_window, s * KEYS - REACH < seen)


@gluon.jit
def tell_sums(at, sums, N: gl.constexpr):
    """Sums [128, N] of 128 dims, to words from `at` on."""
    d = gl.arange(0, 128, layout=gl.SliceLayout(1, sums.type.layout))[:, None]
    h = gl.arange(0, N, layout=gl.SliceLayout(0, sums.type.layout))[None, :]
    gl.store(at + d * N + h, told(sums))


@gluon.jit
def tell_shares(at, peak, p, SLICES: gl.constexpr, N: gl.constexpr):
    """Peaks [N], and weights, which are sums of p [.., N]: a copy for each slice of the result."""
    C: gl.constexpr = gl.BlockedLayout([1, 2], [64 // N, N // 2], [WARPS, 1], [1, 0])
    at = at + gl.arange(0, SLICES, layout=gl.SliceLayout(1, C))[:, None] * (2 * N)
    at = at + gl.arange(0, N, layout=gl.SliceLayout(0, C))[None, :]
    gl.store(at, gl.broadcast(gl.convert_layout(told(peak), gl.SliceLayout(0, C))[None, :], at)[0])
    weight = gl.convert_layout(told(gl.sum(p, 0)), gl.SliceLayout(0, C))
    gl.store(at + N, gl.broadcast(weight[None, :], at)[0])


@gluon.jit
def _factors(share, known, sink, L: gl.constexpr):
    """What splits' sums count [splits, quads], of peaks and weights [splits, quads, 2], with the sinks [quads]."""
    peak, weight = gl.split(share)
    peak = gl.where(known, gl.convert_layout(peak, L, assert_trivial=True), -1.0e30)
    weight = gl.convert_layout(weight, L, assert_trivial=True)
    sink = sink * 1.4426950408889634
    highest = gl.maximum(gl.max(peak, 0), sink)
    factor = gl.exp2(peak - highest[None, :])
    return factor / (gl.sum(weight * factor, 0) + gl.exp2(sink - highest))[None, :]


@gluon.jit
def _put(at, x, factor, cos, sin, E: gl.constexpr):
    """One of each four heads: sums [splits, dims, quads] by what they count, pairs of dims rotated back."""
    x = gl.sum(x * factor[:, None, :], 0)
    even, odd = gl.split(gl.permute(gl.reshape(x, [x.shape[0] // 2, 2, x.shape[1]]), (0, 2, 1)))
    even, odd = gl.convert_layout(even, E, assert_trivial=True), gl.convert_layout(odd, E, assert_trivial=True)
    pair = gl.join(even * cos + odd * sin, odd * cos - even * sin).to(gl.bfloat16)
    both = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, pair.type.layout)))[None, None, :]
    gl.store(gl.convert_layout(at, gl.SliceLayout(2, pair.type.layout), assert_trivial=True)[:, :, None] + both, pair)


@gluon.jit
def put_result(
    sums_ptr, shares_ptr, sink_ptr, cos_ptr, sin_ptr, out_ptr, line, slice_, in_window, seen,
    REACH: gl.constexpr, KEYS: gl.constexpr, N: gl.constexpr, SLICES: gl.constexpr, SPLITS: gl.constexpr,
    LANES: gl.constexpr,
):  # fmt: skip
    """A slice of the dims of N heads, of what all splits have, of which the first is program `line`'s."""
    DIMS: gl.constexpr = 512 // SLICES
    G: gl.constexpr = _gathered_layout(LANES, N // 4, DIMS // 2)
    E: gl.constexpr = _pairs_layout(G)
    Q: gl.constexpr = gl.SliceLayout(1, G)
    s = gl.arange(0, SPLITS, layout=gl.SliceLayout(1, Q))
    known = there(s, in_window, seen, REACH, KEYS)
    q = gl.arange(0, N // 4, layout=gl.SliceLayout(0, Q))
    share = gl.where(known[:, None], ((line + s) * SLICES + slice_)[:, None] * (N // 2) + q[None, :], -1)
    wanted = share >= 0
    # what else is needed is asked for before anything is waited for
    sink_ptr += 4 * q
    sink0, sink1, sink2, sink3 = gl.load(sink_ptr), gl.load(sink_ptr + 1), gl.load(sink_ptr + 2), gl.load(sink_ptr + 3)
    pair = slice_ * (DIMS // 2) + gl.arange(0, DIMS // 2, layout=gl.SliceLayout(1, E))[:, None]
    cos = gl.load(cos_ptr + pair - 224, mask=pair >= 224, other=1.0)
    sin = gl.load(sin_ptr + pair - 224, mask=pair >= 224, other=0.0)
    at = out_ptr + gl.arange(0, N // 4, layout=gl.SliceLayout(0, E))[None, :] * (4 * 512) + 2 * pair
    shares = gl.join(share, gl.where(wanted, share + N // 4, -1))
    BOTH: gl.constexpr = _each(G, SPLITS, 0, N // 4)
    share0, share1, share2, share3 = _gathered(shares_ptr, shares, BOTH)
    factor0, factor1 = _factors(share0, wanted, sink0, Q), _factors(share1, wanted, sink1, Q)
    factor2, factor3 = _factors(share2, wanted, sink2, Q), _factors(share3, wanted, sink3, Q)
    d = slice_ * DIMS + gl.arange(0, DIMS, layout=gl.SliceLayout(0, gl.SliceLayout(2, G)))
    row = (line + gl.arange(0, SPLITS, layout=gl.SliceLayout(1, gl.SliceLayout(2, G))))[:, None] * 512 + d[None, :]
    quad = gl.arange(0, N // 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, G)))
    sums = gl.where(wanted[:, None, :], row[:, :, None] * (N // 4) + quad[None, None, :], -1)
    EACH: gl.constexpr = _each(G, SPLITS, DIMS, N // 4)
    x0, x1, x2, x3 = _gathered(sums_ptr, sums, EACH)
    _put(at, x0, factor0, cos, sin, E)
    _put(at + 512, x1, factor1, cos, sin, E)
    _put(at + 1024, x2, factor2, cos, sin, E)
    _put(at + 1536, x3, factor3, cos, sin, E)
    leave(sums_ptr, sums, EACH)
    gl.thread_barrier()  # all warps have read the shares
    leave(shares_ptr, shares, BOTH)
