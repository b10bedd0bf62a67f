"""The Triton programs of whole hyper-connection sites for few rows; `triton.py` launches them.

A site is two steps, with all rows of a step between them:

    expand   programs over (16 rows, slice of d)   new streams, and each slice's share of the 24 dot products
    mix      programs over (row, job)              sum of the shares; job 0 collapses and norms, job 1 runs Sinkhorn

`expand` here serves every dtype and size; few.py has it for bf16 streams.

The maps are float32 and the streams bf16, so a product is exact in two bf16 parts of the map: 16 bits of it. The slices
do not depend on how many rows there are, nor does the order of any sum: a row's result never depends on its batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triptych.kernels.quant.triton_rows import put_rounded


@triton.jit
def expand(
    y_ptr, ids_ptr, before_ptr, post_ptr, comb_ptr, streams_ptr, fn_ptr, share_ptr, rows, dim, maps,
    FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, MAPS: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """New streams of one slice, and its share of the maps [MAPS - 1] and of the sum of squares (last column).

    Tiles are [4 streams, rows or maps, dims], so that each warp multiplies one stream. All that is read is read first.
    """
    k = tl.arange(0, 4)[:, None, None]
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    r = row[None, :, None]
    d = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, None, :]
    m = tl.arange(0, MAPS)
    inside = (r < rows) & (d < dim)
    at = fn_ptr + m[None, :, None] * (4 * dim) + k * dim + d
    fn = tl.load(at, mask=(m < maps)[None, :, None] & (d < dim), other=0.0)
    source = r
    if FIRST:  # y is the embedding table
        source = tl.load(ids_ptr + r, mask=r < rows, other=0)
    y = tl.load(y_ptr + source * dim + d, mask=inside, other=0.0)
    if FIRST:
        x = tl.broadcast_to(y.to(tl.float32), [4, ROWS, BLOCK])
    else:
        before_ptr += r * (4 * dim) + d
        b0 = tl.load(before_ptr, mask=inside, other=0.0)
        b1 = tl.load(before_ptr + dim, mask=inside, other=0.0)
        b2 = tl.load(before_ptr + 2 * dim, mask=inside, other=0.0)
        b3 = tl.load(before_ptr + 3 * dim, mask=inside, other=0.0)
        comb_ptr += r * 16 + k
        post = tl.load(post_ptr + r * 4 + k, mask=r < rows, other=0.0)
        c0 = tl.load(comb_ptr, mask=r < rows, other=0.0)
        c1 = tl.load(comb_ptr + 4, mask=r < rows, other=0.0)
        c2 = tl.load(comb_ptr + 8, mask=r < rows, other=0.0)
        c3 = tl.load(comb_ptr + 12, mask=r < rows, other=0.0)
        x = post * y.to(tl.float32) + c0 * b0.to(tl.float32) + c1 * b1.to(tl.float32)
        x = x + c2 * b2.to(tl.float32) + c3 * b3.to(tl.float32)
    stored = x.to(streams_ptr.dtype.element_ty)
    tl.store(streams_ptr + r * (4 * dim) + k * dim + d, stored, mask=inside)
    x = stored.to(tl.float32)
    square = tl.sum(tl.sum(x * x, 2), 0)
    if NARROW:
        high = fn.to(tl.bfloat16)
        low = (fn - high.to(tl.float32)).to(tl.bfloat16)
        turned = tl.permute(stored, [0, 2, 1])
        each = tl.dot(low, turned, tl.dot(high, turned))
    else:
        each = tl.dot(fn, tl.permute(x, [0, 2, 1]), input_precision="tf32x3")
    share = tl.sum(each, 0)
    share = tl.where((m == MAPS - 1)[:, None], square[None, :], share)
    at = share_ptr + (row[None, :] * tl.num_programs(0) + tl.program_id(0)) * MAPS + m[:, None]
    tl.store(at, share, mask=(row < rows)[None, :])


@triton.jit
def maps_of(share_ptr, r, slices, dim, norm_eps, N: tl.constexpr, SLICES: tl.constexpr, MAPS: tl.constexpr):
    """The maps of row r [MAPS]: all slices together, over the norm of the streams."""
    s = tl.arange(0, SLICES)
    m = tl.arange(0, MAPS)
    at = share_ptr + (r * slices + s[:, None]) * MAPS + m[None, :]
    total = tl.sum(tl.load(at, mask=(s < slices)[:, None], other=0.0), 0)
    square = tl.sum(tl.where(m == MAPS - 1, total, 0.0), 0)
    return total * tl.rsqrt(square / (N * dim) + norm_eps)


@triton.jit
def pick(z, i, MAPS: tl.constexpr):
    """z[i] as a scalar."""
    return tl.sum(tl.where(tl.arange(0, MAPS) == i, z, 0.0), 0)


@triton.jit
def _input(
    streams_ptr, share_ptr, base, scale, norm_ptr, x_ptr, r, slices, dim, eps, norm_eps,
    ROUND: tl.constexpr, N: tl.constexpr, SLICES: tl.constexpr, MAPS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """x [DIM] = norm of sum_j (sigmoid(z_j) + eps) X_j for four streams. Returns z [MAPS], scaled, and x as it is kept;
    reads all first.

    ROUND: as the streams keep it before the norm.
    """
    d = tl.arange(0, DIM)
    here = streams_ptr + r * 4 * dim + d
    x0 = tl.load(here, mask=d < dim, other=0.0)
    x1 = tl.load(here + dim, mask=d < dim, other=0.0)
    x2 = tl.load(here + 2 * dim, mask=d < dim, other=0.0)
    x3 = tl.load(here + 3 * dim, mask=d < dim, other=0.0)
    norm = tl.load(norm_ptr + d, mask=d < dim, other=0.0)
    z = maps_of(share_ptr, r, slices, dim, norm_eps, N, SLICES, MAPS) * scale + base
    pre = tl.sigmoid(z) + eps
    x = pick(pre, 0, MAPS) * x0.to(tl.float32) + pick(pre, 1, MAPS) * x1.to(tl.float32)
    x += pick(pre, 2, MAPS) * x2.to(tl.float32)
    x += pick(pre, 3, MAPS) * x3.to(tl.float32)
    if ROUND:
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    x = (x * tl.rsqrt(tl.sum(x * x, 0) / dim + norm_eps) * norm).to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + r * dim + d, x, mask=d < dim)
    return z, x


@triton.jit
def mix(
    streams_ptr,
    share_ptr,
    base_ptr,
    scale_ptr,
    norm_ptr,
    x_ptr,
    values_ptr,
    scales_ptr,
    post_ptr,
    comb_ptr,
    slices,
    dim,
    eps,
    norm_eps,
    ITERS: tl.constexpr,
    N: tl.constexpr,
    SLICES: tl.constexpr,
    MAPS: tl.constexpr,
    DIM: tl.constexpr,
    APART: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """The block's normed input, and post and comb, which the next site needs; `APART`: by two programs.

    ROUNDS: the input to values and scales, too, as quant.matrices.quantize_rows rounds it.
    """
    r = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, MAPS)
    base = tl.load(base_ptr + i, mask=i < 24, other=0.0)
    scale = tl.load(scale_ptr + tl.where(i < 4, 0, tl.where(i < 8, 1, 2)))
    if APART:
        if tl.program_id(1) == 0:
            _, x = _input(
                streams_ptr, share_ptr, base, scale, norm_ptr, x_ptr, r, slices, dim, eps, norm_eps,
                False, N, SLICES, MAPS, DIM,
            )  # fmt: skip
            if ROUNDS:
                put_rounded(x, r, dim, values_ptr, scales_ptr, DIM)
        else:
            z = maps_of(share_ptr, r, slices, dim, norm_eps, N, SLICES, MAPS) * scale + base
            keep_maps(z, r, post_ptr, comb_ptr, eps, ITERS, MAPS)
    else:
        z, x = _input(
            streams_ptr, share_ptr, base, scale, norm_ptr, x_ptr, r, slices, dim, eps, norm_eps,
            False, N, SLICES, MAPS, DIM,
        )  # fmt: skip
        if ROUNDS:
            put_rounded(x, r, dim, values_ptr, scales_ptr, DIM)
        keep_maps(z, r, post_ptr, comb_ptr, eps, ITERS, MAPS)


@triton.jit
def head(
    streams_ptr,
    share_ptr,
    base_ptr,
    scale_ptr,
    norm_ptr,
    x_ptr,
    slices,
    dim,
    eps,
    norm_eps,
    N: tl.constexpr,
    SLICES: tl.constexpr,
    MAPS: tl.constexpr,
    DIM: tl.constexpr,
):
    """The hidden state of row r: collapsed, rounded, normed."""
    r = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, MAPS)
    base = tl.load(base_ptr + i, mask=i < 4, other=0.0)
    _input(
        streams_ptr, share_ptr, base, tl.load(scale_ptr), norm_ptr, x_ptr, r, slices, dim, eps, norm_eps,
        True, N, SLICES, MAPS, DIM,
    )  # fmt: skip


_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _inverse(x):
    """1 / x of a normal number, to the last bit but one: a division takes ten times as many instructions."""
    if _INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _normal4(a, b, c, d, eps):
    """Four values over their sum."""
    inverse = _inverse((a + b) + (c + d) + eps)
    return a * inverse, b * inverse, c * inverse, d * inverse


@triton.jit
def _soft4(a, b, c, d, eps):
    """Softmax of four values, plus eps."""
    top = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
    a, b, c, d = tl.exp(a - top), tl.exp(b - top), tl.exp(c - top), tl.exp(d - top)
    inverse = _inverse((a + b) + (c + d))
    return a * inverse + eps, b * inverse + eps, c * inverse + eps, d * inverse + eps


@triton.jit
def sinkhorn4(a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3, eps, ITERS: tl.constexpr):
    """The doubly stochastic matrix of 4 x 4 logits, row by row: softmax, then `ITERS` normalisations of columns."""
    a0, a1, a2, a3 = _soft4(a0, a1, a2, a3, eps)
    b0, b1, b2, b3 = _soft4(b0, b1, b2, b3, eps)
    c0, c1, c2, c3 = _soft4(c0, c1, c2, c3, eps)
    d0, d1, d2, d3 = _soft4(d0, d1, d2, d3, eps)
    for step in range(ITERS):
        if step > 0:
            a0, a1, a2, a3 = _normal4(a0, a1, a2, a3, eps)
            b0, b1, b2, b3 = _normal4(b0, b1, b2, b3, eps)
            c0, c1, c2, c3 = _normal4(c0, c1, c2, c3, eps)
            d0, d1, d2, d3 = _normal4(d0, d1, d2, d3, eps)
        a0, b0, c0, d0 = _normal4(a0, b0, c0, d0, eps)
        a1, b1, c1, d1 = _normal4(a1, b1, c1, d1, eps)
        a2, b2, c2, d2 = _normal4(a2, b2, c2, d2, eps)
        a3, b3, c3, d3 = _normal4(a3, b3, c3, d3, eps)
    return a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3


@triton.jit
def keep_maps(z, r, post_ptr, comb_ptr, eps, ITERS: tl.constexpr, MAPS: tl.constexpr):
    """post and comb of row r for four streams, of its scaled maps z. The matrix is sixteen scalars in every thread."""
    i = tl.arange(0, MAPS)
    tl.store(post_ptr + r * 4 + i - 4, 2.0 * tl.sigmoid(z), mask=(i >= 4) & (i < 8))
    a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3 = sinkhorn4(
        *(pick(z, 8, MAPS), pick(z, 9, MAPS), pick(z, 10, MAPS), pick(z, 11, MAPS)),
        *(pick(z, 12, MAPS), pick(z, 13, MAPS), pick(z, 14, MAPS), pick(z, 15, MAPS)),
        *(pick(z, 16, MAPS), pick(z, 17, MAPS), pick(z, 18, MAPS), pick(z, 19, MAPS)),
        *(pick(z, 20, MAPS), pick(z, 21, MAPS), pick(z, 22, MAPS), pick(z, 23, MAPS)),
        *(eps, ITERS),
    )
    at = comb_ptr + r * 16
    _store4(at, a0, a1, a2, a3)
    _store4(at + 4, b0, b1, b2, b3)
    _store4(at + 8, c0, c1, c2, c3)
    _store4(at + 12, d0, d1, d2, d3)


@triton.jit
def _store4(at, a, b, c, d):
    tl.store(at, a)
    tl.store(at + 1, b)
    tl.store(at + 2, c)
    tl.store(at + 3, d)
