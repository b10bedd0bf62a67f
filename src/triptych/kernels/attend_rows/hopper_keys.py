"""Packed keys on their way into shared memory, for hopper.py: e4m3 in registers, scaled, as bfloat16.

Keys of tile t are scaled while those of t + 1 come into registers, part by part, and those of t + 2 into the L2 cache.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier


@gluon.jit
def _keep_scaled(target, x, bits, START: gl.constexpr, WORDS: gl.constexpr):
    """Write e4m3 words x [64, WORDS], four dims each from START on, times their powers of two to bfloat16 pairs.

    A byte of bits [64] is the exponent of 64 dims. An e4m3 whose bits are moved into place lacks 2^120 in bfloat16; the
    hardware's own conversion goes through float16 and takes an instruction of a quarter of the rate for each value.
    """
    group = (START // 64 + gl.arange(0, WORDS, layout=gl.SliceLayout(0, x.type.layout)) // 16) * 8
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
    target.store(gl.reshape(gl.join(low, high), [x.shape[0], 2 * WORDS]))


@gluon.jit
def _words(place, START: gl.constexpr, WORDS: gl.constexpr, layout: gl.constexpr):
    """Words int32 [64, WORDS] from byte START on of the rows at `place` [64]."""
    d = START // 4 + gl.arange(0, WORDS, layout=gl.SliceLayout(0, layout))
    return gl.load(place[:, None] + d[None, :])


@gluon.jit
def _entry(chosen_ptr, j, in_window, end, MODE: gl.constexpr):
    """Number of the entry that key j is, of those before `end`; anything, -1 even, for window rows."""
    j = gl.maximum(gl.minimum(j, end - 1) - in_window, 0)
    if MODE == 1:
        return gl.load(chosen_ptr + j)
    else:
        return j


@gluon.jit
def _page(table_ptr, entry, MODE: gl.constexpr, PER_PAGE: gl.constexpr):
    """Page of an entry; anything where there are none."""
    if MODE == 0:
        return entry
    else:
        return gl.load(table_ptr + gl.maximum(entry, 0) // PER_PAGE)


@gluon.jit
def _ring_row(first, j, RING: gl.constexpr, FLAT: gl.constexpr):
    """Row of a ring, or of the flat workspace, where the window's key j lies; any row for what is no window key."""
    if FLAT:
        return first + gl.minimum(j, 127).to(gl.int64)
    else:
        return ((first + j) % RING).to(gl.int64)


@gluon.jit
def _place(
    j, first, in_window, ring, entry, page, pool,
    MODE: gl.constexpr, FLAT: gl.constexpr, PER_PAGE: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Where the values and the scales of keys j [64] lie: in a ring, a flat workspace, or the page of an entry."""
    row = _ring_row(first, j, RING, FLAT)
    values = ring[0] + row * ring[1]
    scales = ring[2] + row * ring[3]
    if MODE != 0:
        page, row = page.to(gl.int64), (gl.maximum(entry, 0) % PER_PAGE).to(gl.int64)
        values = gl.where(j < in_window, values, pool[0] + page * pool[1] + row * pool[2])
        scales = gl.where(j < in_window, scales, pool[3] + page * pool[4] + row * pool[5])
    values = gl.multiple_of(values.to(gl.pointer_type(gl.int32), bitcast=True), 16)
    return values, gl.multiple_of(scales.to(gl.pointer_type(gl.int64), bitcast=True), 8)


@gluon.jit
def _in_order():
    """Keep the compiler from moving loads and stores across."""
    gl.inline_asm_elementwise("bar.warp.sync 0xffffffff; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _exchange(target, x, bits, place, START: gl.constexpr, WORDS: gl.constexpr, layout: gl.constexpr):
    """_keep_scaled(x), then ask for the same words of the keys at `place`, which the compiler would do too late."""
    _keep_scaled(target, x, bits, START, WORDS)
    _in_order()
    x = _words(place, START, WORDS, layout)
    _in_order()
    return x


@gluon.jit
def _announce(values, scales):
    """Bring keys at `values` [64] and their scales into the L2 cache; of a key's 576 bytes each of four threads a part.

    A request for every 64 bytes; one for every 32 took longer than it gained.
    """
    L: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [4, 1], [1, 0])
    part = gl.arange(0, 4, layout=gl.SliceLayout(0, L)) * 36
    values = gl.convert_layout(values, gl.SliceLayout(1, L), assert_trivial=True)[:, None] + part[None, :]
    scales = gl.convert_layout(scales, gl.SliceLayout(1, L), assert_trivial=True)[:, None]
    values, scales = gl.broadcast(values, scales)
    gl.inline_asm_elementwise(
        """{
        prefetch.global.L2 [$1];
        prefetch.global.L2 [$1 + 64];
        prefetch.global.L2 [$1 + 128];
        prefetch.global.L2 [$2];
        mov.b32 $0, 0;
        }""",
        "=r,l,l",
        [values.to(gl.int64, bitcast=True), scales.to(gl.int64, bitcast=True)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def fetch(
    begin, end, tiles, first, in_window, chosen_ptr, table_ptr, ring, pool, keys, full, empty,
    MODE: gl.constexpr, FLAT: gl.constexpr, PER_PAGE: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Keys of `tiles` tiles into shared memory, by four warps; a thread has parts of two keys.

    ring: addresses of values and scales and their rows' strides; pool: those and their pages' strides.
    """
    # a quarter of a warp writes parts of two rows, which lie in different banks
    L: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    pairs: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    w0_s = keys[0]._reinterpret(gl.int32, [2, 64, 64], pairs)
    w1_s = keys[1]._reinterpret(gl.int32, [2, 64, 64], pairs)
    w2_s = keys[2]._reinterpret(gl.int32, [2, 64, 64], pairs)
    w3_s = keys[3]._reinterpret(gl.int32, [2, 64, 32], pairs)
    wr_s = keys[4]._reinterpret(gl.int32, [2, 64, 32], pairs)
    j = begin + gl.arange(0, 64, layout=gl.SliceLayout(1, L))
    # entries are known two tiles, pages one tile before places; those a tile before the keys are asked for
    entry = _entry(chosen_ptr, j, in_window, end, MODE)
    entry1 = _entry(chosen_ptr, j + 64, in_window, end, MODE)
    entry2 = _entry(chosen_ptr, j + 128, in_window, end, MODE)
    entry3 = _entry(chosen_ptr, j + 192, in_window, end, MODE)
    page = _page(table_ptr, entry, MODE, PER_PAGE)
    v, s = _place(gl.minimum(j, end - 1), first, in_window, ring, entry, page, pool, MODE, FLAT, PER_PAGE, RING)
    page1 = _page(table_ptr, entry1, MODE, PER_PAGE)
    page2 = _page(table_ptr, entry2, MODE, PER_PAGE)
    bits = gl.load(s)
    x0 = _words(v, 0, 32, L)
    x1 = _words(v, 128, 32, L)
    x2 = _words(v, 256, 32, L)
    x3 = _words(v, 384, 16, L)
    xr = _words(v, 448, 32, L)
    j += 64
    v, s = _place(gl.minimum(j, end - 1), first, in_window, ring, entry1, page1, pool, MODE, FLAT, PER_PAGE, RING)
    _announce(v, s)
    for t in range(tiles):
        slot = t % 2
        j += 64
        v2, s2 = _place(gl.minimum(j, end - 1), first, in_window, ring, entry2, page2, pool, MODE, FLAT, PER_PAGE, RING)
        _announce(v2, s2)
        mbarrier.wait(empty.index(slot), ((t // 2) & 1) ^ 1)
        x0 = _exchange(w0_s.index(slot), x0, bits, v, 0, 32, L)
        x1 = _exchange(w1_s.index(slot), x1, bits, v, 128, 32, L)
        x2 = _exchange(w2_s.index(slot), x2, bits, v, 256, 32, L)
        _keep_scaled(w3_s.index(slot), x3, bits, 384, 16)
        wr_s.index(slot).store(xr)
        tell(full.index(slot))
        x3 = _words(v, 384, 16, L)
        xr = _words(v, 448, 32, L)
        bits = gl.load(s)
        v, s = v2, s2
        entry2 = entry3
        page2 = _page(table_ptr, entry2, MODE, PER_PAGE)
        entry3 = _entry(chosen_ptr, j + 128, in_window, end, MODE)


@gluon.jit
def tell(barrier):
    """Say that this warpgroup has written something which the tensor cores will read."""
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(barrier, count=1)
