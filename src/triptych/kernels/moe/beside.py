"""The shared expert in joined.py's launch: e4m3 matrices, of which 64 rows and one of PARTS parts of the columns are
a program's, two if they can, so that it is about as long as one of a routed expert.
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
from triptych.kernels.moe.operands import (
    as_operands,
    hidden_layout,
    of_pairs,
    room_for_rounded,
    round_into,
    rows_layout,
    scale_slot_layout,
    scales,
    shared_by,
    slot_layout,
)
from triptych.kernels.moe.operands import rows as rows_of
from triptych.kernels.moe.ready import done, wait_for
from triptych.kernels.moe.shared import swiglu
from triptych.kernels.moe.stream import factor_layout, nth


@gluon.jit
def shared_up(
    at, x_ptr, xs_ptr, w, scale_ptr, sums_ptr, ready_ptr, rows,
    DIM: gl.constexpr, INNER: gl.constexpr, TALL: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A part of the sums of 32 gates and their ups, into sums [PARTS, 2, rows, INNER] float32."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32])
    K: gl.constexpr = DIM // PARTS
    SHARE: gl.constexpr = shared_by(K, TALL)
    part, row = at % PARTS, at // PARTS
    ws, bar = _begin(w, row, part * (K // 128), STAGES)
    p = gl.arange(0, 8, slot_layout(rows_layout())) % TALL
    xs = rows_of(x_ptr + part * K, p, p < rows, DIM, K, TALL, SHARE, False)
    p = gl.arange(0, 8, scale_slot_layout(1)) % TALL
    fs = scales(xs_ptr + part * (K // 128) * rows, p, p < rows, rows, K, 1, TALL, SHARE)
    fence_async_shared()
    gl.thread_barrier()
    m = gl.arange(0, 64, gl.SliceLayout(1, MMA))
    n = row * 32 + (m // 16) * 8 + m % 8 + ((m // 8) % 2) * INNER  # a thread's two rows are a gate and its up
    factor_ptr = scale_ptr + n // 128 * (DIM // 128) + part * (K // 128)
    acc = _product(w, ws, bar, xs, fs, factor_ptr, row, part * (K // 128), K // 128, STAGES, MMA, SHARE)
    total = of_pairs(acc, TALL)
    L: gl.constexpr = total.type.layout
    j = gl.arange(0, TALL, gl.SliceLayout(0, L))
    n = gl.convert_layout(n, gl.SliceLayout(1, L))
    to = part * 2 * rows * INNER + (n // INNER * rows * INNER + n % INNER)[:, None] + j[None, :] * INNER
    gl.store(sums_ptr + to, total, mask=(j < rows)[None, :])
    done(ready_ptr)


@gluon.jit
def shared_down(
    at, w, scale_ptr, sums_ptr, ready_ptr, rows, pairs, limit,
    DIM: gl.constexpr, INNER: gl.constexpr, TALL: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A part of the sums of 64 outputs [64, TALL], their rows of `each` [TALL], and their row tile."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32])
    K: gl.constexpr = INNER // PARTS
    SHARE: gl.constexpr = shared_by(K, TALL)
    part, row = at % PARTS, at // PARTS
    ws, bar = _begin(w, row, part * (K // 128), STAGES)
    wait_for(ready_ptr, INNER // 32 * PARTS, DIM // 64 * PARTS)
    xs, fs = _hidden(sums_ptr + part * K, rows, limit, K, INNER, TALL, PARTS, SHARE)
    fence_async_shared()
    gl.thread_barrier()
    n = row * 64 + gl.arange(0, 64, gl.SliceLayout(1, MMA))
    factor_ptr = scale_ptr + n // 128 * (INNER // 128) + part * (K // 128)
    acc = _product(w, ws, bar, xs, fs, factor_ptr, row, part * (K // 128), K // 128, STAGES, MMA, SHARE)
    total = of_pairs(acc, TALL)
    return total, pairs + part * rows + gl.arange(0, TALL, gl.SliceLayout(0, total.type.layout)), row


@gluon.jit
def _hidden(
    sums_ptr, rows, limit,
    K: gl.constexpr, INNER: gl.constexpr, TALL: gl.constexpr, PARTS: gl.constexpr, SHARE: gl.constexpr,
):  # fmt: skip
    """SwiGLU of K columns of the sums, rounded: the operands of all rows and their scales."""
    F: gl.constexpr = hidden_layout()
    j = gl.arange(0, 8, slot_layout(F))
    d = gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(1, F)))
    mask = gl.expand_dims((j % TALL < rows)[None, :], 2) & gl.expand_dims((d >= 0)[None, :], 1)
    place = gl.expand_dims((j % TALL * INNER + j // TALL % SHARE * 128)[None, :], 2) + gl.expand_dims(d[None, :], 1)
    xs, fs = room_for_rounded(K // 128 // SHARE, 1, SHARE)
    for at in gl.static_range(K // 128 // SHARE):
        gate = gl.zeros([1, 8, 128], gl.float32, F)
        up = gl.zeros([1, 8, 128], gl.float32, F)
        for part in gl.static_range(PARTS):
            here = sums_ptr + 2 * part * rows * INNER + at * SHARE * 128 + place
            gate += gl.load(here, mask=mask, other=0.0, cache_modifier=".cg")
            up += gl.load(here + rows * INNER, mask=mask, other=0.0, cache_modifier=".cg")
        round_into(swiglu(gate, up, limit), xs.index(at), fs.index(at), TALL, SHARE, False)
    return as_operands(xs, fs, K, 1, SHARE)


@gluon.jit
def _begin(w, row, first, STAGES: gl.constexpr):
    """Blocks [first, first + STAGES) of row tile `row` of w on their way into stages, and what says that they came."""
    ws = gl.allocate_shared_memory(gl.float8e4nv, [STAGES] + w.block_shape, w.layout)  # noqa: RUF005
    bar = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(bar.index(s), count=1)
    fence_async_shared()
    gl.thread_barrier()
    for s in gl.static_range(STAGES):
        _fetch(w, ws, bar, row, first + s, s)
    return ws, bar


@gluon.jit
def _fetch(w, ws, bar, row, block, s):
    """A block of 64 rows and 128 columns on its way into stage s."""
    mbarrier.expect(bar.index(s), 64 * 128)
    if len(w.block_shape) == 4:
        tma.async_copy_global_to_shared(w, [row * 4, 0, 0, block * 128], bar.index(s), ws.index(s))
    else:
        tma.async_copy_global_to_shared(w, [row * 64, block * 128], bar.index(s), ws.index(s))


@gluon.jit
def _product(
    w, ws, bar, xs, fs, factor_ptr, row, first,
    BLOCKS: gl.constexpr, STAGES: gl.constexpr, MMA: gl.constexpr, SHARE: gl.constexpr,
):  # fmt: skip
    """Blocks [first, first + BLOCKS), which `_begin` began, of row tile `row` of w times x -> float32 [64, 8].

    factor_ptr [64] point to the scales of w's blocks; xs and fs are the operands' and their scales."""
    acc = gl.zeros([64, 8], gl.float32, MMA)
    zero = gl.zeros([64, 8], gl.float32, MMA)
    for block in range(0, BLOCKS):
        s = block % STAGES
        factor = gl.load(factor_ptr + block)
        scale = nth(fs.index(block).load(factor_layout(1, 1)), 0, 1)
        mbarrier.wait(bar.index(s), (block // STAGES) & 1)
        a = ws.index(s)._reinterpret(gl.float8e4nv, [64, 128], gl.NVMMASharedLayout(128, 8))
        x = xs.index(block // SHARE).permute((1, 0))
        running = warpgroup_mma(a, x, zero, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, deps=[running])
        acc += part * (factor[:, None] * gl.convert_layout(scale, gl.SliceLayout(0, MMA), assert_trivial=True)[None, :])
        gl.thread_barrier()
        if block + STAGES < BLOCKS:
            _fetch(w, ws, bar, row, first + block + STAGES, s)
    forget(bar, STAGES)
    return acc
