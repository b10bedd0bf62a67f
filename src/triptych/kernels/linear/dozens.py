"""Linear maps of dozens of rounded rows in one launch, bound by the bytes of their weights.

    shared memory   a ring of stages, DEEP blocks of 128 columns of TALL rows of weights and of N rows of x | scales

    fetch      weights and rows on their way into the next empty stage
    multiply   twice, each for half of a tile: a block on the tensor cores, scaled in float32 and added to the sums

A tile is TALL outputs of all rows. The stages of all tiles stand in one line, of which each program has an equal
stretch, so a program may begin or end within a tile; the last of those that share one adds up their parts, in their
order. Counters are back at zero afterwards. Outputs beyond LATENT are by weights in bf16, in blocks of 64 columns.

TURNED: a tile is computed as W x^T, else as x W^T.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from triptych.kernels.barriers import forget
from triptych.kernels.linear.rings import meet, next_place


@gluon.constexpr_function
def line_of(k, latent, out, tall, deep):
    """Stages of all FP8 tiles, and of all tiles."""
    depth = k // 128 // deep
    return latent // tall * depth, (latent // tall + (out - latent + tall - 1) // tall * 2) * depth


@gluon.constexpr_function
def half_of(half, tall, n, turned):
    """The half of a tile that a warpgroup has: its first row, rows, first output and outputs."""
    if turned or n == 128:
        return half * n // 2, n // 2, 0, tall
    return 0, n, half * tall // 2, tall // 2


@gluon.constexpr_function
def sums_of(half, tall, n, turned, deep):
    """Layout of the sums of this half, products of `deep` columns at a time."""
    _, rows, _, outs = half_of(half, tall, n, turned)
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, rows if turned else outs, deep])


@gluon.jit
def _fetch_weights(
    w, rest, ring, stage, place, K: gl.constexpr, FIRST: gl.constexpr, ALL: gl.constexpr, DEEP: gl.constexpr
):
    """The weights of a stage of the line, on their way to a place of the ring."""
    ws, _, full, _ = ring
    TALL: gl.constexpr = ws.shape[1]
    DEPTH: gl.constexpr = K // 128 // DEEP
    if FIRST == ALL or stage < FIRST:
        for i in gl.static_range(DEEP):
            at = [stage // DEPTH * TALL, (stage % DEPTH * DEEP + i) * 128]
            tma.async_copy_global_to_shared(w, at, full.index(place), ws.index(place * DEEP + i))
    else:
        for i in gl.static_range(DEEP):
            at = [(stage - FIRST) // (2 * DEPTH) * TALL, ((stage - FIRST) % (2 * DEPTH) * DEEP + i) * 64]
            to = ws.index(place * DEEP + i)._reinterpret(gl.bfloat16, [TALL, 64], gl.NVMMASharedLayout(128, 16))
            tma.async_copy_global_to_shared(rest, at, full.index(place), to)


@gluon.jit
def _fetch_rows(
    x, wide, ring, stage, place, K: gl.constexpr, FIRST: gl.constexpr, ALL: gl.constexpr, DEEP: gl.constexpr
):
    """What these weights are multiplied by."""
    _, xs, full, _ = ring
    DEPTH: gl.constexpr = K // 128 // DEEP
    if FIRST == ALL or stage < FIRST:
        for i in gl.static_range(DEEP):
            at = [0, (stage % DEPTH * DEEP + i) * 128]
            tma.async_copy_global_to_shared(x, at, full.index(place), xs.index(place * DEEP + i))
    else:
        for i in gl.static_range(DEEP):
            at = [0, ((stage - FIRST) % (2 * DEPTH) * DEEP + i) * 64]
            to = xs.index(place * DEEP + i)._reinterpret(gl.bfloat16, [xs.shape[1], 64], gl.NVMMASharedLayout(128, 16))
            tma.async_copy_global_to_shared(wide, at, full.index(place), to)


@gluon.jit
def _fetch(
    w, rest, x, wide, ring, begin, end,
    K: gl.constexpr, FIRST: gl.constexpr, ALL: gl.constexpr, STAGES: gl.constexpr, DEEP: gl.constexpr,
):  # fmt: skip
    """Stages [begin, end) of the line."""
    ws, xs, full, empty = ring
    BYTES: gl.constexpr = DEEP * 128 * (ws.shape[1] + xs.shape[1])
    phase = 1  # all places are empty
    place = 0
    for stage in range(begin, end):
        mbarrier.wait(empty.index(place), phase)
        mbarrier.expect(full.index(place), BYTES)
        _fetch_weights(w, rest, ring, stage, place, K, FIRST, ALL, DEEP)
        _fetch_rows(x, wide, ring, stage, place, K, FIRST, ALL, DEEP)
        place, phase = next_place(place, phase, STAGES)


@gluon.jit
def _keep_factors(
    factors, f_ptr, s_ptr, s_row, s_group, rows, begin, ready,
    HALF: gl.constexpr, K: gl.constexpr, FIRST: gl.constexpr, TALL: gl.constexpr, DEEP: gl.constexpr,
    CHUNK: gl.constexpr,
):  # fmt: skip
    """Scales of weights times scales of rows, of every FP8 block of this program, CHUNK at a time by each
    warpgroup: one after the other would each take the time of a load."""
    DEPTH: gl.constexpr = K // 128
    N: gl.constexpr = factors.shape[1]
    CHUNKS: gl.constexpr = factors.shape[0] // CHUNK
    chunks = factors._reinterpret(gl.float32, [CHUNKS, CHUNK * N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    e = gl.arange(0, CHUNK * N, gl.BlockedLayout([1], [32], [4], [0]))
    j = gl.minimum(e % N, rows - 1)
    for c in range(HALF, CHUNKS, 2):
        block = gl.minimum(begin * DEEP + c * CHUNK + e // N, FIRST * DEEP - 1)
        row = block // DEPTH * TALL
        f = gl.load(f_ptr + row // 128 * DEPTH + block % DEPTH)
        s = gl.load(s_ptr + block % DEPTH * s_group + j * s_row)
        chunks.index(c).store(s * f)
    meet(ready)


@gluon.jit
def _multiply(
    f_ptr, s_ptr, s_row, s_group, outputs, rows, begin, end, ring, factors, ready,
    HALF: gl.constexpr, K: gl.constexpr, OUT: gl.constexpr, FIRST: gl.constexpr, ALL: gl.constexpr,
    STAGES: gl.constexpr, DEEP: gl.constexpr, SHARERS: gl.constexpr, TURNED: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    """Half of each tile by stages [begin, end) of the line."""
    DEPTH: gl.constexpr = K // 128 // DEEP
    TALL: gl.constexpr = ring[0].shape[1]
    _keep_factors(factors, f_ptr, s_ptr, s_row, s_group, rows, begin, ready, HALF, K, FIRST, TALL, DEEP, CHUNK)
    place = 0  # in the ring, of the next stage
    phase = 0
    at = begin
    while at < end:
        if FIRST == ALL or at < FIRST:
            tile = at // DEPTH
            start = tile * DEPTH
            stop = gl.minimum(start + DEPTH, end)
            acc, place, phase = _rounded_part(
                ring, factors, at - begin, stop - begin, place, phase, HALF, STAGES, DEEP, TURNED
            )
            acc, whole = _whole(acc, outputs, tile, (begin, start, start + DEPTH, at, stop), HALF, ALL, SHARERS)
            if whole:
                _store(acc, outputs, rows, tile, HALF, TALL, ring[1].shape[1], OUT, TURNED, FIRST != ALL)
        else:
            tile = FIRST // DEPTH + (at - FIRST) // (2 * DEPTH)
            start = FIRST + (at - FIRST) // (2 * DEPTH) * (2 * DEPTH)
            stop = gl.minimum(start + 2 * DEPTH, end)
            more, place, phase = _bf16_part(ring, at, stop, place, phase, HALF, STAGES, DEEP, TURNED)
            more, whole = _whole(more, outputs, tile, (begin, start, start + 2 * DEPTH, at, stop), HALF, ALL, SHARERS)
            if whole:
                _store(more, outputs, rows, tile, HALF, TALL, ring[1].shape[1], OUT, TURNED, False)
        at = stop


@gluon.jit
def _product(w, x, acc, ADD: gl.constexpr, HALF: gl.constexpr, TURNED: gl.constexpr):
    """Half of a block of a tile, on its way."""
    R0: gl.constexpr = half_of(HALF, w.shape[0], x.shape[0], TURNED)[0]
    R: gl.constexpr = half_of(HALF, w.shape[0], x.shape[0], TURNED)[1]
    C0: gl.constexpr = half_of(HALF, w.shape[0], x.shape[0], TURNED)[2]
    C: gl.constexpr = half_of(HALF, w.shape[0], x.shape[0], TURNED)[3]
    w, x = w.slice(C0, C, 0), x.slice(R0, R, 0)
    if TURNED:
        return warpgroup_mma(w, x.permute((1, 0)), acc, use_acc=ADD, is_async=True)
    else:
        return warpgroup_mma(x, w.permute((1, 0)), acc, use_acc=ADD, is_async=True)


@gluon.jit
def _factor(factors, block, HALF: gl.constexpr, TURNED: gl.constexpr, MMA: gl.constexpr, TALL: gl.constexpr):
    """What the sums of a block are multiplied by, side by side with rows."""
    R0: gl.constexpr = half_of(HALF, TALL, factors.shape[1], TURNED)[0]
    R: gl.constexpr = half_of(HALF, TALL, factors.shape[1], TURNED)[1]
    some = factors.index(block).slice(R0, R, 0)
    if TURNED:
        return some.load(gl.SliceLayout(0, MMA))[None, :]
    else:
        return some.load(gl.SliceLayout(1, MMA))[:, None]


@gluon.jit
def _rounded_part(
    ring, factors, at, stop, place, phase,
    HALF: gl.constexpr, STAGES: gl.constexpr, DEEP: gl.constexpr, TURNED: gl.constexpr,
):  # fmt: skip
    """Sums of this program's stages [at, stop), the next of the ring, float32; and where the ring is then."""
    ws, xs, full, empty = ring
    TALL: gl.constexpr = ws.shape[1]
    MMA: gl.constexpr = sums_of(HALF, TALL, xs.shape[1], TURNED, 32)
    acc = _none(HALF, TALL, xs.shape[1], TURNED, MMA)
    zero = _none(HALF, TALL, xs.shape[1], TURNED, MMA)
    for stage in range(at, stop):
        mbarrier.wait(full.index(place), phase)
        before = zero
        factor = _factor(factors, stage * DEEP, HALF, TURNED, MMA, TALL)
        for i in gl.static_range(DEEP):
            running = _product(ws.index(place * DEEP + i), xs.index(place * DEEP + i), zero, False, HALF, TURNED)
            if i > 0:
                part = warpgroup_mma_wait(1, deps=[before])
                acc += part * factor
                factor = _factor(factors, stage * DEEP + i, HALF, TURNED, MMA, TALL)
            before = running
        part = warpgroup_mma_wait(0, deps=[before])
        gl.thread_barrier()  # all warps have read the stage
        mbarrier.arrive(empty.index(place), count=1)
        acc += part * factor
        place, phase = next_place(place, phase, STAGES)
    return acc, place, phase


@gluon.jit
def _none(HALF: gl.constexpr, TALL: gl.constexpr, N: gl.constexpr, TURNED: gl.constexpr, MMA: gl.constexpr):
    """Sums of nothing, of half of a tile."""
    R: gl.constexpr = half_of(HALF, TALL, N, TURNED)[1]
    C: gl.constexpr = half_of(HALF, TALL, N, TURNED)[3]
    if TURNED:
        return gl.zeros([C, R], gl.float32, MMA)
    else:
        return gl.zeros([R, C], gl.float32, MMA)


@gluon.jit
def _bf16_part(
    ring, at, stop, place, phase, HALF: gl.constexpr, STAGES: gl.constexpr, DEEP: gl.constexpr, TURNED: gl.constexpr
):
    """As _rounded_part, of rows and weights as they are, in blocks of 64 columns."""
    ws, xs, full, empty = ring
    TALL: gl.constexpr = ws.shape[1]
    N: gl.constexpr = xs.shape[1]
    W: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    acc = _none(HALF, TALL, N, TURNED, sums_of(HALF, TALL, N, TURNED, 16))
    for _ in range(at, stop):
        mbarrier.wait(full.index(place), phase)
        for i in gl.static_range(DEEP):
            w = ws.index(place * DEEP + i)._reinterpret(gl.bfloat16, [TALL, 64], W)
            x = xs.index(place * DEEP + i)._reinterpret(gl.bfloat16, [N, 64], W)
            acc = _product(w, x, acc, True, HALF, TURNED)
        acc = warpgroup_mma_wait(0, deps=[acc])
        gl.thread_barrier()
        mbarrier.arrive(empty.index(place), count=1)
        place, phase = next_place(place, phase, STAGES)
    return acc, place, phase


@gluon.jit
def _whole(acc, outputs, tile, span, HALF: gl.constexpr, ALL: gl.constexpr, SHARERS: gl.constexpr):
    """The sums of all stages of a tile, and whether they are: only the last of the programs that share it has them.

    span: where this program begins in the line; the tile's stages [start, past); those which acc [M, N] sums."""
    _, part_ptr, count_ptr = outputs
    begin, start, past, here, stop = span
    M: gl.constexpr = acc.shape[0]
    N: gl.constexpr = acc.shape[1]
    whole = (here == start) & (stop == past)
    if not whole:
        programs = gl.num_programs(0)
        first = ((start + 1) * programs - 1) // ALL
        last = (past * programs - 1) // ALL
        # four sums of a thread side by side, to be stored and loaded as one
        own = gl.reshape(acc, [M // 64, 4, 2, 8, N // 8, 4, 2])
        own = gl.reshape(gl.permute(own, (0, 4, 1, 3, 5, 2, 6)), [M * N])
        L: gl.constexpr = own.type.layout
        at = gl.arange(0, M * N, L)
        # a program has the end of one tile and the beginning of another
        part = gl.program_id(0) * 2 + (begin < start).to(gl.int32)
        gl.store(part_ptr + (part * 2 + HALF) * (M * N) + at, own)
        gl.thread_barrier()
        count_ptr += tile * 2 + HALF
        whole = gl.atomic_add(count_ptr, 1, sem="acq_rel") == last - first
        if whole:
            total = gl.zeros([M * N], gl.float32, L)
            for i in gl.static_range(SHARERS):
                program = first + i
                part = program * 2 + (program * ALL // programs < start).to(gl.int32)
                theirs = part_ptr + (part * 2 + HALF) * (M * N) + at
                total += gl.load(theirs, mask=(at >= 0) & (program <= last), other=0.0, cache_modifier=".cg")
            total = gl.reshape(total, [M // 64, N // 8, 4, 8, 4, 2, 2])
            total = gl.reshape(gl.permute(total, (0, 2, 5, 3, 1, 4, 6)), [M, N])
            MMA: gl.constexpr = acc.type.layout
            acc = gl.convert_layout(total, MMA, assert_trivial=True)
            gl.store(count_ptr, 0)
    return acc, whole


@gluon.jit
def _store(
    acc, outputs, rows, tile,
    HALF: gl.constexpr, TALL: gl.constexpr, N: gl.constexpr, OUT: gl.constexpr, TURNED: gl.constexpr,
    NARROW: gl.constexpr,
):  # fmt: skip
    """Half of a tile. NARROW: as activations, which are bf16."""
    out_ptr, _, _ = outputs
    L: gl.constexpr = acc.type.layout
    ROWS: gl.constexpr = gl.SliceLayout(0 if TURNED else 1, L)
    OUTS: gl.constexpr = gl.SliceLayout(1 if TURNED else 0, L)
    R0: gl.constexpr = half_of(HALF, TALL, N, TURNED)[0]
    R: gl.constexpr = half_of(HALF, TALL, N, TURNED)[1]
    C0: gl.constexpr = half_of(HALF, TALL, N, TURNED)[2]
    C: gl.constexpr = half_of(HALF, TALL, N, TURNED)[3]
    j = R0 + gl.arange(0, R, ROWS)
    n = C0 + gl.arange(0, C, OUTS)
    if NARROW:
        acc = acc.to(gl.bfloat16).to(gl.float32)
    if TURNED:
        at = j[None, :] * OUT + n[:, None]
        keep = (j < rows)[None, :] & (n < OUT - tile * TALL)[:, None]
    else:
        at = j[:, None] * OUT + n[None, :]
        keep = (j < rows)[:, None] & (n < OUT - tile * TALL)[None, :]
    gl.store(out_ptr + tile * TALL + at, acc.to(out_ptr.dtype.element_ty), mask=keep)


@gluon.jit(do_not_specialize=["rows", "s_row", "s_group"])
def products(
    w, f_ptr, rest, x, s_ptr, wide, out_ptr, part_ptr, count_ptr, rows, s_row, s_group,
    K: gl.constexpr, OUT: gl.constexpr, LATENT: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    DEEP: gl.constexpr, TALL: gl.constexpr, CHUNK: gl.constexpr, CHUNKS: gl.constexpr, SHARERS: gl.constexpr,
    TURNED: gl.constexpr,
):  # fmt: skip
    """out [rows, OUT] of up to N rows x: outputs below LATENT by the FP8 matrix `w`, the others by `rest` in bf16.

    w, rest, x and wide are descriptors; x are rounded rows [rows, K], s their scales, `wide` the same rows in bf16.
    part [2 programs, TALL, N] float32 is scratch. A program has up to CHUNK * CHUNKS blocks, a tile up to SHARERS
    programs. N is 64 or 128 where tiles are not TURNED.
    """
    FIRST: gl.constexpr = line_of(K, LATENT, OUT, TALL, DEEP)[0]
    ALL: gl.constexpr = line_of(K, LATENT, OUT, TALL, DEEP)[1]
    ws = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * DEEP, TALL, 128], gl.NVMMASharedLayout(128, 8))
    xs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * DEEP, N, 128], gl.NVMMASharedLayout(128, 8))
    factors = gl.allocate_shared_memory(gl.float32, [CHUNKS * CHUNK, N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=2)
    mbarrier.init(ready, count=2)
    fence_async_shared()
    begin = gl.program_id(0) * ALL // gl.num_programs(0)
    end = (gl.program_id(0) + 1) * ALL // gl.num_programs(0)
    ring = (ws, xs, full, empty)
    outputs = (out_ptr, part_ptr, count_ptr)
    gl.warp_specialize(
        [
            (_multiply, (
                f_ptr, s_ptr, s_row, s_group, outputs, rows, begin, end, ring, factors, ready,
                0, K, OUT, FIRST, ALL, STAGES, DEEP, SHARERS, TURNED, CHUNK,
            )),
            (_multiply, (
                f_ptr, s_ptr, s_row, s_group, outputs, rows, begin, end, ring, factors, ready,
                1, K, OUT, FIRST, ALL, STAGES, DEEP, SHARERS, TURNED, CHUNK,
            )),
            (_fetch, (w, rest, x, wide, ring, begin, end, K, FIRST, ALL, STAGES, DEEP)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
    forget(full, STAGES)
    forget(empty, STAGES)
    mbarrier.invalidate(ready)
