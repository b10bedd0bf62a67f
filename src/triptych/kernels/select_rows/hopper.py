"""Scores of packed index keys for Hopper, in Gluon: keys stream through shared memory to the FP8 tensor cores.

    shared memory   queries 64 x 128 e4m3 | keys, STAGES tiles of 128 as they lie in pages | their scales
                    | MXFP4 only: a tile of 128 x 128 e4m3

One warpgroup takes a row's stretch of keys, a tile at a time, while copies of the next tiles are under way. Keys that
lie beyond what the row sees read as its last one.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def copy_tile(
    target,
    scales_target,
    page,
    g,
    values_at,
    values_page,
    values_row,
    page1,
    g1,
    scales_at,
    scales_page,
    scales_row,
    PER_PAGE: gl.constexpr,
    BYTES: gl.constexpr,
    layout: gl.constexpr,
):
    """Begin to copy values [128, BYTES] of keys g in pages `page`, and a word of scales of each."""
    place = values_at + page * values_page + (g % PER_PAGE).to(gl.int64) * values_row
    place = gl.multiple_of(place, 16)
    d = gl.arange(0, BYTES, layout=gl.SliceLayout(0, layout))
    async_copy.async_copy_global_to_shared(target, place[:, None] + d[None, :])
    word = scales_at + page1 * scales_page + (g1 % PER_PAGE).to(gl.int64) * scales_row
    word = gl.multiple_of(word, 4).to(gl.pointer_type(gl.int32), bitcast=True)
    async_copy.async_copy_global_to_shared(scales_target, word)
    async_copy.commit_group()


@gluon.jit
def pages_of(table_ptr, g, PER_PAGE: gl.constexpr):
    """Pages of keys g."""
    return gl.load(table_ptr + g // PER_PAGE).to(gl.int64)


@gluon.jit
def unpacked_to(target, source, words, layout: gl.constexpr):
    """Write a tile of MXFP4 keys to `target` as e4m3, each over the largest scale of its key times 2^6.

    words [128] are a key's four e8m0 codes. A byte permutation looks magnitudes up, four a time, in the 8 bytes of
    0 .. 6 times 2^6 whose exponents are lowered by the distance of the group's scale to the largest one.
    """
    x = source._reinterpret(gl.int32, [128, 16], gl.SwizzledSharedLayout(4, 1, 4, [1, 0])).load(layout)
    c0 = words & 255
    c1 = (words >> 8) & 255
    c2 = (words >> 16) & 255
    c3 = (words >> 24) & 255
    most = gl.maximum(gl.maximum(c0, c1), gl.maximum(c2, c3))
    group = (gl.arange(0, 16, layout=gl.SliceLayout(0, layout)) // 4)[None, :] * 8
    below = most[:, None] - ((words[:, None] >> group) & 255)
    near = below <= 11  # what lies further below the largest is less than its last bit
    step = below * 0x08080808
    low = gl.where(near, 0x6C686000 - (step & -256), 0)
    high = gl.where(near, 0x7C787470 - step, 0)
    first, second = gl.inline_asm_elementwise(
        """{
        .reg .b32 s, t, u, z;
        mov.b32 z, 0x00008000;
        and.b32 s, $2, 0x77777777;
        shr.u32 t, $2, 3;
        and.b32 t, t, 0x11111111;
        prmt.b32 $0, $3, $4, s;
        prmt.b32 u, z, z, t;
        or.b32 $0, $0, u;
        shr.u32 s, s, 16;
        shr.u32 t, t, 16;
        prmt.b32 $1, $3, $4, s;
        prmt.b32 u, z, z, t;
        or.b32 $1, $1, u;
        }""",
        "=&r,=&r,r,r,r",
        [x, low, high],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    target.store(gl.reshape(gl.join(first, second), [128, 32]))
    return most


@gluon.jit(do_not_specialize=["table_row", "count"])  # which differ from step to step
def scores(  # noqa: C901  (branches that the compiler resolves)
    q_ptr,
    power_ptr,
    weight_ptr,
    weight_row,
    pool_ptr,
    pool_page,
    pool_row,
    scales_ptr,
    scales_page,
    scales_row,
    table_ptr,
    table_row,
    seq_ptr,
    visible_ptr,
    out_ptr,
    tops_ptr,
    total,
    heads,
    stretch,
    count,
    KIND: gl.constexpr,
    PER_PAGE: gl.constexpr,
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
):
    """Ordered scores of ROWS of the `count` rows, see triton.py; q [R, heads, 128] e4m3 lacks 2^power [R, heads].

    Rows of one sequence share each tile of keys; those of several take turns.
    """
    r = gl.program_id(1).to(gl.int64) * ROWS
    begin = gl.program_id(0) * stretch
    seq = gl.load(seq_ptr + r)
    longest = gl.load(visible_ptr + r).to(gl.int32)
    turns = 1
    for n in gl.static_range(1, ROWS):
        other = gl.minimum(r + n, count - 1)
        longest = gl.maximum(longest, gl.load(visible_ptr + other).to(gl.int32))
        if gl.load(seq_ptr + other) != seq:
            turns = ROWS
    if begin >= longest:
        return
    BYTES: gl.constexpr = 128 if KIND == 1 else 64
    copied: gl.constexpr = gl.BlockedLayout([1, 16], [512 // BYTES, BYTES // 16], [4, 1], [1, 0])
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    eight: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 4, [1, 0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    unpacked: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 32])
    by_key: gl.constexpr = gl.SliceLayout(1, s_layout)
    q_s = gl.allocate_shared_memory(gl.uint8, [ROWS, 64, 128], eight)
    weights_s = gl.allocate_shared_memory(gl.float32, [ROWS, 64], flat)
    scales_s = gl.allocate_shared_memory(gl.int32, [STAGES, 128], flat)
    if KIND == 1:
        keys_s = gl.allocate_shared_memory(gl.uint8, [STAGES, 128, 128], eight)
    else:
        keys_s = gl.allocate_shared_memory(gl.uint8, [STAGES, 128, 64], plain)
        wide_s = gl.allocate_shared_memory(gl.uint8, [128, 128], eight)

    by_query: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    h = gl.arange(0, 64, layout=gl.SliceLayout(1, by_query))
    d = gl.arange(0, 128, layout=gl.SliceLayout(0, by_query))
    hw = gl.arange(0, 64, layout=line)
    for n in gl.static_range(ROWS):
        row = gl.minimum(r + n, count - 1)
        q = gl.load(q_ptr + (row * heads + h)[:, None] * 128 + d[None, :], mask=(h < heads)[:, None], other=0)
        q_s.index(n).store(q)
        power = gl.load(power_ptr + row * heads + hw, mask=hw < heads, other=0)
        weight = gl.load(weight_ptr + row * weight_row + hw, mask=hw < heads, other=0.0)
        weights_s.index(n).store(weight * ((127 + power) << 23).to(gl.float32, bitcast=True))
    fence_async_shared()
    rows = gl.arange(0, 128, layout=gl.SliceLayout(1, copied))
    rows1 = gl.arange(0, 128, layout=line)
    none = gl.zeros([128, 64], gl.float32, layout=s_layout)
    i = gl.arange(0, 128, layout=by_key)
    for turn in range(turns):
        visible = longest
        if turns > 1:
            visible = gl.load(visible_ptr + gl.minimum(r + turn, count - 1)).to(gl.int32)
        last = gl.maximum(visible - 1, 0)
        line_ptr = table_ptr + gl.load(seq_ptr + gl.minimum(r + turn, count - 1)).to(gl.int64) * table_row
        tiles = gl.maximum(gl.minimum(begin + stretch, visible) - begin + 127, 0) // 128
        for stage in gl.static_range(STAGES - 1):
            g = gl.minimum(begin + stage * 128 + rows, last)
            g1 = gl.minimum(begin + stage * 128 + rows1, last)
            copy_tile(
                *(keys_s.index(stage), scales_s.index(stage), pages_of(line_ptr, g, PER_PAGE), g, pool_ptr, pool_page),
                *(pool_row, pages_of(line_ptr, g1, PER_PAGE), g1, scales_ptr, scales_page, scales_row),
                *(PER_PAGE, BYTES, copied),
            )
        g = gl.minimum(begin + (STAGES - 1) * 128 + rows, last)
        g1 = gl.minimum(begin + (STAGES - 1) * 128 + rows1, last)
        page = pages_of(line_ptr, g, PER_PAGE)
        page1 = pages_of(line_ptr, g1, PER_PAGE)
        for t in range(tiles):
            at = begin + t * 128
            async_copy.wait_group(STAGES - 2)
            gl.thread_barrier()
            if KIND == 1:
                fence_async_shared()
                keys = keys_s.index(t % STAGES)._reinterpret(gl.float8e4nv, [128, 128], eight)
                factor = scales_s.index(t % STAGES).load(by_key).to(gl.float32, bitcast=True)
            else:
                words = scales_s.index(t % STAGES).load(gl.SliceLayout(1, unpacked))
                target = wide_s._reinterpret(
                    gl.int32, [128, 32], gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
                )
                most = unpacked_to(target, keys_s.index(t % STAGES), words, unpacked)
                fence_async_shared()
                keys = wide_s._reinterpret(gl.float8e4nv, [128, 128], eight)
                factor = gl.convert_layout((gl.maximum(most - 6, 1) << 23).to(gl.float32, bitcast=True), by_key)
            if t + STAGES - 1 < tiles:
                slot = (t + STAGES - 1) % STAGES
                copy_tile(
                    *(keys_s.index(slot), scales_s.index(slot), page, g, pool_ptr, pool_page, pool_row, page1, g1),
                    *(scales_ptr, scales_page, scales_row, PER_PAGE, BYTES, copied),
                )
            else:
                async_copy.commit_group()
            g = gl.minimum(at + STAGES * 128 + rows, last)
            g1 = gl.minimum(at + STAGES * 128 + rows1, last)
            page = pages_of(line_ptr, g, PER_PAGE)
            page1 = pages_of(line_ptr, g1, PER_PAGE)
            for n in gl.static_range(ROWS):
                queries = q_s.index(n)._reinterpret(gl.float8e4nv, [64, 128], eight).permute((1, 0))
                token = warpgroup_mma(keys, queries, none, use_acc=False, is_async=True)
                scale = weights_s.index(n).load(gl.SliceLayout(0, s_layout))[None, :]
                s = warpgroup_mma_wait(0, deps=(token,))
                s = gl.sum(gl.maximum(s, 0.0) * scale, 1) * factor
                mine = (r + n < count) & ((turns == 1) | (turn == n))
                sees = gl.load(visible_ptr + gl.minimum(r + n, count - 1)).to(gl.int32)
                _keep(out_ptr, tops_ptr, s, at, i, (r + n) * total, mine, sees)
        async_copy.wait_group(0)
        gl.thread_barrier()


@gluon.jit
def _keep(out_ptr, tops_ptr, s, at, i, start, mine, visible):
    """Write scores s [128] of keys from `at` on as ordered integers, and the highest of each 16, if `mine`."""
    per16: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    bits = gl.where(s == 0.0, 0.0, s).to(gl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    order = gl.where(at + i < visible, order, -2147483648)
    order = gl.convert_layout(order, per16)
    keys = gl.arange(0, 128, layout=per16)
    gl.store(out_ptr + start + at + keys, order, mask=(at + keys >= 0) & mine)
    top = gl.max(gl.reshape(order, [8, 16]), 1)
    eighth = gl.arange(0, 8, layout=top.type.layout)
    gl.store(tops_ptr + (start + at) // 16 + eighth, top, mask=(eighth >= 0) & mine)
