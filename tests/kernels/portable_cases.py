"""Runs with Triton's interpreter: kernels for released weights on any GPU against their references, as JSON lines."""

from __future__ import annotations

import json

import torch
from interpreter_rounding import round_as_hardware
from torch import Tensor

from triptych.kernels.linear import portable
from triptych.kernels.linear import ref as linear_ref
from triptych.kernels.moe import portable as mixtures
from triptych.kernels.moe import ref as moe_ref
from triptych.kernels.quant.matrices import Fp8Matrix, FrontMatrix, Mxfp4Matrix, Unnormed
from triptych.kernels.quant.ref import fake_quant_fp8

G = torch.Generator().manual_seed(0)


def randn(*size: int) -> Tensor:
    return torch.randn(size, generator=G)


def say(what: str, got: Tensor, want: Tensor, limit: float) -> None:
    """One line; NaN never passes."""
    error = float((got.double() - want.double()).norm() / want.double().norm())
    print(json.dumps({"what": what, "ok": error <= limit, "error": error}))


def fp8(*size: int) -> Fp8Matrix:
    *outer, n, k = size
    scales = 2.0 ** torch.randint(-8, -4, (*outer, -(-n // 128), -(-k // 128)), generator=G)
    return Fp8Matrix(randn(*size).to(torch.float8_e4m3fn), scales)


def mxfp4(count: int, n: int, k: int) -> Mxfp4Matrix:
    values = torch.randint(0, 256, (count, n, k // 2), dtype=torch.uint8, generator=G)
    return Mxfp4Matrix(values, torch.randint(114, 122, (count, n, k // 32), dtype=torch.uint8, generator=G))


def main() -> None:
    """Rounded rows, linears of odd sizes, mixtures; and pairs whose bits are their own."""
    round_as_hardware()
    x = randn(40, 320) * torch.logspace(-8, 4, 40)[:, None]
    say("rounded", portable.rounded(x), fake_quant_fp8(x), 0.0)
    x[3, 5] = float("nan")
    got = portable.rounded(x)
    print(json.dumps({"what": "NaN stays", "ok": bool(got[3, 5].isnan()) and int(got.isnan().sum()) == 1}))
    for columns in (192, 200):
        for rows in (1, 5, 70):
            weight, x = fp8(columns, 384), randn(rows, 384)
            say(f"linear {rows} x {columns}", portable.linear(x, weight), linear_ref.linear(x, weight), 1e-6)
    left, weight = Unnormed(randn(1, 384).bfloat16().float(), randn(384), 1e-6), fp8(192, 384)
    say("linear of a row that is not normed", portable.linear(left, weight), linear_ref.linear(left, weight), 4e-3)
    grouped, x = fp8(4, 72, 128), randn(5, 4, 128).bfloat16()
    say("grouped", portable.grouped_linear(x, grouped), linear_ref.grouped_linear(x.float(), grouped), 4e-3)
    front, x = FrontMatrix(fp8(192, 256), randn(40, 256).bfloat16()), randn(3, 256).bfloat16()
    say("front", portable.front_linear(x, front), linear_ref.front_linear(x, front), 1e-5)
    moe = moe_ref.Experts(mxfp4(5, 2 * 96, 160), mxfp4(5, 160, 96), 10.0)
    for rows in (1, 7, 40):
        x, weights = randn(rows, 160), torch.rand(rows, 2, generator=G)
        ids = torch.stack([torch.randperm(5, generator=G)[:2] for _ in range(rows)])
        want = moe_ref.experts(fake_quant_fp8(x), ids, weights, moe, fake_quant_fp8)
        say(f"experts {rows}", mixtures.experts(x, ids, weights, moe), want, 1e-6)
        together = mixtures.experts(x, ids, weights, moe, 64)
        alone = mixtures.experts(x[:1], ids[:1], weights[:1], moe, 64)
        print(json.dumps({"what": f"one of {rows}", "ok": torch.equal(together[:1], alone)}))


if __name__ == "__main__":
    main()
