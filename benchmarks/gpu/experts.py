"""Mixture of experts from released weights on one GPU: correctness against the references, then time and its floor.

    python -m benchmarks.gpu.experts check|check_many|time

Prints what it finds; `python -m benchmarks.gpu.table` keeps the times of decode rows.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.peers import Marlin
from benchmarks.gpu.timing import FP8, READ, Figures, against, timed
from triptych.kernels.moe import ref
from triptych.kernels.moe.ref import Experts, Router
from triptych.kernels.moe.triton import experts, moe_rows
from triptych.kernels.quant.matrices import Fp8Matrix, Mxfp4Matrix
from triptych.kernels.quant.ref import fake_quant_fp8

SHAPES = {"flash": (4096, 2048, 256), "pro": (7168, 3072, 384)}


def mxfp4(*size: int) -> Mxfp4Matrix:
    """A random stack [E, N, K] on the GPU, of values around 1 / sqrt(K)."""
    *outer, n, k = size
    values = torch.randint(0, 256, (*outer, n, k // 2), dtype=torch.uint8, device="cuda")
    scales = torch.randint(116, 121, (*outer, n, k // 32), dtype=torch.uint8, device="cuda")
    return Mxfp4Matrix(values, scales)


def fp8(*size: int) -> Fp8Matrix:
    """A random FP8 matrix [.., N, K]."""
    *outer, n, k = size
    values = torch.empty(size, dtype=torch.float8_e4m3fn, device="cuda")
    values.copy_(torch.randn(size, device="cuda", dtype=torch.bfloat16))
    scales = 2.0 ** torch.randint(-7, -4, (*outer, n // 128, k // 128), device="cuda")
    return Fp8Matrix(values, scales.float())


def layer(
    name: str, experts: int | None = None, hashed: bool = False
) -> tuple[Router, Experts, tuple[Fp8Matrix, Fp8Matrix]]:
    """Random weights of one layer."""
    dim, inner, count = SHAPES[name]
    count = experts or count
    gate = torch.randn(count, dim, device="cuda").bfloat16().float() * dim**-0.5
    bias = torch.randn(count, device="cuda") * 0.01
    table = torch.stack([torch.randperm(count, device="cuda")[:6] for _ in range(512)]) if hashed else None
    router = Router(gate, None if hashed else bias, table, 6, 1.5)
    moe = Experts(mxfp4(count, 2 * inner, dim).in_tiles(True), mxfp4(count, dim, inner).in_tiles(False), 10.0)
    return router, moe, (fp8(2 * inner, dim), fp8(dim, inner))


def check() -> bool:
    """Norm-relative error against the references, twice on the same memory: the second must be equal to the bit."""
    good = True
    for name in ("flash", "pro"):
        for rows in (1, 2, 7, 8, 33, 64, 100, 128):
            router, moe, shared = layer(name, 32 if rows > 8 else 48, hashed=rows in (2, 33))
            x = torch.randn(rows, SHAPES[name][0], device="cuda").bfloat16()
            tokens = torch.randint(0, 512, (rows,), device="cuda")
            torch.full((1 << 26,), float("nan"), device="cuda")  # what the scratch is made of
            got = moe_rows(x, tokens, router, moe, shared)
            again = moe_rows(x, tokens, router, moe, shared)
            want = ref.moe_rows(x, tokens, router, moe, shared)
            error = float((got.double() - want.double()).norm() / want.double().norm())
            same = torch.equal(got, again)
            fine = error < 1.2e-2 and same  # hidden values lie an e4m3 step off where a sum is a little off
            good &= fine
            print(f"{name:6} {rows:4} error {error:.2e} repeatable {same} {'ok' if fine else 'WRONG'}", flush=True)
    return good


def check_many() -> bool:
    """The prefill path: norm-relative error, and equal to the bit when repeated."""
    good = True
    for name in ("flash", "pro"):
        router, moe, _ = layer(name, 24)
        for rows in (1, 40, 700, 2000):
            x = fake_quant_fp8(torch.randn(rows, SHAPES[name][0], device="cuda").bfloat16().float())
            ids, weights = ref.route(x, torch.zeros(rows, dtype=torch.int64, device="cuda"), router)
            torch.full((1 << 26,), float("nan"), device="cuda")
            got = experts(x, ids, weights, moe, fake_quant_fp8)
            same = torch.equal(got, experts(x, ids, weights, moe, fake_quant_fp8))
            want = ref.experts(x, ids, weights, moe, fake_quant_fp8)
            error = float((got.double() - want.double()).norm() / want.double().norm())
            fine = error < 8e-3 and same
            good &= fine
            print(f"{name:6} many {rows:5} error {error:.2e} repeatable {same} {'ok' if fine else 'WRONG'}", flush=True)
    return good


def time_many(name: str, rows: int, router: Router, moe: Experts) -> Figures:
    """Routed experts of a prefill chunk, with sorting, rounding and adding up."""
    dim, inner, _ = SHAPES[name]
    x = torch.randn(rows, dim, device="cuda").bfloat16()
    ids, weights = ref.route(x.float(), torch.zeros(rows, dtype=torch.int64, device="cuda"), router)
    us = timed([partial(experts, x, ids, weights, moe, fake_quant_fp8)], launches=1)
    work = 6 * rows * 6 * dim * inner
    return {**against(work / FP8 * 1e6, us), "tflops": round(work / us / 1e6)}


def bytes_read(name: str, rows: int, distinct: float) -> float:
    """Weight bytes that `rows` rows need: the routed experts they hit, the shared one, the router."""
    dim, inner, count = SHAPES[name]
    return distinct * 3 * dim * inner * 17 / 32 + 3 * dim * inner + 4 * dim * count


def profile(name: str, router: Router, moe: Experts, shared: tuple[Any, Any], rows: int) -> None:
    """Microseconds of each launch, from the profiler."""
    xs = [torch.randn(rows, SHAPES[name][0], device="cuda").bfloat16() for _ in range(4)]
    tokens = torch.zeros(rows, dtype=torch.int64, device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for x in xs:
            if rows <= 128:
                moe_rows(x, tokens, router, moe, shared)
            else:
                experts(x, *ref.route(x.float(), tokens, router), moe, fake_quant_fp8)
        torch.cuda.synchronize()
    parts = {e.key[:24]: round(e.device_time_total / 4, 1) for e in seen.key_averages() if e.device_time_total}
    print(f"{name} {rows} rows, us each: {parts}", flush=True)


def time() -> None:
    """Microseconds a layer, uniform routing, with what reading the weights alone would take."""
    print(torch.cuda.get_device_name(), flush=True)
    for name in ("flash", "pro"):
        weights = layer(name)
        copies = shared_copies(weights[2])
        for rows in (1, 8, 64, 128, 8192, 2, 4, 16, 32, 2048):
            few = rows <= 128
            found = decode_rows(name, rows, *weights[:2], copies) if few else time_many(name, rows, *weights[:2])
            print(name, rows, "rows:", found, flush=True)
            if name == "flash" and rows in (1, 64, 8192):
                profile(name, *weights, min(rows, 4096))
        del weights, copies


def shared_copies(shared: tuple[Fp8Matrix, Fp8Matrix]) -> list[tuple[Fp8Matrix, Fp8Matrix]]:
    """Shared experts to take in turn: one alone would stay in the L2, where the step's other weights drive it out."""
    up, down = shared
    return [shared, *((fp8(*up.shape), fp8(*down.shape)) for _ in range(3))]


def decode_rows(
    name: str,
    rows: int,
    router: Router,
    moe: Experts,
    shared: list[tuple[Fp8Matrix, Fp8Matrix]],
    beside: Marlin | None = None,
) -> Figures:
    """The mixture of one decode step. Inputs rotate, so that no weight is still in the L2 from the call before.

    `beside` it Marlin's routed experts alone, of the same rows and choices.
    """
    many = 8 if rows <= 8 else 3
    xs = [torch.randn(rows, SHAPES[name][0], device="cuda").bfloat16() for _ in range(many)]
    tokens = torch.zeros(rows, dtype=torch.int64, device="cuda")
    routed = [ref.route(x.float(), tokens, router) for x in xs]
    distinct = sum(len(ids.unique()) for ids, _ in routed) / many
    calls = [partial(moe_rows, x, tokens, router, moe, shared[i % 4]) for i, x in enumerate(xs)]
    us = timed(calls, launches=many)
    line = {**against(bytes_read(name, rows, distinct) / READ * 1e6, us), "distinct": round(distinct, 1)}
    if beside is None:
        return line
    return line | beside.figures([(x, ids.int(), share) for x, (ids, share) in zip(xs, routed, strict=True)])


if __name__ == "__main__":
    torch.manual_seed(0)
    runs = {"check": check, "check_many": check_many, "time": time}
    sys.exit(1 if runs[sys.argv[1]]() is False else 0)
