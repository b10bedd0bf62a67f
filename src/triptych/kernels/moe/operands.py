"""A few rows of x as the operands of products on the tensor cores, without room for rows that are not there.

Such an operand has eight rows of 128 columns. Of a program's PAIRS rows, a power of two, those of SHARE neighbouring
blocks of columns lie in one:

    slot s * PAIRS + p      row p of block s of the SHARE

A block of weights times that has PAIRS columns that are wanted. The others are scaled by 0, and `of_pairs` adds up at
last what belongs to a pair.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triptych.kernels.quant.e4m3 import scale_of


@gluon.constexpr_function
def shared_by(columns, pairs):
    """How many blocks of 128 columns share an operand: a power of two that divides their number."""
    blocks = columns // 128
    return min(8 // pairs, blocks & -blocks)


@gluon.constexpr_function
def rows_layout():
    """[operands, 8, 128] e4m3 on their way into shared memory."""
    return gl.BlockedLayout([1, 1, 16], [1, 4, 8], [2, 2, 1], [2, 1, 0])


@gluon.constexpr_function
def hidden_layout():
    """[operands, 8, 128] float32 that are to be rounded: a warp has whole blocks."""
    return gl.BlockedLayout([1, 1, 4], [1, 1, 32], [1, 4, 1], [2, 1, 0])


@gluon.constexpr_function
def scales_layout(ks):
    """[chunks, ks, 8] float32 scales."""
    return gl.BlockedLayout([1, 1, 1], [4 // min(ks, 4), min(ks, 4), 8], [4, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def slot_layout(layout):
    """Of what there is one for each of the eight slots."""
    return gl.SliceLayout(0, gl.SliceLayout(2, layout))


@gluon.constexpr_function
def scale_slot_layout(ks):
    """The same for scales, whose slots come last."""
    return gl.SliceLayout(0, gl.SliceLayout(1, scales_layout(ks)))


@gluon.constexpr_function
def _together(count, most):
    """How many of so many are taken at once: a power of two that divides them."""
    return min(most, count & -count)


@gluon.constexpr_function
def _power_of_two(count):
    """The least one that is no less."""
    return 1 << (count - 1).bit_length()


@gluon.jit
def of_pairs(acc, PAIRS: gl.constexpr):
    """[64, 8] -> [64, PAIRS]: a pair's columns are those of its blocks."""
    return gl.sum(gl.reshape(acc, [64, 8 // PAIRS, PAIRS]), axis=1)


@gluon.jit
def _places(row, wanted, stride, SOME: gl.constexpr, PAIRS: gl.constexpr, SHARE: gl.constexpr, L: gl.constexpr):
    """Where SOME operands' values lie [SOME, 8, 128], and which are wanted; row and wanted [8], slot by slot.

    Slots beyond SHARE blocks repeat them, as nothing wants them. The assembler fills half a register with what happens
    to be there where values to be rounded are all 0 and known to be so."""
    g = gl.arange(0, SOME, gl.SliceLayout(1, gl.SliceLayout(2, L)))
    j = gl.arange(0, 8, slot_layout(L))
    d = gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(1, L)))
    inside = gl.expand_dims(g[:, None] * (SHARE * 128), 2) + gl.expand_dims(d[None, :], 1)
    place = gl.expand_dims((row * stride + j // PAIRS % SHARE * 128)[None, :], 2) + inside
    return place, gl.expand_dims(wanted[None, :], 2) & (inside >= 0)


@gluon.jit
def rows(
    x_ptr, row, wanted, stride, K: gl.constexpr, PAIRS: gl.constexpr, SHARE: gl.constexpr, SLOTS: gl.constexpr
):  # fmt: skip
    """K columns of rows `row` [8] of x e4m3 in shared memory [K / 128 / SHARE, 8, 128]; 0 where not `wanted`.

    SLOTS: columns of a block lie as weights in tiles want them. row and wanted in slot_layout(rows_layout())."""
    OPERANDS: gl.constexpr = K // 128 // SHARE
    SOME: gl.constexpr = _together(OPERANDS, 8)
    room = gl.allocate_shared_memory(gl.float8e4nv, [OPERANDS // SOME, SOME * 8, 128], gl.NVMMASharedLayout(128, 8))
    place, mask = _places(row, wanted, stride, SOME, PAIRS, SHARE, rows_layout())
    for at in gl.static_range(OPERANDS // SOME):
        x = gl.load(x_ptr + at * (SOME * SHARE * 128) + place, mask=mask, other=0).to(gl.float8e4nv, bitcast=True)
        room.index(at).store(_in_slots(x, SLOTS))
    return room._reinterpret(gl.float8e4nv, [OPERANDS, 8, 128], gl.NVMMASharedLayout(128, 8))


@gluon.jit
def _in_slots(x, SLOTS: gl.constexpr):
    """[operands, 8, 128] -> [8 operands, 128]."""
    if SLOTS:
        x = gl.permute(gl.reshape(x, [x.shape[0], 8, 4, 4, 2, 4]), (0, 1, 3, 4, 2, 5))  # c, i, h -> i, h, c
        return gl.reshape(x, [x.shape[0] * 8, 128])
    else:
        return gl.reshape(x, [x.shape[0] * 8, 128])


@gluon.jit
def scales(
    ptr, row, wanted, stride, K: gl.constexpr, KS: gl.constexpr, PAIRS: gl.constexpr, SHARE: gl.constexpr
):  # fmt: skip
    """Scales of `rows` in shared memory [chunks, 8, KS] float32, 0 in the slots of other blocks; ptr [K / 128, stride].

    row and wanted [8] in scale_slot_layout(KS)."""
    CHUNKS: gl.constexpr = _power_of_two(K // 128) // KS
    S: gl.constexpr = scales_layout(KS)
    room = gl.allocate_shared_memory(gl.float32, [CHUNKS, KS, 8], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    c = gl.arange(0, CHUNKS, gl.SliceLayout(1, gl.SliceLayout(2, S)))
    b = gl.arange(0, KS, gl.SliceLayout(0, gl.SliceLayout(2, S)))
    j = gl.arange(0, 8, scale_slot_layout(KS))
    block = gl.expand_dims(c[:, None] * KS + b[None, :], 2)
    mine = block % SHARE == gl.expand_dims((j // PAIRS)[None, :], 1)
    there = (block < K // 128) & mine & gl.expand_dims(wanted[None, :], 1)
    room.store(gl.load(ptr + block * stride + gl.expand_dims(row[None, :], 1), mask=there, other=0.0))
    return _by_chunks(room, CHUNKS, KS)


@gluon.jit
def _by_chunks(room, CHUNKS: gl.constexpr, KS: gl.constexpr):
    """[CHUNKS, KS, 8], or as many, as [CHUNKS, 8, KS]."""
    return room._reinterpret(gl.float32, [CHUNKS, 8, KS], gl.SwizzledSharedLayout(1, 1, 1, [0, 1]))


@gluon.jit
def hidden(h_ptr, row, wanted, K: gl.constexpr, KS: gl.constexpr, PAIRS: gl.constexpr, SHARE: gl.constexpr):
    """Rows `row` [8] of h [.., K] float32 rounded to e4m3, in slots, and their scales: see rows and scales.

    row and wanted in slot_layout(hidden_layout())."""
    OPERANDS: gl.constexpr = K // 128 // SHARE
    SOME: gl.constexpr = _together(OPERANDS, 4)  # more take registers
    xs, fs = room_for_rounded(OPERANDS, SOME, SHARE)
    place, mask = _places(row, wanted, K, SOME, PAIRS, SHARE, hidden_layout())
    for at in gl.static_range(OPERANDS // SOME):
        values = gl.load(h_ptr + at * (SOME * SHARE * 128) + place, mask=mask, other=0.0, cache_modifier=".cg")
        round_into(values, xs.index(at), fs.index(at), PAIRS, SHARE, True)
    return as_operands(xs, fs, K, KS, SHARE)


@gluon.jit
def room_for_rounded(OPERANDS: gl.constexpr, SOME: gl.constexpr, SHARE: gl.constexpr):
    """Shared memory for operands and their blocks' scales, SOME of them at a time."""
    xs = gl.allocate_shared_memory(gl.float8e4nv, [OPERANDS // SOME, SOME * 8, 128], gl.NVMMASharedLayout(128, 8))
    fs = gl.allocate_shared_memory(
        gl.float32, [OPERANDS // SOME, SOME * SHARE, 8], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    return xs, fs


@gluon.jit
def as_operands(xs, fs, K: gl.constexpr, KS: gl.constexpr, SHARE: gl.constexpr):
    """That room as products take it."""
    xs = xs._reinterpret(gl.float8e4nv, [K // 128 // SHARE, 8, 128], gl.NVMMASharedLayout(128, 8))
    return xs, _by_chunks(fs, K // 128 // KS, KS)


@gluon.jit
def round_into(values, xs, fs, PAIRS: gl.constexpr, SHARE: gl.constexpr, SLOTS: gl.constexpr):
    """[operands, 8, 128] float32 to e4m3 [8 operands, 128] and scales [operands * SHARE, 8] in shared memory."""
    S: gl.constexpr = scales_layout(SHARE)
    scale, inverse = scale_of(gl.max(gl.abs(values), axis=2))
    xs.store(_in_slots((values * gl.expand_dims(inverse, 2)).to(gl.float8e4nv), SLOTS))
    s = gl.arange(0, SHARE, gl.SliceLayout(0, gl.SliceLayout(2, S)))
    j = gl.arange(0, 8, scale_slot_layout(SHARE))
    mine = gl.expand_dims(s[None, :], 2) == gl.expand_dims((j // PAIRS)[None, :], 1)
    scale = gl.expand_dims(gl.convert_layout(scale, gl.SliceLayout(1, S)), 1)
    mine, scale = gl.broadcast(mine, scale)
    fs.store(gl.reshape(gl.where(mine, scale, 0.0), [values.shape[0] * SHARE, 8]))
