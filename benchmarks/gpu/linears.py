"""FP8 linears on one GPU: correctness against the references, then time with floors.

`python -m benchmarks.gpu.linears check|time|sweep` prints a table and writes result rows to $OUT/linears.jsonl.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.experts import READ, fp8, replayed
from triptych.kernels.linear import ref
from triptych.kernels.linear.many import product
from triptych.kernels.linear.triton import front_linear, grouped_linear, linear, quantize
from triptych.kernels.quant.matrices import BothRows, FrontMatrix, quantize_rows

FP8 = 1.475e15  # operations a second, measured on an H200
# outputs and inputs: query of a CSA layer, output, shared experts; and the front's latent and rest
SHAPES = {"query": (40960, 1024), "o_b": (4096, 8192), "w13": (4096, 4096), "w2": (4096, 2048)}
SWEEP = (
    *((64, 128, 4, 3, 16), (64, 128, 4, 4, 16), (64, 128, 4, 3, 32), (64, 128, 4, 3, 8)),
    *((128, 64, 4, 3, 8), (128, 64, 4, 3, 16), (64, 64, 4, 4, 16)),
)
"""Rows, columns, warps, stages, and bands of tiles that share rows."""
FRONT = (1536, 2624, 4096)


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def check() -> bool:
    """Norm-relative errors; quantisation to the bit."""
    good = True

    def say(what: str, error: float, limit: float) -> None:
        nonlocal good
        good &= error < limit
        print(f"{what:32} {error:.2e} {'ok' if error < limit else 'WRONG'}", flush=True)

    x = torch.randn(333, 4096, device="cuda").bfloat16() * torch.logspace(-6, 3, 333, device="cuda")[:, None]
    x = x.bfloat16()
    fast, slow = quantize(x), quantize_rows(x)
    same = torch.equal(fast.values.view(torch.uint8), slow.values.view(torch.uint8))
    say("quantize, bits", 0.0 if same and torch.equal(fast.scales, slow.scales) else 1.0, 0.5)
    front = FrontMatrix(fp8(1536, 4096), torch.randn(2624, 4096, device="cuda").bfloat16() / 64)
    grouped = fp8(8, 1024, 4096)
    for rows in (1, 3, 8, 16, 17, 32, 33, 64, 128, 257, 1000):
        for name, (n, k) in SHAPES.items():
            w, x = fp8(n, k), torch.randn(rows, k, device="cuda").bfloat16()
            torch.full((1 << 24,), float("nan"), device="cuda")
            got = linear(x, w)
            say(f"{name} {rows}", _error(got, ref.linear(x, w)) + float(not torch.equal(got, linear(x, w))), 5e-3)
        x = torch.randn(rows, 4096, device="cuda").bfloat16()
        say(f"front {rows}", _error(front_linear(x, front), ref.front_linear(x, front)), 5e-3)
        x = torch.randn(rows, 8, 4096, device="cuda").bfloat16()
        say(f"grouped {rows}", _error(grouped_linear(x, grouped), ref.grouped_linear(x, grouped)), 5e-3)
    return good


def time() -> None:
    """Microseconds of the products, their inputs rounded already, weights rotating through more than the L2."""
    print(torch.cuda.get_device_name(), "\nwhat     rows       us    floor  share  TFLOP/s", flush=True)
    with Path(os.environ.get("OUT", "."), "linears.jsonl").open("a", encoding="utf-8") as file:
        for rows in (1, 8, 16, 64, 8192, 32, 128, 2048):
            for name in (*SHAPES, "front", "grouped"):
                n, k = {**SHAPES, "front": (FRONT[0] + FRONT[1], FRONT[2]), "grouped": (8192, 4096)}[name]
                many = 2 if rows > 1000 else max(3, (200 << 20) // (n * k))
                calls = [_call(name, n, k, rows) for _ in range(many)]
                took = replayed(calls, 5)
                size = n * k + (FRONT[1] * k if name == "front" else 0)
                work = 2 * rows * n * k
                floor = max(size / READ, work / FP8) * 1e6
                row = {"what": name, "rows": rows, "us": round(took, 1), "floor_us": round(floor, 1)}
                row |= {"share": round(floor / took, 3), "tflops": round(work / took / 1e6)}
                print("{what:8} {rows:4} {us:8.1f} {floor_us:8.1f} {share:6.0%} {tflops}".format(**row), flush=True)
                file.write(json.dumps({"benchmark": "gpu.linears", **row}) + "\n")


def sweep() -> None:
    """Tiles of the product of many rows."""
    rows, n, k = 8192, 4096, 8192
    x, w = quantize(torch.randn(rows, k, device="cuda").bfloat16()), fp8(n, k)
    out, none = torch.empty(rows, n, dtype=torch.bfloat16, device="cuda"), torch.empty(0, device="cuda")
    count = torch.zeros(1, dtype=torch.int32, device="cuda")
    for tall, wide, warps, stages, share in SWEEP:
        blocks = -(-rows // tall) * -(-n // wide)
        call = partial(
            product[(blocks, 1)],
            *(x.values, x.scales, w.values, w.scales, out, none, count, rows, n, k, *x.scales.stride(), n),
            SPLIT=1,
            TALL=tall,
            WIDE=wide,
            SHARE=share,
            NARROW=False,
            num_warps=warps,
            num_stages=stages,
        )
        took = replayed([call], 5)
        print(
            tall, wide, warps, stages, share, f"{took:.0f} us {2 * rows * n * k / took / 1e6:.0f} TFLOP/s", flush=True
        )


def _call(name: str, n: int, k: int, rows: int) -> partial[Any]:
    if name == "grouped":
        x = torch.randn(rows, 8, k, device="cuda").bfloat16()
        return partial(grouped_linear, x, fp8(8, n // 8, k), rounds=True)
    x = torch.randn(rows, k, device="cuda").bfloat16()
    if name == "front":
        rest = torch.randn(FRONT[1], k, device="cuda").bfloat16()
        return partial(front_linear, BothRows(x, quantize(x)), FrontMatrix(fp8(FRONT[0], k), rest))
    weight = fp8(n, k)
    return partial(linear, quantize(x), weight)


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(1 if {"check": check, "time": time, "sweep": sweep}[sys.argv[1]]() is False else 0)
