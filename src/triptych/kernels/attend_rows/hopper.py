"""The first launch of attend_rows for Hopper, in Gluon: 64 heads and all 512 dims in one program of three warpgroups.

    shared memory   queries 64 x 512 | keys, two tiles of 64 x 512 | weights, two tiles of 64 x 64        208 KiB

    fetch    keys(t), e4m3 in registers, scaled and written to shared memory, and keys(t+1) asked for
    _weigh   weights = softmax(scores); sums of the first half of the dims += weights . keys(t);
             scores = queries . keys(t+1), on their way before the sums of tile t have come
    _sum     sums of the other half of the dims += weights . keys(t)

A key is converted once and serves both products, and the tensor cores need not wait for conversion or softmax. Barriers
in shared memory say which tiles of keys are `full` and `empty`, which are `weighed`, and that the half of the queries
which _sum norms is `ready`. The peak of the scores lags by a tile: sums are rescaled by what the last tile raised it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents

from triptych.kernels.attend_rows.hopper_keys import fetch, tell
from triptych.kernels.barriers import forget


@gluon.constexpr_function
def _sums_layout(width):
    """Of a product [64, width] of a warpgroup."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, width, 16])


@gluon.jit
def _scores(q_s, keys, slot, none):
    """queries . keys of a tile [64, 64], on their way."""
    s = warpgroup_mma(q_s.slice(0, 128, 1), keys[0].index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
    s = warpgroup_mma(q_s.slice(128, 128, 1), keys[1].index(slot).permute((1, 0)), s, is_async=True)
    s = warpgroup_mma(q_s.slice(256, 128, 1), keys[2].index(slot).permute((1, 0)), s, is_async=True)
    s = warpgroup_mma(q_s.slice(384, 64, 1), keys[3].index(slot).permute((1, 0)), s, is_async=True)
    return warpgroup_mma(q_s.slice(448, 64, 1), keys[4].index(slot).permute((1, 0)), s, is_async=True)


@gluon.jit
def _weights(scores, peak, weights_s, weighed):
    """Weights of a tile [64, 64], in float32 and, told to _sum too, in bfloat16."""
    p = gl.exp2(gl.minimum(scores - peak[:, None], 100.0))
    rounded = p.to(gl.bfloat16)
    weights_s.store(rounded)
    tell(weighed)
    return p, rounded


@gluon.jit
def _add(p, keys, slot, sums0, sums1):
    """Sums of the first 256 dims with weights p [64, 64], on their way."""
    p = gl.convert_layout(p, gl.DotOperandLayout(0, sums0.type.layout, 2))
    sums0 = warpgroup_mma(p, keys[0].index(slot), sums0, is_async=True)
    return sums0, warpgroup_mma(p, keys[1].index(slot), sums1, is_async=True)


@gluon.jit
def _weigh(
    left, tiles, scale, queries, stats, part_ptr, q_s, keys, weights_s, fades_s, full, empty, weighed, ready,
    RAW: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """Scores, weights, and sums of the first 256 dims over `tiles` tiles, of whose last `left` keys are there.

    stats: where the sinks, peaks and weights of the heads are.
    """
    S: gl.constexpr = _sums_layout(64)
    L: gl.constexpr = _sums_layout(128)
    _keep_queries(q_s, queries, 0, RAW)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.wait(ready, 0)
    sums0 = gl.zeros([64, 128], gl.float32, layout=L)
    sums1 = gl.zeros([64, 128], gl.float32, layout=L)
    none = gl.zeros([64, 64], gl.float32, layout=S)
    peak = gl.full([64], -1.0e30, gl.float32, layout=gl.SliceLayout(1, S))
    weight = gl.zeros([64], gl.float32, layout=gl.SliceLayout(1, S))
    fade = gl.full([64], 1.0, gl.float32, layout=gl.SliceLayout(1, S))
    mbarrier.wait(full.index(0), 0)
    s = _scores(q_s, keys, 0, none)
    for t in range(tiles - 1):
        slot = t % 2
        fades_s.index(slot).store(fade)
        scores = warpgroup_mma_wait(0, deps=(s,)) * scale
        if t == 0:
            peak = gl.max(scores, 1)
        p, rounded = _weights(scores, peak, weights_s.index(slot), weighed.index(slot))
        running0, running1 = _add(rounded, keys, slot, sums0, sums1)
        most, total = gl.reduce((p, p), 1, _max_and_sum)
        growth = gl.maximum(gl.log2(most), 0.0)
        peak += growth
        fade = gl.exp2(-growth)
        weight = (weight + total) * fade
        mbarrier.wait(full.index(1 - slot), ((t + 1) // 2) & 1)
        s = _scores(q_s, keys, 1 - slot, none)
        sums0, sums1 = warpgroup_mma_wait(5, deps=(running0, running1))  # all but the scores' five parts
        gl.thread_barrier()
        mbarrier.arrive(empty.index(slot), count=1)
        faded = gl.convert_layout(fade, gl.SliceLayout(1, L))[:, None]
        sums0, sums1 = sums0 * faded, sums1 * faded
    slot = (tiles - 1) % 2
    fades_s.index(slot).store(fade)
    scores = warpgroup_mma_wait(0, deps=(s,)) * scale
    scores = gl.where((gl.arange(0, 64, layout=gl.SliceLayout(0, S)) < left)[None, :], scores, -1.0e30)
    if tiles == 1:
        peak = gl.max(scores, 1)
    p, rounded = _weights(scores, peak, weights_s.index(slot), weighed.index(slot))
    running0, running1 = _add(rounded, keys, slot, sums0, sums1)
    weight += gl.sum(p, 1)
    sums0, sums1 = warpgroup_mma_wait(0, deps=(running0, running1))
    if WHOLE:  # _sum has used what it is told in the other slot
        mbarrier.wait(empty.index(1 - slot), ((tiles - 2) // 2) & 1, pred=tiles > 1)
    _finish(stats, part_ptr, fades_s.index(1 - slot), weighed.index(1 - slot), peak, weight, sums0, sums1, WHOLE)


@gluon.jit
def _finish(
    stats, part_ptr, factor_s, told, peak, weight, sums0, sums1, WHOLE: gl.constexpr
):  # fmt: skip
    """Write the sums of the first 256 dims; and their peak and weight or, WHOLE, tell _sum what makes them results."""
    S: gl.constexpr = peak.type.layout
    sink_ptr, peak_ptr, weight_ptr = stats
    h = gl.arange(0, 64, layout=S)
    if WHOLE:
        factor = _share(peak, weight, gl.load(sink_ptr + h))
        factor_s.store(factor)
        tell(told)
        factor = gl.convert_layout(factor, gl.SliceLayout(1, sums0.type.layout))[:, None]
        sums0, sums1 = sums0 * factor, sums1 * factor
    else:
        gl.store(peak_ptr + h, peak)
        gl.store(weight_ptr + h, weight)
    _put(part_ptr, sums0, 0)
    _put(part_ptr, sums1, 128)


@gluon.jit
def _share(peak, weight, sink):
    """What turns sums of all keys into results [64], with a sink beside them."""
    sink = sink * 1.4426950408889634
    highest = gl.maximum(peak, sink)
    shrunk = gl.exp2(peak - highest)
    return shrunk / (weight * shrunk + gl.exp2(sink - highest))


@gluon.jit
def _sum(
    tiles, queries, part_ptr, q_s, keys, weights_s, fades_s, full, empty, weighed, ready,
    RAW: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """Sums of the last 256 dims."""
    L1: gl.constexpr = _sums_layout(128)
    L2: gl.constexpr = _sums_layout(64)
    _keep_queries(q_s, queries, 32, RAW)
    tell(ready)
    sums1 = gl.zeros([64, 128], gl.float32, layout=L1)
    sums2 = gl.zeros([64, 64], gl.float32, layout=L2)
    sumsr = gl.zeros([64, 64], gl.float32, layout=L2)
    for t in range(tiles):
        slot = t % 2
        mbarrier.wait(weighed.index(slot), (t // 2) & 1)
        mbarrier.wait(full.index(slot), (t // 2) & 1)
        fade = fades_s.index(slot).load(gl.SliceLayout(1, L1))
        sums1, sums2, sumsr = _scaled(sums1, sums2, sumsr, fade)
        p = weights_s.index(slot)
        sums1 = warpgroup_mma(p, keys[2].index(slot), sums1, is_async=True)
        sums2 = warpgroup_mma(p, keys[3].index(slot), sums2, is_async=True)
        sumsr = warpgroup_mma(p, keys[4].index(slot), sumsr, is_async=True)
        sums1, sums2, sumsr = warpgroup_mma_wait(0, deps=(sums1, sums2, sumsr))
        gl.thread_barrier()
        mbarrier.arrive(empty.index(slot), count=1)
    if WHOLE:
        mbarrier.wait(weighed.index(tiles % 2), (tiles // 2) & 1)
        sums1, sums2, sumsr = _scaled(sums1, sums2, sumsr, fades_s.index(tiles % 2).load(gl.SliceLayout(1, L1)))
        if RAW:
            sumsr = _turned(sumsr, queries[1], queries[2], -1.0)
    _put(part_ptr, sums1, 256)
    _put(part_ptr, sums2, 384)
    _put(part_ptr, sumsr, 448)


@gluon.jit
def _scaled(sums1, sums2, sumsr, factor):
    """Sums times the heads' factors [64]; sums2 and sumsr are of one layout."""
    narrow = gl.convert_layout(factor, gl.SliceLayout(1, sums2.type.layout), assert_trivial=True)[:, None]
    return sums1 * factor[:, None], sums2 * narrow, sumsr * narrow


@gluon.jit(do_not_specialize=["table_row", "splits"])  # which differ from step to step
def partial(
    heads_ptr, heads_row, cos_ptr, sin_ptr, eps, scale,
    ring_ptr, ring_page, ring_row, ring_scales_ptr, ring_scales_page, ring_scales_row,
    pool_ptr, pool_page, pool_row, pool_scales_ptr, pool_scales_page, pool_scales_row,
    slots_ptr, positions_ptr, lowest_ptr, table_ptr, table_row, visible_ptr, chosen_ptr, chosen_row, chosen_count,
    sink_ptr, part_ptr, peak_ptr, weight_ptr, heads, splits, span,
    MODE: gl.constexpr, FLAT: gl.constexpr, RAW: gl.constexpr, WHOLE: gl.constexpr, PER_PAGE: gl.constexpr,
    RING: gl.constexpr, REACH: gl.constexpr,
):  # fmt: skip
    """Sums, peaks and weights of one split of 64 heads of row program_id(2), see triton.py; or, WHOLE, the result.

    `heads` is a multiple of 64.
    """
    r = gl.program_id(2).to(gl.int64)
    slot = gl.load(slots_ptr + r).to(gl.int64)
    if FLAT:  # step rows of prefill: their window is a stretch of the workspace, and slots are sequences
        first = gl.load(positions_ptr + r)
        in_window = gl.load(lowest_ptr + r).to(gl.int32)
        line_of = slot
    else:
        position = gl.load(positions_ptr + r).to(gl.int32)
        first = gl.maximum(gl.maximum(gl.load(lowest_ptr + r).to(gl.int32), position - (REACH - 1)), 0)
        in_window = gl.maximum(position - first + 1, 0)
        line_of = r
    total = in_window
    if MODE == 1:
        total += gl.minimum(gl.load(visible_ptr + r).to(gl.int32), chosen_count)
    if MODE == 2:
        total += gl.load(visible_ptr + r).to(gl.int32)
    begin = gl.program_id(1) * span
    if begin >= total:
        return
    end = gl.minimum(begin + span, total)
    tiles = (end - begin + 63) // 64

    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_s = gl.allocate_shared_memory(gl.bfloat16, [64, 512], shared)
    # keys in five parts with memory of their own: stores to parts of one would wait for each other
    k0_s = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 128], shared)
    k1_s = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 128], shared)
    k2_s = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 128], shared)
    k3_s = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], shared)
    kr_s = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], shared)
    weights_s = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], shared)
    fades_s = gl.allocate_shared_memory(gl.float32, [2, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    weighed = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for n in gl.static_range(2):
        mbarrier.init(full.index(n), count=1)
        mbarrier.init(empty.index(n), count=2)
        mbarrier.init(weighed.index(n), count=1)
    mbarrier.init(ready, count=1)
    fence_async_shared()

    h = gl.program_id(0) * 64
    lane = (r * splits + gl.program_id(1)) * heads + h
    keys = (k0_s, k1_s, k2_s, k3_s, kr_s)
    queries = (heads_ptr + (r * heads_row + h * 512), cos_ptr + r * 32, sin_ptr + r * 32, eps)
    stats = (sink_ptr + h, peak_ptr + lane, weight_ptr + lane)
    ring_at, ring_scales_at = ring_ptr.to(gl.int64), ring_scales_ptr.to(gl.int64)
    if not FLAT:
        ring_at += slot * ring_page
        ring_scales_at += slot * ring_scales_page
    pool_at, pool_scales_at = pool_ptr.to(gl.int64), pool_scales_ptr.to(gl.int64)
    ring = (ring_at, ring_row, ring_scales_at, ring_scales_row)
    pool = (pool_at, pool_page, pool_row, pool_scales_at, pool_scales_page, pool_scales_row)
    part_ptr += lane * 512
    gdc_launch_dependents()  # the second launch, whose programs wait for the end of this one
    gl.warp_specialize(
        [
            (_weigh, (
                end - begin - (tiles - 1) * 64, tiles, scale, queries, stats, part_ptr, q_s, keys, weights_s, fades_s,
                full, empty, weighed, ready, RAW, WHOLE,
            )),
            (_sum, (
                tiles, queries, part_ptr, q_s, keys, weights_s, fades_s, full, empty, weighed, ready, RAW, WHOLE,
            )),
            (fetch, (
                begin, end, tiles, first, in_window, chosen_ptr + r * chosen_row, table_ptr + line_of * table_row,
                ring, pool, keys, full, empty, MODE, FLAT, PER_PAGE, RING,
            )),
        ],
        [4, 4],
        [160, 136],
    )  # fmt: skip
    forget(full, 2)
    forget(empty, 2)
    forget(weighed, 2)
    mbarrier.invalidate(ready)


@gluon.jit
def _max_and_sum(most, total, most1, total1):
    return gl.maximum(most, most1), total + total1


@gluon.jit
def _keep_queries(q_s, queries, FIRST: gl.constexpr, RAW: gl.constexpr):
    """Write 32 heads [.., 512] from FIRST on; RAW ones normed, and their last dims rotated."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    by64: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    heads_ptr, cos_ptr, sin_ptr, eps = queries
    h = FIRST + gl.arange(0, 32, layout=gl.SliceLayout(1, wide))
    d = gl.arange(0, 512, layout=gl.SliceLayout(0, wide))
    x = gl.load(heads_ptr + h[:, None] * 512 + d[None, :])
    target = q_s.slice(FIRST, 32, 0)
    if RAW:
        h = FIRST + gl.arange(0, 32, layout=gl.SliceLayout(1, by64))
        d = 448 + gl.arange(0, 64, layout=gl.SliceLayout(0, by64))
        y = gl.load(heads_ptr + h[:, None] * 512 + d[None, :])
        x = x.to(gl.float32)
        shrink = gl.rsqrt(gl.sum(x * x, 1) / 512 + eps)
        target.store((x * shrink[:, None]).to(gl.bfloat16))
        y = y.to(gl.float32) * gl.convert_layout(shrink, gl.SliceLayout(1, by64))[:, None]
        y = _turned(y, cos_ptr, sin_ptr, 1.0)
        gl.thread_barrier()
        target.slice(448, 64, 1).store(y.to(gl.bfloat16))
    else:
        target.store(x.to(gl.bfloat16))


@gluon.jit
def _turned(x, cos_ptr, sin_ptr, way):
    """x [R, 64] rotated, or back where way is -1; a pair's two dims are in one thread."""
    even, odd = gl.split(gl.reshape(x, [x.shape[0], 32, 2]))
    pair = gl.arange(0, 32, layout=gl.SliceLayout(0, even.type.layout))
    cos = gl.load(cos_ptr + pair)[None, :]
    sin = gl.load(sin_ptr + pair)[None, :] * way
    turned = gl.reshape(gl.join(even * cos - odd * sin, odd * cos + even * sin), x.shape)
    return gl.convert_layout(turned, x.type.layout, assert_trivial=True)


@gluon.jit
def _put(out_ptr, sums, START: gl.constexpr):
    """Sums of 64 heads, dims from START on."""
    h = gl.arange(0, 64, layout=gl.SliceLayout(1, sums.type.layout))[:, None]
    d = START + gl.arange(0, sums.shape[1], layout=gl.SliceLayout(0, sums.type.layout))[None, :]
    gl.store(out_ptr + h * 512 + d, sums.to(out_ptr.dtype.element_ty))
