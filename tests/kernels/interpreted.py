"""Runs in a process of its own, with Triton's interpreter: every Triton kernel against its reference, as JSON lines."""

from __future__ import annotations

import importlib
import json
from typing import Any, Literal

import torch
from interpreter_rounding import round_as_hardware

from triptych.kernels import inputs
from triptych.kernels.front import ref as front_ref
from triptych.kernels.front import triton as front
from triptych.kernels.index import triton as index
from triptych.kernels.mhc import triton as mhc
from triptych.kernels.moe import pairs
from triptych.kernels.moe.ref import Router, route
from triptych.kernels.moe.router import route_few
from triptych.kernels.moe.sorted import place_and_round
from triptych.kernels.quant.formats import PackedRows, RowFormat, packed
from triptych.kernels.quant.matrices import BothRows, Fp8Rows, quantize_rows
from triptych.kernels.quant.ref import fake_quant_fp8
from triptych.kernels.registry import FIXED, FOLDER, table
from triptych.kernels.verify import verify


def sorted_in_one() -> bool:
    """Few pairs in one launch, against the library's sort of many."""
    ok, few = True, pairs._FEW
    for rows, k, count, tile in ((1, 1, 4, 64), (1, 6, 256, 64), (3, 6, 8, 4), (21, 6, 16, 16), (16, 8, 100, 4)):
        ids = torch.stack([torch.randperm(count)[:k] for _ in range(rows)])
        pairs._FEW = few
        got = pairs.sorted_pairs(ids, count, tile)
        pairs._FEW = 0
        want = pairs.sorted_pairs(ids, count, tile)
        ok &= got.tiles == want.tiles and all(torch.equal(a, b) for a, b in zip(got[:3], want[:3], strict=True))
    pairs._FEW = few
    return ok


def main() -> None:
    """One line for each operation and size, and one for the tie rule of the selection."""
    round_as_hardware()
    for row in table("auto", device="cuda"):
        if row.backend == "triton":
            for rows in (1, 3, 17):
                result = verify(row.op, "triton", rows, rows)
                print(json.dumps({"what": f"{row.op} {rows}", "ok": result.ok, "error": result.error}))
    for row in table("auto", device="cuda", deterministic=True):
        file = "fixed" if row.op in FIXED.get(FOLDER[row.op], ()) else "triton"
        module = importlib.import_module(f"triptych.kernels.{FOLDER[row.op]}.{file}")
        if file == "fixed" or hasattr(module, row.op + "_deterministic"):
            result = verify(row.op, file, 9, 9, deterministic=file != "fixed")
            print(json.dumps({"what": f"{row.op} fixed", "ok": result.ok, "error": result.error}))
    for kind in ("fp8", "mxfp4"):
        for rows in (1, 3, 6, 17):
            print(json.dumps({"what": f"native {kind} {rows}", "ok": native_front(kind, rows), "error": 0.0}))
    print(json.dumps({"what": "pairs sorted in one launch", "ok": sorted_in_one(), "error": 0.0}))
    for rounded in (rounded_site, rounded_query):
        print(json.dumps({"what": rounded.__name__, "ok": rounded(1) and rounded(5), "error": 0.0}))
    index.SCORES = 256  # a few rows at a time
    result = verify("select_entries", "triton", 17, 17)
    print(json.dumps({"what": "select_entries in parts", "ok": result.ok, "error": result.error}))
    _routing()
    scores = torch.randint(0, 4, (5, 5000), generator=torch.Generator().manual_seed(0)).float()
    visible = torch.tensor([5000, 4999, 2049, 30, 0])
    scores.masked_fill_(torch.arange(5000) >= visible.unsqueeze(1), float("-inf"))
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :600]
    order = torch.where(order < visible.unsqueeze(1), order, 9999).sort(dim=1).values
    want = torch.where(order < 9999, order, -1)
    got = index.highest(scores, visible, 600)
    print(json.dumps({"what": "ties", "ok": bool((got == want).all()), "error": 0.0}))


def _routing() -> None:
    """A line for each way of handing rows to experts."""
    for hashed in (False, True):
        for rows in (1, 2, 17, 40, 70):
            print(json.dumps({"what": f"router of {rows} rows, {hashed}", "ok": routed(rows, hashed), "error": 0.0}))
    for rows in (3, 90):
        print(json.dumps({"what": f"places of {rows} rows", "ok": placed(rows), "error": 0.0}))


def routed(rows: int, hashed: bool) -> bool:
    """True if rows get the reference's experts and weights, and lists that have every pair once, by expert; what a row
    of NaN gets matters to no other."""
    draw = torch.Generator().manual_seed(rows)
    count, k, dim, most = 20, 3, 256, 4
    table = torch.stack([torch.randperm(count, generator=draw)[:k] for _ in range(9)]) if hashed else None
    bias = None if hashed else torch.randn(count, generator=draw)
    router = Router(torch.randn(count, dim, generator=draw) / 16, bias, table, k, 1.5)
    x = torch.randn(rows, dim, generator=draw).to(torch.bfloat16)
    whole = torch.arange(rows) != (rows // 2 if rows > 20 else -1)
    x[~whole] = float("nan")
    tokens = torch.randint(0, 9, (rows,), generator=draw)
    counters = torch.zeros(1 + count, dtype=torch.int32)
    weights, tile, order, rounded = route_few(
        x, token_ids=tokens, router=router, n=most, tiles=rows * k, counters=counters
    )
    ids, want = route(x, tokens, router)
    ok = torch.allclose(weights[whole], want[whole], rtol=1e-5) and not counters.any()
    listed = _pairs(tile, order)
    experts = torch.tensor([expert for expert, _ in sorted(listed, key=lambda both: both[1])]).view(rows, k)
    ok = ok and sorted(pair for _, pair in listed) == list(range(rows * k)) and torch.equal(experts[whole], ids[whole])
    ok = ok and bool((tile[tile[:, 0] >= 0, 2] <= most).all())
    return ok and torch.equal(rounded.dequantize()[whole], fake_quant_fp8(x.float())[whole])


def _pairs(tile: torch.Tensor, order: torch.Tensor) -> list[tuple[int, int]]:
    """Expert and pair, as lists in tiles have them."""
    used = [t for t in tile.tolist() if t[0] >= 0]
    return [(expert, pair) for expert, first, size in used for pair in order.flatten()[first : first + size].tolist()]


def rounded_site(rows: int) -> bool:
    """True if a site hands over its rows and the same rows rounded, to the bit."""
    draw, dim = torch.Generator().manual_seed(rows), 384
    fn, norm = torch.randn(24, 4 * dim, generator=draw), torch.randn(dim, generator=draw)
    site = inputs._site(draw)._replace(fn=fn, rounds=True)
    x, *_ = mhc.mhc_first(torch.arange(rows), torch.randn(rows, dim, generator=draw), site, norm)
    return isinstance(x, BothRows) and _same(x.rounded, quantize_rows(x.plain))


def rounded_query(rows: int) -> bool:
    """True if a front end rounds the low-rank query that it would otherwise give, to the bit."""
    product, weights, *rest = _packed_front("fp8", rows)
    wide = torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows))
    lacking = 256 - len(weights.q_norm)
    columns = {name: getattr(weights, name) + lacking for name in ("compress_at", "index_at")}
    weights = weights._replace(q_norm=torch.ones(256), heads=tuple(h + lacking for h in weights.heads), **columns)
    product = torch.cat([wide, product[:, 256 - lacking :]], dim=1)
    plain, _ = front.front_rows(product, weights, *rest)
    got, _ = front.front_rows(product, weights._replace(rounds=True), *rest)
    return isinstance(got, Fp8Rows) and _same(got, quantize_rows(plain))


def _same(one: Fp8Rows, other: Fp8Rows) -> bool:
    """Equal to the bit."""
    values = torch.equal(one.values.view(torch.uint8), other.values.view(torch.uint8))
    return values and torch.equal(one.scales, other.scales)


def placed(rows: int) -> bool:
    """True if every pair has a place of its own, in one piece of its expert, with its row rounded and its weight."""
    draw = torch.Generator().manual_seed(rows)
    count, k, dim = 5, 2, 256
    ids = torch.stack([torch.randperm(count, generator=draw)[:k] for _ in range(rows)])
    ids[:, 0] = ids[:, 0].clamp(max=1)  # so that an expert has more than a piece's pairs, and some may have none
    x, weights = torch.randn(rows, dim, generator=draw), torch.rand(rows, k, generator=draw)
    place, gates, (values, scales), pieces = place_and_round(x, ids, weights, count)
    listed = [
        (e, at)
        for some in pieces
        for e, first, size in some.table[: int(some.total)].tolist()
        for at in range(first, first + size)
    ]
    experts = ids.flatten()[place.flatten().argsort()].tolist()
    ok = sorted(listed, key=lambda both: both[1]) == list(zip(experts, range(rows * k), strict=True))
    slot = torch.arange(128)
    slot = slot // 8 % 4 * 32 + slot // 4 % 2 * 16 + slot // 32 * 4 + slot % 4
    rounded = values.float().view(rows * k, -1, 128)[..., slot] * scales.T[: rows * k].unsqueeze(2)
    at = place.long()
    ok = ok and torch.equal(gates[at], weights)
    return ok and torch.equal(rounded.flatten(1)[at], fake_quant_fp8(x).unsqueeze(1).expand(-1, k, -1))


def native_front(kind: Literal["fp8", "mxfp4"], rows: int) -> bool:
    """True if the bytes that a native front end writes to packed caches are the reference's."""
    one, two = _packed_front(kind, rows), _packed_front(kind, rows)
    got, want = front.front_rows(*two), front_ref.front_rows(*one)
    same = all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for a, b in zip(one[2], two[2], strict=True):
        if isinstance(a, PackedRows):
            same &= torch.equal(a.values, b.values) and torch.equal(a.scales, b.scales)
        elif isinstance(a, torch.Tensor):
            same &= torch.equal(a, b)
    return same


def _packed_front(kind: Literal["fp8", "mxfp4"], rows: int) -> tuple[Any, ...]:
    """Inputs of front_rows with packed caches, which hold a byte that nothing writes."""
    product, weights, caches, where, angles = inputs._front_rows(rows, torch.Generator().manual_seed(rows), True)

    def pool(pages: int, count: int, form: RowFormat, stretch: int | None = None) -> PackedRows:
        memory = torch.full((pages, count * form.row_bytes + 32), 7, dtype=torch.uint8)
        return packed(memory, 16, count, form, stretch)

    entry = RowFormat("entry", caches.window.shape[1], inputs.ROPE)
    slots = len(caches.window) // caches.window_stride + 1
    caches = caches._replace(window=pool(slots, caches.ring, entry, caches.window_stride))
    if caches.entries is not None:
        caches = caches._replace(entries=pool(*caches.entries.shape[:2], entry))
    if caches.index_keys is not None:
        pages, count, dim = caches.index_keys.shape
        caches = caches._replace(index_keys=pool(pages, count, RowFormat(kind, dim)))
    return product, weights, caches, where, angles


if __name__ == "__main__":
    main()
