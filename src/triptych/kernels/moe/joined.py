"""Experts of up to eight rows in one launch: what few.py does in two, without a pause of the memory between them.

    shared up, up, shared down, down        programs in the order of their numbers

There is room for all of one row's first matrices at once, so none that waits takes a place before them. Programs of
second matrices ask for their first weights, wait until all hidden values of their expert are there, and round those of
their pairs themselves. Programs start in the order of their numbers, and those waited for wait for none, so not all of
them need to be on the card at once. A counter for each tile, and one for the shared expert, says how many programs of
first matrices are done; the last one that waited for it sets it back to zero.

Rows of x lie in shared memory as operands.py has them, so that there is room for many programs at once.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from triptych.kernels.barriers import forget
from triptych.kernels.moe.beside import shared_down, shared_up
from triptych.kernels.moe.few import add, entry, keep, sum_layout
from triptych.kernels.moe.operands import (
    hidden,
    hidden_layout,
    of_pairs,
    rows_layout,
    scale_slot_layout,
    scales,
    shared_by,
    slot_layout,
)
from triptych.kernels.moe.operands import rows as rows_in_slots
from triptych.kernels.moe.ready import done, wait_for
from triptych.kernels.moe.shared import swiglu
from triptych.kernels.moe.stream import begin, multiply, stages


@gluon.jit(do_not_specialize=["rows", "pairs", "tiles"])
def experts(
    x_ptr, xs_ptr, tile_ptr, order_ptr, gate_ptr, values13, scales13, top13_ptr, values2, scales2, top2_ptr,
    shared13, scale13_ptr, shared2, scale2_ptr, h_ptr, sums_ptr, each_ptr, out_ptr, ready_ptr, count_ptr,
    rows, pairs, tiles, limit,
    DIM: gl.constexpr, INNER: gl.constexpr, TOPK: gl.constexpr, PAIRS: gl.constexpr, TALL: gl.constexpr,
    KS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, SHARED_STAGES: gl.constexpr,
):  # fmt: skip
    """x [rows, DIM] e4m3, xs [DIM / 128, rows], tiles of up to PAIRS pairs and order -> out [rows, DIM]
    bfloat16; see few.up.

    values and scales are descriptors of tiles in blocks of KS; shared13 and shared2 of the shared expert's matrices.
    h [pairs, INNER], sums [PARTS, 2, rows, INNER] and each [pairs + PARTS * rows, DIM], all float32, are scratch. TALL
    is a power of two, no less than rows and at most 8."""
    at = gl.program_id(0)
    if at < INNER // 32 * PARTS:
        shared_up(
            at, x_ptr, xs_ptr, shared13, scale13_ptr, sums_ptr, ready_ptr, rows, DIM, INNER, TALL, PARTS, SHARED_STAGES
        )  # fmt: skip
    elif at < INNER // 32 * (PARTS + tiles):
        _up(
            at - INNER // 32 * PARTS, x_ptr, xs_ptr, tile_ptr, order_ptr, gate_ptr, values13, scales13, top13_ptr,
            h_ptr, ready_ptr + 1, rows, limit, DIM, INNER, TOPK, PAIRS, KS, STAGES,
        )  # fmt: skip
    else:
        at -= INNER // 32 * (PARTS + tiles)
        if at < DIM // 64 * PARTS:
            total, to, row = shared_down(
                at, shared2, scale2_ptr, sums_ptr, ready_ptr, rows, pairs, limit, DIM, INNER, TALL, PARTS, SHARED_STAGES
            )  # fmt: skip
            wanted = gl.arange(0, TALL, gl.SliceLayout(0, total.type.layout)) < rows
            keep(total, to, wanted, each_ptr, row * 64, DIM)
            t = gl.arange(0, 8, gl.SliceLayout(1, sum_layout(1)))
            add(t, t < rows, each_ptr, out_ptr, count_ptr, row * 64, rows, pairs, TOPK, PARTS, DIM, 1)
        else:
            _down(
                at - DIM // 64 * PARTS, tile_ptr, order_ptr, values2, scales2, top2_ptr, h_ptr, ready_ptr + 1, each_ptr,
                out_ptr, count_ptr, rows, pairs, DIM, INNER, TOPK, PAIRS, PARTS, KS, STAGES,
            )  # fmt: skip


@gluon.jit
def _up(
    at, x_ptr, xs_ptr, tile_ptr, order_ptr, gate_ptr, values, scales_of_w, top_ptr, h_ptr, ready_ptr, rows, limit,
    DIM: gl.constexpr, INNER: gl.constexpr, TOPK: gl.constexpr, PAIRS: gl.constexpr, KS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """32 hidden columns of a tile's pairs."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32])
    SHARE: gl.constexpr = shared_by(DIM, PAIRS)
    tile, piece = at // (INNER // 32), at % (INNER // 32)
    expert, start, count = entry(tile_ptr, tile)
    ws, es, bar = stages(KS, 1, STAGES)
    if expert >= 0:
        order_ptr += start
        top_ptr += expert * (2 * INNER) + piece * 32
        row = expert * (INNER // 32) + piece
        begin(values, scales_of_w, ws, es, bar, 0, row, KS, 1, STAGES)
        p = gl.arange(0, 8, slot_layout(rows_layout())) % PAIRS
        of = gl.load(order_ptr + p, mask=p < count, other=0) // TOPK
        xs = rows_in_slots(x_ptr, of, p < count, DIM, DIM, PAIRS, SHARE, True)
        p = gl.arange(0, 8, scale_slot_layout(KS)) % PAIRS
        of = gl.load(order_ptr + p, mask=p < count, other=0) // TOPK
        fs = scales(xs_ptr, of, p < count, rows, DIM, KS, PAIRS, SHARE)
        fence_async_shared()  # by those who wrote x, before the barrier
        gl.thread_barrier()
        m = gl.arange(0, 64, gl.SliceLayout(1, MMA))
        top = gl.load(top_ptr + (m // 16) * 8 + m % 8 + ((m // 8) % 2) * INNER)
        acc = multiply(values, scales_of_w, ws, es, bar, 0, row, -1, xs, fs, top, DIM, KS, 1, STAGES, MMA, SHARE)
        halves = gl.reshape(of_pairs(acc, PAIRS), [4, 2, 8, PAIRS])
        gate, up = gl.split(gl.permute(halves, (0, 2, 3, 1)))
        gate, up = gl.reshape(gate, [32, PAIRS]), gl.reshape(up, [32, PAIRS])
        L: gl.constexpr = gate.type.layout
        j = gl.arange(0, PAIRS, gl.SliceLayout(0, L))
        pair = gl.load(order_ptr + j, mask=j < count, other=0)
        weight = gl.load(gate_ptr + pair, mask=j < count, other=0.0)
        to = h_ptr + piece * 32 + pair[None, :] * INNER + gl.arange(0, 32, gl.SliceLayout(1, L))[:, None]
        gl.store(to, swiglu(gate, up, limit) * weight[None, :], mask=(j < count)[None, :])
        done(ready_ptr + tile)
    forget(bar, STAGES)


@gluon.jit
def _down(
    at, tile_ptr, order_ptr, values, scales_of_w, top_ptr, h_ptr, ready_ptr, each_ptr, out_ptr, count_ptr, rows, pairs,
    DIM: gl.constexpr, INNER: gl.constexpr, TOPK: gl.constexpr, PAIRS: gl.constexpr, PARTS: gl.constexpr,
    KS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """64 outputs of a tile's pairs; whoever is last of a row's experts adds them up."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32])
    SHARE: gl.constexpr = shared_by(INNER, PAIRS)
    tile, piece = at // (DIM // 64), at % (DIM // 64)
    expert, start, count = entry(tile_ptr, tile)
    ws, es, bar = stages(KS, 1, STAGES)
    if expert >= 0:
        order_ptr += start
        top_ptr += expert * DIM + piece * 64
        row = expert * (DIM // 64) + piece
        begin(values, scales_of_w, ws, es, bar, 0, row, KS, 1, STAGES)
        p = gl.arange(0, 8, slot_layout(hidden_layout())) % PAIRS
        of = gl.load(order_ptr + p, mask=p < count, other=0)
        top = gl.load(top_ptr + gl.arange(0, 64, gl.SliceLayout(1, MMA)))
        wait_for(ready_ptr + tile, INNER // 32, DIM // 64)
        xs, fs = hidden(h_ptr, of, p < count, INNER, KS, PAIRS, SHARE)
        fence_async_shared()
        gl.thread_barrier()
        acc = multiply(values, scales_of_w, ws, es, bar, 0, row, -1, xs, fs, top, INNER, KS, 1, STAGES, MMA, SHARE)
        total = of_pairs(acc, PAIRS)
        j = gl.arange(0, PAIRS, gl.SliceLayout(0, total.type.layout))
        pair = gl.load(order_ptr + j, mask=j < count, other=0)
        keep(total, pair, j < count, each_ptr, piece * 64, DIM)
        j8 = gl.arange(0, 8, gl.SliceLayout(1, sum_layout(1)))
        t8 = gl.load(order_ptr + j8, mask=j8 < count, other=0) // TOPK
        add(t8, j8 < count, each_ptr, out_ptr, count_ptr, piece * 64, rows, pairs, TOPK, PARTS, DIM, 1)
    forget(bar, STAGES)
