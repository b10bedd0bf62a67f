"""The first launch of attend_rows in plain Triton: any sizes, any GPU, and Triton's interpreter.

A vector of 512 is treated as parts of 256, 128, 64 and the 64 rotated ones: each is a power of two, so no lane is
wasted. Values of e4m3 times their power of two are exact in bfloat16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triptych.kernels.quant.e4m3 import e4m3_values


@triton.jit
def extent(
    r,
    positions_ptr,
    lowest_ptr,
    visible_ptr,
    chosen_count,
    MODE: tl.constexpr,
    REACH: tl.constexpr,
    FLAT: tl.constexpr,
):
    """First window position of row r, its number of window rows, and of all its keys.

    FLAT: a row's window is a stretch of the workspace, whose first row and length stand for position and lowest.
    """
    if FLAT:
        first = tl.load(positions_ptr + r)
        in_window = tl.load(lowest_ptr + r).to(tl.int32)
    else:
        position = tl.load(positions_ptr + r).to(tl.int32)
        first = tl.maximum(tl.maximum(tl.load(lowest_ptr + r).to(tl.int32), position - (REACH - 1)), 0)
        in_window = tl.maximum(position - first + 1, 0)
    total = in_window
    if MODE == 1:
        total += tl.minimum(tl.load(visible_ptr + r).to(tl.int32), chosen_count)
    if MODE == 2:
        total += tl.load(visible_ptr + r).to(tl.int32)
    return first, in_window, total


@triton.jit
def _query_part(here, h, heads, shrink, DIM: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr):
    """Dims [START, START + WIDTH) of raw queries in float32, those from END on 0."""
    d = START + tl.arange(0, WIDTH)
    inside = (h < heads)[:, None] & (d < END)[None, :]
    return tl.load(here + h[:, None] * DIM + d[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _e4m3_to_bf16(x):
    """e4m3 bytes as bfloat16: sign, exponent and mantissa moved into place, then times 2^120, the biases' difference.

    The hardware's own conversion goes through float16 and takes an instruction of a quarter of the rate for each value.
    A product of two bfloat16 alone is Hopper's; minus zero added to it changes nothing.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c, d, m, z;
        mov.b32 m, 0x7b807b80;
        mov.b32 z, 0x80008000;
        prmt.b32 a, $2, 0, 0x1404;
        prmt.b32 b, $2, 0, 0x3424;
        shr.u32 c, a, 4;
        shr.u32 d, b, 4;
        and.b32 c, c, 0x07f007f0;
        and.b32 d, d, 0x07f007f0;
        lop3.b32 a, a, 0x80008000, c, 0xea;
        lop3.b32 b, b, 0x80008000, d, 0xea;
        fma.rn.bf16x2 $0, a, m, z;
        fma.rn.bf16x2 $1, b, m, z;
        }""",
        "=r,=r,r",
        [x],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _key_part(
    values, bits, valid, START: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr, PACKED: tl.constexpr, kind
):
    """Dims [START, START + WIDTH) of keys whose rows begin at `values` [KEYS], as `kind`, those from END on 0.

    Packed ones are e4m3 with a scale per 64 dims, whose exponents are the bytes of `bits` [KEYS].
    """
    d = START + tl.arange(0, WIDTH)
    mask = valid[:, None]
    if START + WIDTH > END:
        mask = mask & (d < END)[None, :]
    x = tl.load(values[:, None] + d[None, :], mask=mask, other=0)
    if PACKED:
        GROUP: tl.constexpr = WIDTH if WIDTH < 64 else 64
        GROUPS: tl.constexpr = WIDTH // GROUP
        g = (START // 64 + tl.arange(0, GROUPS)) * 8
        exponent = ((bits[:, None, None] >> g[None, :, None]) & 255).to(tl.int16) << 7
        if kind == tl.bfloat16:  # noqa: SIM108  (resolved by the compiler)
            x = _e4m3_to_bf16(x)
        else:
            x = e4m3_values(x).to(kind)
        x = tl.reshape(x, [x.shape[0], GROUPS, GROUP])
        x = x * exponent.to(tl.bfloat16, bitcast=True).to(kind)
        x = tl.reshape(x, [x.shape[0], WIDTH])
    return x.to(kind)


@triton.jit(do_not_specialize=["table_row", "splits"])  # which differ from step to step
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
    MODE: tl.constexpr,
    FLAT: tl.constexpr,
    RAW: tl.constexpr,
    WHOLE: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    PER_PAGE: tl.constexpr,
    RING: tl.constexpr,
    REACH: tl.constexpr,
    DIM: tl.constexpr,
    ROPE: tl.constexpr,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Sums, peaks and weights of one split of some heads of row program_id(2), see triton.py; or, WHOLE, results."""
    kind: tl.constexpr = tl.float32 if WIDE else tl.bfloat16
    NOPE: tl.constexpr = DIM - ROPE
    W0: tl.constexpr = PARTS[0]
    W1: tl.constexpr = PARTS[1]
    W2: tl.constexpr = PARTS[2]
    WR: tl.constexpr = 16 if ROPE < 16 else ROPE
    r = tl.program_id(2).to(tl.int64)
    first, in_window, total = extent(r, positions_ptr, lowest_ptr, visible_ptr, chosen_count, MODE, REACH, FLAT)
    begin = tl.program_id(1) * span
    if begin >= total:
        return
    end = tl.minimum(begin + span, total)
    h = tl.program_id(0) * HEADS + tl.arange(0, HEADS)

    # queries: norm over the whole head, rotate its last dims
    here = heads_ptr + r * heads_row
    q0 = _query_part(here, h, heads, 1.0, DIM, 0, W0, NOPE)
    square = tl.sum(q0 * q0, 1)
    if W1 > 0:
        q1 = _query_part(here, h, heads, 1.0, DIM, W0, W1, NOPE)
        square += tl.sum(q1 * q1, 1)
    if W2 > 0:
        q2 = _query_part(here, h, heads, 1.0, DIM, W0 + W1, W2, NOPE)
        square += tl.sum(q2 * q2, 1)
    qr = _query_part(here, h, heads, 1.0, DIM, NOPE, WR, DIM)
    square += tl.sum(qr * qr, 1)
    shrink = tl.full([HEADS, 1], 1.0, tl.float32)
    if RAW:  # else they are normed and rotated already
        shrink = tl.rsqrt(square / DIM + eps)[:, None]
        d = tl.arange(0, WR)
        turns = d < ROPE
        inside = (h < heads)[:, None] & turns[None, :]
        partner = tl.load(here + h[:, None] * DIM + NOPE + (d ^ 1)[None, :], mask=inside, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + r * (ROPE // 2) + d // 2, mask=turns, other=1.0)[None, :]
        sin = tl.load(sin_ptr + r * (ROPE // 2) + d // 2, mask=turns, other=0.0)[None, :]
        qr = (qr * cos + tl.where((d % 2 == 0)[None, :], -partner, partner) * sin) * shrink
    qr = qr.to(kind)
    q0 = (q0 * shrink).to(kind)
    a0 = tl.zeros([HEADS, W0], tl.float32)
    ar = tl.zeros([HEADS, WR], tl.float32)
    if W1 > 0:
        q1 = (q1 * shrink).to(kind)
        a1 = tl.zeros([HEADS, W1], tl.float32)
    if W2 > 0:
        q2 = (q2 * shrink).to(kind)
        a2 = tl.zeros([HEADS, W2], tl.float32)
    peak = tl.full([HEADS], -1.0e30, tl.float32)
    weight = tl.zeros([HEADS], tl.float32)

    line_of = r
    slot = tl.load(slots_ptr + r).to(tl.int64)
    if FLAT:
        line_of = slot
    else:
        ring_ptr += slot * ring_page
        ring_scales_ptr += slot * ring_scales_page
    for at in range(begin, end, KEYS):
        j = at + tl.arange(0, KEYS)
        valid = j < end
        windowed = j < in_window
        if FLAT:  # noqa: SIM108  (resolved by the compiler)
            ring_at = first + j.to(tl.int64)
        else:
            ring_at = ((first + j) % RING).to(tl.int64)
        ring_at = tl.where(windowed, ring_at, first)
        place = ring_ptr + ring_at * ring_row
        scales = ring_scales_ptr + ring_at * ring_scales_row
        if MODE != 0:
            entry = j - in_window
            if MODE == 1:
                entry = tl.load(chosen_ptr + r * chosen_row + entry, mask=valid & (j >= in_window), other=0)
                valid = valid & (entry >= 0)
            entry = tl.maximum(entry, 0)
            listed = valid & (j >= in_window)
            page = tl.load(table_ptr + line_of * table_row + entry // PER_PAGE, mask=listed, other=0).to(tl.int64)
            row = (entry % PER_PAGE).to(tl.int64)
            place = tl.where(windowed, place, pool_ptr + page * pool_page + row * pool_row)
            scales = tl.where(windowed, scales, pool_scales_ptr + page * pool_scales_page + row * pool_scales_row)
        bits = valid.to(tl.int64)
        if PACKED:
            place = tl.multiple_of(place, 16)
            scales = tl.multiple_of(scales, 8)
            bits = tl.load(scales.to(tl.pointer_type(tl.int64), bitcast=True), mask=valid, other=0)
        k0 = _key_part(place, bits, valid, 0, W0, NOPE, PACKED, kind)
        s = tl.dot(q0, tl.trans(k0), input_precision="tf32x3")
        if W1 > 0:
            k1 = _key_part(place, bits, valid, W0, W1, NOPE, PACKED, kind)
            s = tl.dot(q1, tl.trans(k1), s, input_precision="tf32x3")
        if W2 > 0:
            k2 = _key_part(place, bits, valid, W0 + W1, W2, NOPE, PACKED, kind)
            s = tl.dot(q2, tl.trans(k2), s, input_precision="tf32x3")
        if PACKED:
            tail = place + NOPE
            tail = tl.multiple_of(tail.to(tl.pointer_type(tl.bfloat16), bitcast=True), 8)
            kr = _key_part(tail, bits, valid, 0, WR, ROPE, False, kind)
        else:
            kr = _key_part(place + NOPE, bits, valid, 0, WR, ROPE, False, kind)
        s = tl.dot(qr, tl.trans(kr), s, input_precision="tf32x3")
        s = tl.where(valid[None, :], s * scale, -1.0e30)
        highest = tl.maximum(peak, tl.max(s, 1))
        fade = tl.exp2(peak - highest)
        p = tl.where(valid[None, :], tl.exp2(s - highest[:, None]), 0.0)
        weight = weight * fade + tl.sum(p, 1)
        peak = highest
        p = p.to(kind)
        a0 = tl.dot(p, k0, a0 * fade[:, None], input_precision="tf32x3")
        if W1 > 0:
            a1 = tl.dot(p, k1, a1 * fade[:, None], input_precision="tf32x3")
        if W2 > 0:
            a2 = tl.dot(p, k2, a2 * fade[:, None], input_precision="tf32x3")
        ar = tl.dot(p, kr, ar * fade[:, None], input_precision="tf32x3")

    line = (r * splits + tl.program_id(1)) * heads + h
    there = h < heads
    factor = tl.full([HEADS, 1], 1.0, tl.float32)
    if WHOLE:
        sink = tl.load(sink_ptr + h, mask=there, other=0.0) * 1.4426950408889634
        highest = tl.maximum(peak, sink)
        fade = tl.exp2(peak - highest)
        factor = (fade / (weight * fade + tl.exp2(sink - highest)))[:, None]
        if RAW:
            ar = _turned_back(ar, cos_ptr + r * (ROPE // 2), sin_ptr + r * (ROPE // 2), ROPE, HEADS, WR)
    else:
        tl.store(peak_ptr + line, peak, mask=there)
        tl.store(weight_ptr + line, weight, mask=there)
    out = part_ptr + line[:, None] * DIM
    _store_part(out, a0 * factor, there, 0, W0, NOPE)
    if W1 > 0:
        _store_part(out, a1 * factor, there, W0, W1, NOPE)
    if W2 > 0:
        _store_part(out, a2 * factor, there, W0 + W1, W2, NOPE)
    _store_part(out + NOPE, ar * factor, there, 0, WR, ROPE)


@triton.jit
def _turned_back(x, cos_ptr, sin_ptr, ROPE: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """x [HEADS, WIDTH], of which ROPE dims count, rotated back."""
    even, odd = tl.split(tl.reshape(x, [HEADS, WIDTH // 2, 2]))
    pair = tl.arange(0, WIDTH // 2)
    cos = tl.load(cos_ptr + pair, mask=pair < ROPE // 2, other=1.0)[None, :]
    sin = tl.load(sin_ptr + pair, mask=pair < ROPE // 2, other=0.0)[None, :]
    return tl.reshape(tl.join(even * cos + odd * sin, odd * cos - even * sin), [HEADS, WIDTH])


@triton.jit
def _store_part(out, x, there, START: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr):
    d = START + tl.arange(0, WIDTH)
    mask = there[:, None]
    if START + WIDTH > END:
        mask = mask & (d < END)[None, :]
    tl.store(out + d[None, :], x.to(out.dtype.element_ty), mask=mask)
