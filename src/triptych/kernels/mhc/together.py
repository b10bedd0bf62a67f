"""A site of few rows in one launch, whose programs wait for each other's numbers (meeting.py).

    program (slice of 512 dims, share)   the slice of all new streams, and of it 2 of the 24 maps, or 4 of the streams'
                                         products with each other; of everybody's sums, then, the slice of the
                                         collapsed rows
    one more a row                       post and comb

The norm of a collapsed row is a form of its streams' products, so nobody waits a second time for it. In moe/together.py
the router stands behind it, in the same launch.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triptych.kernels.gpu import is_hopper, multiprocessors
from triptych.kernels.mhc.meeting import WARPS, begin, count, end, gathered, in_order, meeting, tell
from triptych.kernels.mhc.ref import Uncollapsed
from triptych.kernels.mhc.sites import sinkhorn4
from triptych.kernels.quant.e4m3 import scale_of
from triptych.kernels.quant.matrices import BothRows, Fp8Rows, empty_rows

WIDE = gl.constexpr(512)
"""Dims of a slice: four of each thread."""
SHARES = gl.constexpr(16)
PLACES = gl.constexpr(64)
"""Numbers of a row and slice: 24 maps, 16 products, and room."""

_MOST = 1
"""Rows up to which one launch is faster than two: with the router of four rows it took 34 to 41 us instead of 13."""
_MAPS = gl.constexpr(24)
_TOLD = gl.constexpr(40)


def fits(streams: Tensor) -> bool:
    """Whether a launch serves rows [R, n, d]: two programs fit each multiprocessor, so that all run side by side."""
    rows, n, dim = streams.shape
    on = streams.dtype == torch.bfloat16 and is_hopper(streams.device)
    programs = dim // WIDE.value * SHARES.value + rows + 1
    return on and n == 4 and rows <= _MOST and dim % WIDE.value == 0 and programs <= 2 * multiprocessors(streams.device)


def collapse(row: Uncollapsed, *, first: bool = False) -> Tensor | BothRows:
    """The site's x; fills streams, post and comb. `first`: y is the embedding table, before.streams tokens of rows."""
    rows, _, dim = row.streams.shape
    x = row.streams.new_empty(rows, dim)
    rounded = empty_rows(rows, dim, x.device) if row.site.rounds else Fp8Rows(x, row.post)
    site_together[(dim // WIDE.value * SHARES.value + rows,)](
        *(*pointers(row), x, rounded.values, rounded.scales, *sizes(row)),
        FIRST=first,
        ROUNDS=row.site.rounds,
        **shape_of(row),
    )
    return BothRows(x, rounded) if row.site.rounds else x


def pointers(row: Uncollapsed) -> tuple[Tensor, ...]:
    """What programs of a site read and write, up to the norm's weights."""
    site = row.site
    return (
        *(row.y, *row.before, row.streams, row.post, row.comb, site.fn, site.base, site.scale, row.norm),
        *meeting(row.y.device),
    )


def sizes(row: Uncollapsed) -> tuple[int | float, ...]:
    """Rows, dims and both eps."""
    rows, _, dim = row.streams.shape
    return rows, dim, row.site.eps, row.site.norm_eps


def shape_of(row: Uncollapsed) -> dict[str, int]:
    """What a kernel is compiled for."""
    rows, _, dim = row.streams.shape
    slices = triton.next_power_of_2(dim // WIDE.value)
    return dict(ITERS=row.site.iters, ROWS=triton.next_power_of_2(rows), SLICES=slices, num_warps=WARPS.value)


@gluon.constexpr_function
def _rows_layout():
    """[rows, dims of a slice]: a thread has four dims of all rows."""
    return gl.BlockedLayout([1, 4], [1, 32], [1, 4], [1, 0])


@gluon.constexpr_function
def _sums_layout():
    """[rows, 2, 2]: sums over dims of four values, in every thread."""
    return gl.SliceLayout(1, gl.BlockedLayout([1, 4, 2, 2], [1, 32, 1, 1], [1, 4, 1, 1], [3, 2, 1, 0]))


@gluon.constexpr_function
def _told_layout():
    """[rows, slices, places]: a warp has every fourth slice, and every warp all places of their sums."""
    return gl.BlockedLayout([1, 1, 2], [1, 1, 32], [1, 4, 1], [2, 1, 0])


@gluon.jit
def _four(i, a, b, c, d):
    return gl.where(i == 0, a, gl.where(i == 1, b, gl.where(i == 2, c, d)))


@gluon.jit
def _parts(post_ptr, comb_ptr, r, live, K: gl.constexpr):
    """What of a block's output and of each old stream goes into stream K."""
    comb_ptr += r * 16 + K
    p = gl.load(post_ptr + r * 4 + K, mask=live, other=0.0)
    c0 = gl.load(comb_ptr, mask=live, other=0.0)
    c1 = gl.load(comb_ptr + 4, mask=live, other=0.0)
    c2 = gl.load(comb_ptr + 8, mask=live, other=0.0)
    return p, c0, c1, c2, gl.load(comb_ptr + 12, mask=live, other=0.0)


@gluon.jit
def _four_rows(at, dim, mask):
    """Rows of all four streams, or of a map's weights for them."""
    x0 = gl.load(at, mask=mask, other=0.0).to(gl.float32)
    x1 = gl.load(at + dim, mask=mask, other=0.0).to(gl.float32)
    x2 = gl.load(at + 2 * dim, mask=mask, other=0.0).to(gl.float32)
    return x0, x1, x2, gl.load(at + 3 * dim, mask=mask, other=0.0).to(gl.float32)


@gluon.jit
def _mixed(p, c0, c1, c2, c3, y, b0, b1, b2, b3):
    """A new stream, as bf16 holds it."""
    x = p * y + c0 * b0
    x += c1 * b1
    x += c2 * b2
    return (x + c3 * b3).to(gl.bfloat16).to(gl.float32)


@gluon.jit
def _tell_sums(s0, s1, s2, s3, meet_ptr, launch, piece, first, many, rows, slices, ROWS: gl.constexpr):
    """Sums over dims of four values of each row, of which `many` are told, at places from `first` on."""
    S: gl.constexpr = _sums_layout()
    sums = gl.convert_layout(gl.sum(gl.join(gl.join(s0, s1), gl.join(s2, s3)), 1), S, assert_trivial=True)
    i = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, S)))[None, :]
    j = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, S)))[None, :]
    nth = gl.expand_dims(i, 2) + 2 * gl.expand_dims(j, 1)
    r = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, S)))[:, None], 2)
    tell(meet_ptr + (r * slices + piece) * PLACES + first + nth, sums, launch, (r < rows) & (nth < many))


@gluon.jit
def _maps(meet_ptr, launch, first, rows, base_ptr, scale_ptr, dim, norm_eps, ROWS: gl.constexpr, SLICES: gl.constexpr):
    """Of rows from `first` on: places [1, PLACES], scaled maps [ROWS, PLACES], and the sums that they come from, the
    streams' products behind them."""
    T: gl.constexpr = _told_layout()
    Z: gl.constexpr = gl.SliceLayout(1, T)
    m = gl.arange(0, PLACES, gl.SliceLayout(0, Z))[None, :]
    base = gl.load(base_ptr + m, mask=m < _MAPS, other=0.0)
    scale = gl.load(scale_ptr + gl.where(m < 4, 0, gl.where(m < 8, 1, 2)))
    r = first + gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, Z))[:, None], 1)
    s = gl.expand_dims(gl.arange(0, SLICES, gl.SliceLayout(0, gl.SliceLayout(2, T)))[None, :], 2)
    place = gl.expand_dims(m, 1)
    slices = dim // WIDE
    there = (r < rows) & (s < slices) & (place < _TOLD)
    total = gl.sum(gathered(meet_ptr, (r * slices + s) * PLACES + place, there, launch), 1)
    squares = ((m - _MAPS) % 5 == 0) & (m >= _MAPS) & (m < _TOLD)
    square = gl.sum(gl.where(squares, total, 0.0), 1)
    return m, total * gl.rsqrt(square / (4 * dim) + norm_eps)[:, None] * scale + base, total


@gluon.jit
def _pick(z, place, i):
    return gl.sum(gl.where(place == i, z, 0.0), 1)[:, None]


@gluon.jit
def _sigmoid(x):
    return 1.0 / (1.0 + gl.exp(-x))


@gluon.jit
def _wide(x):
    """x [rows, 1] beside dims of rows."""
    return gl.convert_layout(x, _rows_layout())


@gluon.jit
def collapsed(
    y_ptr, before_ptr, post_ptr, comb_ptr, streams_ptr, fn_ptr, base_ptr, scale_ptr, norm_ptr, meet_ptr, launch_ptr,
    beside, wanted, launch, piece, share, rows, dim, eps, norm_eps, FIRST: gl.constexpr, ROWS: gl.constexpr,
    SLICES: gl.constexpr,
):  # fmt: skip
    """A slice of the collapsed and normed rows [ROWS, WIDE], bf16, what lies at the pointers `beside`, and `count`.

    Stores the slice of a stream. All that is read is asked for before anything is waited for. FIRST: streams are rows
    of the embedding table y, those of the tokens at before_ptr.
    """
    X: gl.constexpr = _rows_layout()
    d = (piece * WIDE + gl.arange(0, WIDE, gl.SliceLayout(0, X)))[None, :]
    r = gl.arange(0, ROWS, gl.SliceLayout(1, X))[:, None]
    live = r < rows
    inside = live & (d < dim)
    has_maps = share < _MAPS // 2
    at = fn_ptr + gl.where(has_maps, 2 * share, 0) * (4 * dim) + d
    f0, f1, f2, f3 = _four_rows(at, dim, d < dim)
    g0, g1, g2, g3 = _four_rows(at + 4 * dim, dim, d < dim)
    in_order()
    if FIRST:
        tokens = gl.load(before_ptr + r, mask=live, other=0)
        x0 = gl.load(y_ptr + tokens * dim + d, mask=inside, other=0.0).to(gl.float32)
    else:
        y = gl.load(y_ptr + r * dim + d, mask=inside, other=0.0).to(gl.float32)
        b0, b1, b2, b3 = _four_rows(before_ptr + r * (4 * dim) + d, dim, inside)
        p0, c00, c10, c20, c30 = _parts(post_ptr, comb_ptr, r, live, 0)
        p1, c01, c11, c21, c31 = _parts(post_ptr, comb_ptr, r, live, 1)
        p2, c02, c12, c22, c32 = _parts(post_ptr, comb_ptr, r, live, 2)
        p3, c03, c13, c23, c33 = _parts(post_ptr, comb_ptr, r, live, 3)
    in_order()
    norm = gl.load(norm_ptr + d)
    got = beside if wanted is None else gl.load(beside, mask=wanted, other=0.0)
    in_order()
    known = count(launch_ptr, launch)
    if FIRST:
        x1 = x0
        x2 = x0
        x3 = x0
    else:
        x0 = _mixed(p0, c00, c10, c20, c30, y, b0, b1, b2, b3)
        x1 = _mixed(p1, c01, c11, c21, c31, y, b0, b1, b2, b3)
        x2 = _mixed(p2, c02, c12, c22, c32, y, b0, b1, b2, b3)
        x3 = _mixed(p3, c03, c13, c23, c33, y, b0, b1, b2, b3)
    own = _four(share % 4, x0, x1, x2, x3)
    s0 = gl.where(has_maps, f0 * x0 + f1 * x1 + f2 * x2 + f3 * x3, own * x0)
    s1 = gl.where(has_maps, g0 * x0 + g1 * x1 + g2 * x2 + g3 * x3, own * x1)
    first = gl.where(has_maps, 2 * share, _MAPS + 4 * (share - _MAPS // 2))
    many = gl.where(has_maps, 2, 4)
    _tell_sums(s0, s1, own * x2, own * x3, meet_ptr, launch, piece, first, many, rows, dim // WIDE, ROWS)
    gl.store(streams_ptr + r * (4 * dim) + share * dim + d, own.to(gl.bfloat16), mask=(r < rows) & (share < 4))
    m, z, total = _maps(meet_ptr, launch, 0, rows, base_ptr, scale_ptr, dim, norm_eps, ROWS, SLICES)
    return _normed(x0, x1, x2, x3, norm, m, _sigmoid(z) + eps, total, dim, norm_eps), got, known


@gluon.jit
def _normed(x0, x1, x2, x3, norm, m, pre, total, dim, norm_eps):
    """The streams, weighed by pre [rows, PLACES], and normed: their products with each other are in `total`."""
    w0, w1, w2, w3 = _pick(pre, m, 0), _pick(pre, m, 1), _pick(pre, m, 2), _pick(pre, m, 3)
    pair = m - _MAPS
    form = _four(pair // 4, w0, w1, w2, w3) * _four(pair % 4, w0, w1, w2, w3) * total
    square = gl.sum(gl.where((pair >= 0) & (pair < 16), form, 0.0), 1)[:, None]
    x = _wide(w0) * x0 + _wide(w1) * x1
    x += _wide(w2) * x2
    x += _wide(w3) * x3
    return (x * _wide(gl.rsqrt(square / dim + norm_eps)) * norm).to(gl.bfloat16)


@gluon.jit
def put_rounded(x, values_ptr, scales_ptr, scale_row, scale_group, piece, share, rows, dim, ROWS: gl.constexpr):
    """The share's 128 columns of a slice x of rows, rounded to e4m3, and their scales, so far apart."""
    GROUPS: gl.constexpr = WIDE // 128
    L: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [1, 4, 1], [2, 1, 0])
    r = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None], 2)
    g = gl.expand_dims(gl.arange(0, GROUPS, gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :], 2)
    i = gl.expand_dims(gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, :], 1)
    x = gl.convert_layout(gl.reshape(x.to(gl.float32), [ROWS, GROUPS, 128]), L)
    scale, inverse = scale_of(gl.expand_dims(gl.max(gl.abs(x), 2), 2))
    mine = (r < rows) & (g == share)
    gl.store(values_ptr + r * dim + piece * WIDE + g * 128 + i, (x * inverse).to(gl.float8e4nv), mask=mine)
    gl.store(scales_ptr + r * scale_row + (piece * GROUPS + g) * scale_group, scale, mask=mine)


@gluon.jit
def keep_maps(
    post_ptr, comb_ptr, base_ptr, scale_ptr, meet_ptr, launch, row, rows, dim, eps, norm_eps,
    ITERS: gl.constexpr, SLICES: gl.constexpr,
):  # fmt: skip
    """post and comb of a row. The matrix is sixteen scalars in every thread."""
    m, z, _ = _maps(meet_ptr, launch, row, rows, base_ptr, scale_ptr, dim, norm_eps, 1, SLICES)
    gl.store(post_ptr + row * 4 + m - 4, 2.0 * _sigmoid(z), mask=(m >= 4) & (m < 8))
    a0, a1, a2, a3 = _scalar(z, m, 8), _scalar(z, m, 9), _scalar(z, m, 10), _scalar(z, m, 11)
    b0, b1, b2, b3 = _scalar(z, m, 12), _scalar(z, m, 13), _scalar(z, m, 14), _scalar(z, m, 15)
    c0, c1, c2, c3 = _scalar(z, m, 16), _scalar(z, m, 17), _scalar(z, m, 18), _scalar(z, m, 19)
    d0, d1, d2, d3 = _scalar(z, m, 20), _scalar(z, m, 21), _scalar(z, m, 22), _scalar(z, m, 23)
    a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3 = sinkhorn4(
        a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3, eps, ITERS
    )
    at = comb_ptr + row * 16
    _store4(at, a0, a1, a2, a3)
    _store4(at + 4, b0, b1, b2, b3)
    _store4(at + 8, c0, c1, c2, c3)
    _store4(at + 12, d0, d1, d2, d3)


@gluon.jit
def _scalar(z, place, i):
    return gl.sum(gl.sum(gl.where(place == i, z, 0.0), 1), 0)


@gluon.jit
def _store4(at, a, b, c, d):
    gl.store(at, a)
    gl.store(at + 1, b)
    gl.store(at + 2, c)
    gl.store(at + 3, d)


@gluon.jit(do_not_specialize=["rows"])
def site_together(
    y_ptr, before_ptr, post_ptr, comb_ptr, streams_ptr, new_post_ptr, new_comb_ptr, fn_ptr, base_ptr, scale_ptr,
    norm_ptr, meet_ptr, launch_ptr, x_ptr, values_ptr, scales_ptr, rows, dim, eps, norm_eps,
    ITERS: gl.constexpr, FIRST: gl.constexpr, ROUNDS: gl.constexpr, ROWS: gl.constexpr, SLICES: gl.constexpr,
):  # fmt: skip
    """x [rows, dim], ROUNDS: also as e4m3 values and scales; new streams, post and comb."""
    X: gl.constexpr = _rows_layout()
    launch = begin(launch_ptr)
    piece, share = gl.program_id(0) // SHARES, gl.program_id(0) % SHARES
    if piece < dim // WIDE:
        x, _, known = collapsed(
            y_ptr, before_ptr, post_ptr, comb_ptr, streams_ptr, fn_ptr, base_ptr, scale_ptr, norm_ptr, meet_ptr,
            launch_ptr, launch, None, launch, piece, share, rows, dim, eps, norm_eps, FIRST, ROWS, SLICES,
        )  # fmt: skip
        end(launch_ptr, launch, known)
        r = gl.arange(0, ROWS, gl.SliceLayout(1, X))[:, None]
        i = gl.arange(0, WIDE, gl.SliceLayout(0, X))[None, :]
        gl.store(x_ptr + r * dim + piece * WIDE + i, x, mask=(r < rows) & (i // 128 == share))
        if ROUNDS:
            put_rounded(x, values_ptr, scales_ptr, dim // 128, 1, piece, share, rows, dim, ROWS)
    else:
        end(launch_ptr, launch, count(launch_ptr, launch))
        keep_maps(
            new_post_ptr, new_comb_ptr, base_ptr, scale_ptr, meet_ptr, launch, share, rows, dim, eps, norm_eps, ITERS,
            SLICES,
        )  # fmt: skip
