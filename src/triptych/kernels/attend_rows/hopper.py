"""The first launch of attend_rows for Hopper, in Gluon: 64 heads and all 512 dims in one program of two warpgroups.

    shared memory   queries 64 x 512 | keys, two tiles of 64 x 512 | weights of a tile 64 x 64        200 KiB

    tile t          scores = queries . keys(t)     the tensor cores; meanwhile keys(t+1), e4m3 in registers, are
                                                   scaled and written to shared memory, and keys(t+2) asked for
                    weights = softmax              peak and rescaling as ever
                    sums += weights . keys(t)      the tensor cores, half of the dims each warpgroup

A key is converted once and serves both products. Triton's own pipeline converts the tile between two products, with
everything waiting, and was three times slower (docs/log.md).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _keep_scaled(target, x, bits, START: gl.constexpr, WORDS: gl.constexpr, layout: gl.constexpr):
    """Write e4m3 words x [64, WORDS], four dims each from START on, times their powers of two to bfloat16 pairs.

    A byte of bits [64] is the exponent of 64 dims. An e4m3 whose bits are moved into place lacks 2^120 in bfloat16; the
    hardware's own conversion goes through float16 and takes an instruction of a quarter of the rate for each value.
    """
    group = (START // 64 + gl.arange(0, WORDS, layout=gl.SliceLayout(0, layout)) // 16) * 8
    exponent = ((bits[:, None] >> group[None, :].to(gl.int64)) & 255).to(gl.int32)
    factor = (exponent << 7) | (exponent << 23)
    low, high = gl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c, d, m;
        mov.b32 m, 0x7b807b80;
        prmt.b32 a, $2, 0, 0x1404;
        prmt.b32 b, $2, 0, 0x3424;
        shr.u32 c, a, 4;
        shr.u32 d, b, 4;
        and.b32 c, c, 0x07f007f0;
        and.b32 d, d, 0x07f007f0;
        lop3.b32 a, a, 0x80008000, c, 0xea;
        lop3.b32 b, b, 0x80008000, d, 0xea;
        mul.rn.bf16x2 a, a, m;
        mul.rn.bf16x2 b, b, m;
        mul.rn.bf16x2 $0, a, $3;
        mul.rn.bf16x2 $1, b, $3;
        }""",
        "=r,=r,r,r",
        [x, factor],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    target.store(gl.reshape(gl.join(low, high), [64, 2 * WORDS]))


@gluon.jit
def _words(values, START: gl.constexpr, WORDS: gl.constexpr, layout: gl.constexpr):
    """Words int32 [64, WORDS] from byte START on of the rows whose addresses are in shared memory."""
    place = values.load(gl.SliceLayout(1, layout)).to(gl.pointer_type(gl.int32), bitcast=True)
    place = gl.multiple_of(place, 16)
    d = START // 4 + gl.arange(0, WORDS, layout=gl.SliceLayout(0, layout))
    return gl.load(place[:, None] + d[None, :])


@gluon.jit
def _exponents(scales, layout: gl.constexpr):
    """The 8 scale bytes [64] of the rows whose scales' addresses are in shared memory."""
    place = scales.load(gl.SliceLayout(1, layout)).to(gl.pointer_type(gl.int64))
    return gl.load(gl.multiple_of(place, 8))


@gluon.jit
def _ring_row(first, j, RING: gl.constexpr, FLAT: gl.constexpr):
    """Row of a ring, or of the flat workspace, where the window's key j lies; any row for what is no window key."""
    if FLAT:
        return first + gl.minimum(j, 127).to(gl.int64)
    else:
        return ((first + j) % RING).to(gl.int64)


@gluon.jit
def _entry(chosen_ptr, j, in_window, end, MODE: gl.constexpr):
    """Number of the entry that key j is, of those before `end`; anything for window rows."""
    j = gl.maximum(gl.minimum(j, end - 1) - in_window, 0)
    if MODE == 1:
        return gl.maximum(gl.load(chosen_ptr + j), 0)
    else:
        return j


@gluon.jit(do_not_specialize=["table_row", "splits"])  # which differ from step to step
def partial(  # noqa: C901  (branches that the compiler resolves)
    heads_ptr,
    heads_row,
    cos_ptr,
    sin_ptr,
    eps,
    scale,
    ring_ptr,
    ring_page,
    ring_row,
    ring_scales_ptr,
    ring_scales_page,
    ring_scales_row,
    pool_ptr,
    pool_page,
    pool_row,
    pool_scales_ptr,
    pool_scales_page,
    pool_scales_row,
    slots_ptr,
    positions_ptr,
    lowest_ptr,
    table_ptr,
    table_row,
    visible_ptr,
    chosen_ptr,
    chosen_row,
    chosen_count,
    sink_ptr,
    part_ptr,
    peak_ptr,
    weight_ptr,
    heads,
    splits,
    span,
    MODE: gl.constexpr,
    FLAT: gl.constexpr,
    RAW: gl.constexpr,
    WHOLE: gl.constexpr,
    PER_PAGE: gl.constexpr,
    RING: gl.constexpr,
    REACH: gl.constexpr,
):
    """Sums, peaks and weights of one split of 64 heads of row program_id(2), see triton.py; or, WHOLE, the result."""
    DIM: gl.constexpr = 512
    ROPE: gl.constexpr = 64
    NOPE: gl.constexpr = 448
    r = gl.program_id(2).to(gl.int64)

    # the queries are asked for first: they wait for nothing, keys for two or three other loads
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    by64x2: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    h = gl.program_id(0) * 64
    here = heads_ptr + r * heads_row
    hq = h + gl.arange(0, 64, layout=gl.SliceLayout(1, wide))
    dq = gl.arange(0, DIM, layout=gl.SliceLayout(0, wide))
    x = gl.load(here + hq[:, None] * DIM + dq[None, :], mask=(hq < heads)[:, None], other=0.0)
    if RAW:
        ht = h + gl.arange(0, 64, layout=gl.SliceLayout(1, by64x2))
        dt = gl.arange(0, ROPE, layout=gl.SliceLayout(0, by64x2))
        y = gl.load(here + ht[:, None] * DIM + (NOPE + dt)[None, :], mask=(ht < heads)[:, None], other=0.0)

    line_of = r
    if FLAT:  # step rows of prefill: their window is a stretch of the workspace, and slots are sequences
        first = gl.load(positions_ptr + r)
        in_window = gl.load(lowest_ptr + r).to(gl.int32)
        line_of = gl.load(slots_ptr + r).to(gl.int64)
    else:
        position = gl.load(positions_ptr + r).to(gl.int32)
        first = gl.maximum(gl.maximum(gl.load(lowest_ptr + r).to(gl.int32), position - (REACH - 1)), 0)
        in_window = gl.maximum(position - first + 1, 0)
    total = in_window
    if MODE == 1:
        total += gl.minimum(gl.load(visible_ptr + r).to(gl.int32), chosen_count)
    if MODE == 2:
        total += gl.load(visible_ptr + r).to(gl.int32)
    begin = gl.program_id(1) * span
    if begin >= total:
        return
    end = gl.minimum(begin + span, total)

    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_s = gl.allocate_shared_memory(gl.bfloat16, [64, DIM], shared)
    # keys in four parts with memory of their own: stores to parts of one would wait for each other
    pairs: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    k0_s = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 256], shared)
    k1_s = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 128], shared)
    k2_s = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], shared)
    kr_s = gl.allocate_shared_memory(gl.bfloat16, [2, 64, ROPE], shared)
    w0_s = k0_s._reinterpret(gl.int32, [2, 64, 128], pairs)
    w1_s = k1_s._reinterpret(gl.int32, [2, 64, 64], pairs)
    w2_s = k2_s._reinterpret(gl.int32, [2, 64, 32], pairs)
    wr_s = kr_s._reinterpret(gl.int32, [2, 64, 32], pairs)
    p_s = gl.allocate_shared_memory(gl.bfloat16, [64, 64], shared)
    values_s = gl.allocate_shared_memory(gl.int64, [64], flat)
    scales_s = gl.allocate_shared_memory(gl.int64, [64], flat)
    line: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    by256: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [8, 1], [1, 0])
    by128: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [8, 1], [1, 0])
    by64: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [8, 1], [1, 0])

    # where the first tiles lie; entries are known two tiles, pages one tile before they are needed
    ring_at = ring_ptr.to(gl.int64)
    ring_scales_at = ring_scales_ptr.to(gl.int64)
    if not FLAT:
        slot = gl.load(slots_ptr + r).to(gl.int64)
        ring_at += slot * ring_page
        ring_scales_at += slot * ring_scales_page
    pool_at = pool_ptr.to(gl.int64)
    pool_scales_at = pool_scales_ptr.to(gl.int64)
    chosen_ptr += r * chosen_row
    table_ptr += line_of * table_row
    i = gl.arange(0, 64, layout=line)
    entry = _entry(chosen_ptr, begin + i, in_window, end, MODE)
    entry1 = _entry(chosen_ptr, begin + 64 + i, in_window, end, MODE)
    page = entry.to(gl.int64)
    page1 = page
    if MODE != 0:
        page = gl.load(table_ptr + entry // PER_PAGE).to(gl.int64)
        page1 = gl.load(table_ptr + entry1 // PER_PAGE).to(gl.int64)

    # the first tile into shared memory, the second into registers
    for tile in gl.static_range(2):
        j = gl.minimum(begin + tile * 64 + i, end - 1)
        ring_j = _ring_row(first, j, RING, FLAT)
        v = ring_at + ring_j * ring_row
        s_at = ring_scales_at + ring_j * ring_scales_row
        if MODE != 0:
            e = entry if tile == 0 else entry1
            pg = page if tile == 0 else page1
            row = (e % PER_PAGE).to(gl.int64)
            v = gl.where(j < in_window, v, pool_at + pg * pool_page + row * pool_row)
            s_at = gl.where(j < in_window, s_at, pool_scales_at + pg * pool_scales_page + row * pool_scales_row)
        values_s.store(v)
        scales_s.store(s_at)
        x0 = _words(values_s, 0, 64, by256)
        x1 = _words(values_s, 256, 32, by128)
        x2 = _words(values_s, 384, 16, by64)
        xr = _words(values_s, NOPE, 32, by128)
        b0 = _exponents(scales_s, by256)
        b1 = _exponents(scales_s, by128)
        b2 = _exponents(scales_s, by64)
        if tile == 0:
            if RAW:  # while keys are on their way
                _keep_normed(q_s, x, y, eps, cos_ptr + r * (ROPE // 2), sin_ptr + r * (ROPE // 2))
            else:
                q_s.store(x.to(gl.bfloat16))
            _keep_scaled(w0_s.index(0), x0, b0, 0, 64, by256)
            _keep_scaled(w1_s.index(0), x1, b1, 256, 32, by128)
            _keep_scaled(w2_s.index(0), x2, b2, 384, 16, by64)
            wr_s.index(0).store(xr)
            fence_async_shared()
    entry = _entry(chosen_ptr, begin + 128 + i, in_window, end, MODE)
    entry1 = _entry(chosen_ptr, begin + 192 + i, in_window, end, MODE)
    if MODE != 0:
        page = gl.load(table_ptr + entry // PER_PAGE).to(gl.int64)

    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 32, 16])
    l0: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 128, 16])
    l1: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 64, 16])
    sums0 = gl.zeros([64, 256], gl.float32, layout=l0)
    sums1 = gl.zeros([64, 128], gl.float32, layout=l1)
    sums2 = gl.zeros([64, 64], gl.float32, layout=s_layout)
    sumsr = gl.zeros([64, ROPE], gl.float32, layout=s_layout)
    none = gl.zeros([64, 64], gl.float32, layout=s_layout)
    peak = gl.full([64], -1.0e30, gl.float32, layout=gl.SliceLayout(1, s_layout))
    weight = gl.zeros([64], gl.float32, layout=gl.SliceLayout(1, s_layout))
    growth = gl.zeros([64], gl.float32, layout=gl.SliceLayout(1, s_layout))
    js = gl.arange(0, 64, layout=gl.SliceLayout(0, s_layout))
    tiles = (end - begin + 63) // 64
    for t in range(tiles):
        now = t % 2
        k0, k1, k2, kr = k0_s.index(now), k1_s.index(now), k2_s.index(now), kr_s.index(now)
        s = warpgroup_mma(q_s.slice(0, 256, dim=1), k0.permute((1, 0)), none, use_acc=False, is_async=True)
        s = warpgroup_mma(q_s.slice(256, 128, dim=1), k1.permute((1, 0)), s, is_async=True)
        s = warpgroup_mma(q_s.slice(384, 64, dim=1), k2.permute((1, 0)), s, is_async=True)
        s = warpgroup_mma(q_s.slice(NOPE, ROPE, dim=1), kr.permute((1, 0)), s, is_async=True)
        # while they multiply: the last tile's growth of the peak, and the next tile's conversion
        peak += growth
        fade = gl.exp2(-growth)
        weight = weight * fade
        if t + 1 < tiles:
            after = (t + 1) % 2
            _keep_scaled(w0_s.index(after), x0, b0, 0, 64, by256)
            _keep_scaled(w1_s.index(after), x1, b1, 256, 32, by128)
            _keep_scaled(w2_s.index(after), x2, b2, 384, 16, by64)
            wr_s.index(after).store(xr)
            fence_async_shared()
        # addresses and bytes of tile t + 2
        j = gl.minimum(begin + (t + 2) * 64 + i, end - 1)
        ring_j = _ring_row(first, j, RING, FLAT)
        v = ring_at + ring_j * ring_row
        s_at = ring_scales_at + ring_j * ring_scales_row
        if MODE != 0:
            row = (entry % PER_PAGE).to(gl.int64)
            v = gl.where(j < in_window, v, pool_at + page * pool_page + row * pool_row)
            s_at = gl.where(j < in_window, s_at, pool_scales_at + page * pool_scales_page + row * pool_scales_row)
            page = gl.load(table_ptr + entry1 // PER_PAGE).to(gl.int64)
            entry = entry1
            entry1 = _entry(chosen_ptr, begin + (t + 4) * 64 + i, in_window, end, MODE)
        values_s.store(v)
        scales_s.store(s_at)
        x0 = _words(values_s, 0, 64, by256)
        x1 = _words(values_s, 256, 32, by128)
        x2 = _words(values_s, 384, 16, by64)
        xr = _words(values_s, NOPE, 32, by128)
        b0 = _exponents(scales_s, by256)
        b1 = _exponents(scales_s, by128)
        b2 = _exponents(scales_s, by64)
        scores = warpgroup_mma_wait(0, deps=(s,))
        scores = gl.where((begin + t * 64 + js < end)[None, :], scores * scale, -1.0e30)
        if t == 0:
            peak = gl.max(scores, 1)
        p = gl.exp2(gl.minimum(scores - peak[:, None], 100.0))
        p_s.store(p.to(gl.bfloat16))
        fence_async_shared()
        sums0 = sums0 * gl.convert_layout(fade, gl.SliceLayout(1, l0))[:, None]
        sums1 = sums1 * gl.convert_layout(fade, gl.SliceLayout(1, l1))[:, None]
        sums2 = sums2 * fade[:, None]
        sumsr = sumsr * fade[:, None]
        acc0 = warpgroup_mma(p_s, k0, sums0, is_async=True)
        acc1 = warpgroup_mma(p_s, k1, sums1, is_async=True)
        acc2 = warpgroup_mma(p_s, k2, sums2, is_async=True)
        accr = warpgroup_mma(p_s, kr, sumsr, is_async=True)
        most, total_p = gl.reduce((p, p), 1, _max_and_sum)
        weight += total_p
        growth = gl.maximum(gl.log2(most), 0.0)
        sums0, sums1, sums2, sumsr = warpgroup_mma_wait(0, deps=(acc0, acc1, acc2, accr))
        gl.thread_barrier()  # both warpgroups have read this tile and its weights

    hs = gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))
    factor = gl.full([64], 1.0, gl.float32, layout=gl.SliceLayout(1, s_layout))
    if WHOLE:
        sink = gl.load(sink_ptr + h + hs, mask=h + hs < heads, other=0.0) * 1.4426950408889634
        highest = gl.maximum(peak, sink)
        shrunk = gl.exp2(peak - highest)
        factor = shrunk / (weight * shrunk + gl.exp2(sink - highest))
    lane = (r * splits + gl.program_id(1)) * heads + h
    part_ptr += lane * DIM
    left = heads - h
    _put(part_ptr, sums0, factor, left, 0, 256, l0)
    _put(part_ptr, sums1, factor, left, 256, 128, l1)
    _put(part_ptr, sums2, factor, left, 384, 64, s_layout)
    if WHOLE and RAW:
        sumsr = _turned(sumsr, cos_ptr + r * (ROPE // 2), sin_ptr + r * (ROPE // 2), -1.0, ROPE)
    _put(part_ptr, sumsr, factor, left, NOPE, ROPE, s_layout)
    if not WHOLE:
        gl.store(peak_ptr + lane + hs, peak, mask=hs < left)
        gl.store(weight_ptr + lane + hs, weight, mask=hs < left)


@gluon.jit
def _max_and_sum(most, total, most1, total1):
    return gl.maximum(most, most1), total + total1


@gluon.jit
def _keep_normed(target, x, y, eps, cos_ptr, sin_ptr):
    """Write heads x [64, 512] normed, and their last dims, which y [64, 64] has again, rotated too."""
    x = x.to(gl.float32)
    shrink = gl.rsqrt(gl.sum(x * x, 1) / 512 + eps)
    target.store((x * shrink[:, None]).to(gl.bfloat16))
    y = y.to(gl.float32) * gl.convert_layout(shrink, gl.SliceLayout(1, y.type.layout))[:, None]
    y = _turned(y, cos_ptr, sin_ptr, 1.0, 64)
    gl.thread_barrier()
    target.slice(448, 64, dim=1).store(y.to(gl.bfloat16))


@gluon.jit
def _turned(x, cos_ptr, sin_ptr, way, ROPE: gl.constexpr):
    """x [64, ROPE] rotated, or back where way is -1; a pair's two dims are in one thread."""
    even, odd = gl.split(gl.reshape(x, [64, ROPE // 2, 2]))
    pair = gl.arange(0, ROPE // 2, layout=gl.SliceLayout(0, even.type.layout))
    cos = gl.load(cos_ptr + pair)[None, :]
    sin = gl.load(sin_ptr + pair)[None, :] * way
    turned = gl.reshape(gl.join(even * cos - odd * sin, odd * cos + even * sin), [64, ROPE])
    return gl.convert_layout(turned, x.type.layout, assert_trivial=True)


@gluon.jit
def _put(out_ptr, sums, factor, left, START: gl.constexpr, WIDTH: gl.constexpr, layout: gl.constexpr):
    """Dims from START on of 64 heads' sums, times `factor`, of which the first `left` heads exist."""
    h = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))[:, None]
    d = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))[None, :]
    x = sums * gl.convert_layout(factor, gl.SliceLayout(1, layout))[:, None]
    gl.store(out_ptr + h * 512 + START + d, x.to(out_ptr.dtype.element_ty), mask=h < left)
