"""What FlashMLA's sparse operations do with places, lengths and a plan, in float64: they stand in for the package.

It follows the plan block by block as FlashMLA's programs do, so a plan that leaves out a block, does one twice or
counts splits wrongly gives an error here. Run as a script under Triton's interpreter it prints a JSON line a case.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

BLOCK = 64


def sparse_decode_fwd(*given: Any) -> tuple[Tensor, None, Tensor, Tensor]:
    """Arguments and first result as FlashMLA's operation of this name has them; all places must be given."""
    q, _, places, _, sink, plan, splits, more_kv, more_places, more_lengths, dim, scale, _ = given
    rows, heads = q.shape[0], q.shape[2]
    assert places.shape[2] % BLOCK == 0 and (more_kv is None or more_places.shape[2] % BLOCK == 0)
    near = places.shape[2] // BLOCK
    far = [0] * rows if more_kv is None else (-(-more_lengths // BLOCK)).tolist()
    parts: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    done: dict[int, list[int]] = {b: [] for b in range(rows)}
    for first, last, begin, end, before, cut_first, cut_last in plan[:, :7].tolist():
        for b in range(first, last + 1) if first < rows else ():
            start = begin if b == first else 0
            until = end if b == last else near + far[b]
            whole = not (cut_first if b == first else cut_last if b == last else 0)
            assert whole == (start == 0 and until == near + far[b]), "a flag of the plan is wrong"
            blocks = range(start, until)
            assert blocks, "an empty stretch"
            done[b].extend(blocks)
            split = int(splits[b]) + (before if b == first else 0)
            assert split < int(splits[b + 1]) and (b, split) not in parts, "a split's number is wrong"
            keys = torch.cat([_block(n, near, b, given) for n in blocks])
            scores = q[b, 0].double() @ keys.T * scale
            scores = scores.masked_fill(keys.isnan().any(1), float("-inf"))
            parts[b, split] = torch.logsumexp(scores, 1), torch.softmax(scores, 1).nan_to_num() @ keys.nan_to_num()
    out = torch.zeros(rows, 1, heads, dim, dtype=torch.float64)
    for b in range(rows):
        assert sorted(done[b]) == list(range(near + far[b])), f"row {b} has blocks {sorted(done[b])}"
        mine = [parts[b, n] for n in range(int(splits[b]), int(splits[b + 1]))]
        total = torch.logsumexp(torch.stack([*(weight for weight, _ in mine), sink.double()]), 0)
        out[b, 0] = sum(torch.exp(weight - total)[:, None] * value for weight, value in mine)
    return out.to(q.dtype), None, plan, splits


def sparse_prefill_fwd(*given: Any) -> list[Tensor]:
    """Arguments and first result as FlashMLA's operation of this name has them."""
    q, kv, places, scale, _, sink, lengths, *_ = given
    assert places.shape[2] % (2 * BLOCK) == 0
    out = torch.zeros_like(q)
    for r, count in enumerate(lengths.tolist()):
        keys = kv[places[r, 0, :count].long(), 0].double()
        scores = torch.cat([q[r].double() @ keys.T * scale, sink.double()[:, None]], 1)
        out[r] = (torch.softmax(scores, 1)[:, :-1] @ keys).to(q.dtype)
    return [out]


def _block(n: int, near: int, b: int, given: tuple[Any, ...]) -> Tensor:
    """Keys [64, 512] of one block of a row, NaN where there is none."""
    _, kv, places, _, _, _, _, more_kv, more_places, more_lengths, *_ = given
    if n < near:
        mine, pool = places[b, 0, n * BLOCK : (n + 1) * BLOCK].clone(), kv
    else:
        at = torch.arange((n - near) * BLOCK, (n - near + 1) * BLOCK)
        mine, pool = more_places[b, 0, at].clone(), more_kv
        mine[at >= more_lengths[b]] = -1
    keys = torch.full((BLOCK, 512), float("nan"), dtype=torch.float64)
    there = mine >= 0
    keys[there] = read(pool, mine[there].long())
    return keys


def read(view: Tensor, places: Tensor) -> Tensor:
    """float64 [n, 512] of rows of FlashMLA's pages: values of all rows, then scales of all rows."""
    per_page, row = view.shape[1], view.shape[3]
    assert row == 584 and view.stride() == (view.stride(0), 584, 584, 1)
    page, at = places // per_page, places % per_page
    memory = torch.as_strided(view, (view.untyped_storage().nbytes(),), (1,), 0)
    base = view.storage_offset() + page * view.stride(0)
    values = memory[(base + at * 576)[:, None] + torch.arange(576)]
    scales = memory[(base + per_page * 576 + at * 8)[:, None] + torch.arange(7)]
    nope = values[:, :448].contiguous().view(torch.float8_e4m3fn).double()
    nope *= torch.exp2(scales.double() - 127).repeat_interleave(64, 1)
    return torch.cat([nope, values[:, 448:].contiguous().view(torch.bfloat16).double()], 1)


def main() -> None:
    """Rows of every kind, with more programs than rows and fewer, and steps in slices, against the references."""
    import packed_cases as cases
    from interpreter_rounding import round_as_hardware

    from triptych.kernels.attend_rows import vendor, vendor_chunks
    from triptych.kernels.quant.formats import RowFormat

    round_as_hardware()
    vendor.load = lambda: sparse_decode_fwd  # type: ignore[assignment]
    form = RowFormat("entry", 512, 64)
    for kind in ("csa", "hca", "swa"):
        for programs, visible in ((132, [700, 3, 64, 0, 65]), (3, [130, 0, 7, 64, 64, 1]), (4, [64] * 8), (132, [260])):
            vendor.multiprocessors = lambda device, programs=programs: programs  # type: ignore[assignment]
            case = cases.decode_case(kind, visible, 8, form, 128, "cpu")
            far = cases.decode_error(vendor.by_flash_mla(*case), case)
            print(json.dumps({"what": f"{kind} {visible} by {programs}", "ok": far < 5e-3, "error": far}))
        case = cases.heads_case(kind, 7, 150, 8, form, 96, "cpu")
        vendor_chunks._PLACES = 1024
        got = vendor_chunks.by_flash_mla(sparse_prefill_fwd, *case)
        far = cases.heads_error(got, case)
        print(json.dumps({"what": f"{kind} steps", "ok": far < 5e-3, "error": far}))


if __name__ == "__main__":
    main()
