"""The first step of a hyper-connection site, see sites.py, for bf16 streams on the tensor cores.

One warp takes 16 rows and 32 dims of each stream. A product's columns may be summed in any order that both operands
agree on; here it is one in which what a thread loads, 8 dims of a row in one piece, is what it holds of the operand.
So nothing goes through shared memory and no thread waits for another.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2


@gluon.constexpr_function
def _layout(rows):
    """[rows, 4 threads, 8 dims]: a thread has every eighth row."""
    more = [[8 << i, 0, 0] for i in range((rows // 8).bit_length() - 1)]
    lanes = [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout([[0, 0, 1], [0, 0, 2], [0, 0, 4], *more], lanes, [], [], [rows, 4, 8])


@gluon.jit
def offsets(row, stride, LAYOUT: gl.constexpr):
    """Offsets [rows, 4, 8] of 32 dims of rows `row` that are `stride` apart."""
    c = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    b = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    return gl.expand_dims(row[:, None] * stride + c[None, :] * 8, 2) + gl.expand_dims(b[None, :], 1)


@gluon.jit
def wide(row):
    """row [rows] as [rows, 1, 1]."""
    return gl.expand_dims(row[:, None], 2)


@gluon.jit
def _mixed(y, b0, b1, b2, b3, post_ptr, comb_ptr, r, live, K: gl.constexpr):
    """Stream K in float32: post_K y + sum_j comb_jK X_j."""
    x = wide(gl.load(post_ptr + r * 4 + K, mask=live, other=0.0)) * y
    at = comb_ptr + r * 16 + K
    x += wide(gl.load(at, mask=live, other=0.0)) * b0
    x += wide(gl.load(at + 4, mask=live, other=0.0)) * b1
    x += wide(gl.load(at + 8, mask=live, other=0.0)) * b2
    return x + wide(gl.load(at + 12, mask=live, other=0.0)) * b3


@gluon.jit
def _left(part, MAPS: gl.constexpr, MMA: gl.constexpr):
    slots = gl.reshape(gl.permute(gl.reshape(part, [MAPS, 4, 2, 2, 2]), (0, 2, 3, 1, 4)), [MAPS, 32])
    return gl.convert_layout(slots, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.jit
def _right(x, ROWS: gl.constexpr, MMA: gl.constexpr):
    slots = gl.reshape(gl.permute(gl.reshape(x, [ROWS, 4, 2, 2, 2]), (2, 3, 1, 4, 0)), [32, ROWS])
    return gl.convert_layout(slots, gl.DotOperandLayout(1, MMA, 2), assert_trivial=True)


@gluon.jit
def times(share, fn, x, ROWS: gl.constexpr, MAPS: gl.constexpr, MMA: gl.constexpr):
    """share [MAPS, ROWS] + fn [MAPS, 4, 8] x [ROWS, 4, 8]^T, fn in two bf16 parts."""
    high = fn.to(gl.bfloat16)
    low = (fn - high.to(gl.float32)).to(gl.bfloat16)
    right = _right(x, ROWS, MMA)
    return mma_v2(_left(low, MAPS, MMA), right, mma_v2(_left(high, MAPS, MMA), right, share))


@gluon.jit
def squares(x):
    """Sums of squares [rows] of x [rows, 4, 8]."""
    x = x.to(gl.float32)
    return gl.sum(gl.sum(x * x, 2), 1)


@gluon.jit
def expand_narrow(
    y_ptr, ids_ptr, before_ptr, post_ptr, comb_ptr, streams_ptr, fn_ptr, share_ptr, rows, dim, maps,
    FIRST: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr, MAPS: gl.constexpr,
):  # fmt: skip
    """New streams of one slice, and its share of the maps [MAPS - 1] and of the sum of squares (last column)."""
    gl.static_assert(BLOCK == 32)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    X: gl.constexpr = _layout(ROWS)
    F: gl.constexpr = _layout(MAPS)
    first = gl.program_id(0) * BLOCK
    m = gl.arange(0, MAPS, gl.SliceLayout(1, gl.SliceLayout(2, F)))
    fn_ptr += offsets(m, 4 * dim, F) + first
    known = wide(m < maps)
    fn0 = gl.load(fn_ptr, mask=known, other=0.0)
    fn1 = gl.load(fn_ptr + dim, mask=known, other=0.0)
    fn2 = gl.load(fn_ptr + 2 * dim, mask=known, other=0.0)
    fn3 = gl.load(fn_ptr + 3 * dim, mask=known, other=0.0)
    r = gl.program_id(1) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, X)))
    live = r < rows
    inside = wide(live)
    far = r.to(gl.int64)
    streams_ptr += offsets(far, 4 * dim, X) + first
    if FIRST:  # y is the embedding table
        x0 = gl.load(y_ptr + offsets(gl.load(ids_ptr + r, mask=live, other=0), dim, X) + first, mask=inside, other=0.0)
        x1 = x0
        x2 = x0
        x3 = x0
    else:
        y = gl.load(y_ptr + offsets(far, dim, X) + first, mask=inside, other=0.0).to(gl.float32)
        before_ptr += offsets(far, 4 * dim, X) + first
        b0 = gl.load(before_ptr, mask=inside, other=0.0).to(gl.float32)
        b1 = gl.load(before_ptr + dim, mask=inside, other=0.0).to(gl.float32)
        b2 = gl.load(before_ptr + 2 * dim, mask=inside, other=0.0).to(gl.float32)
        b3 = gl.load(before_ptr + 3 * dim, mask=inside, other=0.0).to(gl.float32)
        x0 = _mixed(y, b0, b1, b2, b3, post_ptr, comb_ptr, r, live, 0).to(gl.bfloat16)
        x1 = _mixed(y, b0, b1, b2, b3, post_ptr, comb_ptr, r, live, 1).to(gl.bfloat16)
        x2 = _mixed(y, b0, b1, b2, b3, post_ptr, comb_ptr, r, live, 2).to(gl.bfloat16)
        x3 = _mixed(y, b0, b1, b2, b3, post_ptr, comb_ptr, r, live, 3).to(gl.bfloat16)
    gl.store(streams_ptr, x0, mask=inside)
    gl.store(streams_ptr + dim, x1, mask=inside)
    gl.store(streams_ptr + 2 * dim, x2, mask=inside)
    gl.store(streams_ptr + 3 * dim, x3, mask=inside)
    share = times(gl.zeros([MAPS, ROWS], gl.float32, MMA), fn0, x0, ROWS, MAPS, MMA)
    share = times(share, fn1, x1, ROWS, MAPS, MMA)
    share = times(share, fn2, x2, ROWS, MAPS, MMA)
    share = times(share, fn3, x3, ROWS, MAPS, MMA)
    square = squares(x0) + squares(x1) + squares(x2) + squares(x3)
    mine = (far * gl.num_programs(0) + gl.program_id(0)) * MAPS
    gl.store(share_ptr + mine + MAPS - 1, square, mask=live)
    at_m = gl.arange(0, MAPS, gl.SliceLayout(1, MMA))
    at_r = gl.program_id(1) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, MMA))
    at = (at_r.to(gl.int64) * gl.num_programs(0) + gl.program_id(0)) * MAPS
    kept = (at_m < MAPS - 1)[:, None] & (at_r < rows)[None, :]
    gl.store(share_ptr + at[None, :] + at_m[:, None], share, mask=kept)
