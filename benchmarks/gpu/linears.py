"""FP8 linears on one GPU: correctness against the references, then time with floors.

`python -m benchmarks.gpu.linears check|time|sweep` prints a table; `python -m benchmarks.gpu.table` keeps the times of
decode rows.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import peers
from benchmarks.gpu.experts import fp8
from benchmarks.gpu.timing import BF16, FP8, READ, Figures, against, timed
from triptych.config import SHAPES, ModelShape
from triptych.kernels.linear import ref
from triptych.kernels.linear.many import product
from triptych.kernels.linear.triton import front_linear, grouped_linear, linear, quantize
from triptych.kernels.quant.matrices import BothRows, Fp8Rows, FrontMatrix, quantize_rows


class Product(NamedTuple):
    """One linear of a layer: FP8 outputs [n] of inputs [groups, k], and columns of bf16 weights beside them."""

    n: int
    k: int
    groups: int = 1
    rest: int = 0

    def figures(self, rows: int, beside: peers.Peers | None = None) -> Figures:
        """Inputs come rounded, as in a step; weights rotate through more than the L2. Floor: weights, or products.

        `beside` it DeepGEMM of the same rows and weights.
        """
        size, work = self.n * self.k + 2 * self.rest * self.k, 2 * rows * (self.n + self.rest) * self.k
        many = 2 if rows > 1000 else min(20, max(3, (200 << 20) // size))
        sets, launches = [self._inputs(rows) for _ in range(many)], many if rows > 1000 else 20
        us = timed([partial(multiply, *one) for one in sets], launches)
        floor = max(size / READ, 2 * rows * self.k * (self.n / FP8 + self.rest / BF16)) * 1e6
        line = {**against(floor, us), "tflops": round(work / us / 1e6)}
        if beside is None:
            return line
        calls = [peers.product(beside, *one) for one in sets]
        differs = _error(torch.cat([part.float() for part in calls[0]()], 1), _values(multiply(*sets[0])))
        return line | {"deep_gemm_us": round(timed(calls, launches), 2), "differs": round(differs, 4)}

    def _inputs(self, rows: int) -> tuple[Any, Any]:
        """Rows and a matrix as `multiply` takes them."""
        if self.groups > 1:
            x = torch.randn(rows, self.groups, self.k, device="cuda").bfloat16()
            return x, fp8(self.groups, self.n // self.groups, self.k)
        x = torch.randn(rows, self.k, device="cuda").bfloat16()
        if self.rest:
            rest = torch.randn(self.rest, self.k, device="cuda").bfloat16()
            return BothRows(x, quantize(x)), FrontMatrix(fp8(self.n, self.k), rest)
        return quantize(x), fp8(self.n, self.k)


def multiply(x: Any, weight: Any) -> Any:
    """What a step does: groups round their results for the next product where they can."""
    if isinstance(weight, FrontMatrix):
        return front_linear(x, weight)
    return grouped_linear(x, weight, rounds=True) if isinstance(x, torch.Tensor) else linear(x, weight)


def _values(result: Any) -> torch.Tensor:
    return result.dequantize() if isinstance(result, Fp8Rows) else result.float()


def products(shape: ModelShape) -> dict[str, Product]:
    """What a decode step multiplies in a layer outside of its mixture of experts, by name."""
    d, heads, latent = shape.hidden_size, shape.num_heads * shape.head_dim, shape.q_lora_rank + shape.head_dim
    index, low = shape.index_heads * shape.index_head_dim, shape.o_groups * shape.o_lora_rank
    # a compressor has two projections, in CSA layers twice as wide; index heads have a weight each
    csa = 4 * shape.head_dim + 4 * shape.index_head_dim + shape.index_heads
    return {
        "front CSA": Product(latent, d, rest=csa),
        "front HCA": Product(latent, d, rest=2 * shape.head_dim),
        "query CSA": Product(heads + index, shape.q_lora_rank),
        "query HCA": Product(heads, shape.q_lora_rank),
        "o_a": Product(low, heads // shape.o_groups, groups=shape.o_groups),
        "o_b": Product(d, low),
    }


SWEEP = (
    *((64, 128, 4, 3, 16), (64, 128, 4, 4, 16), (64, 128, 4, 3, 32), (64, 128, 4, 3, 8)),
    *((128, 64, 4, 3, 8), (128, 64, 4, 3, 16), (64, 64, 4, 4, 16)),
)
"""Rows, columns, warps, stages, and bands of tiles that share rows."""
SHARED = {"w13": Product(4096, 4096), "w2": Product(4096, 2048)}
"""Shared experts of V4-Flash, where they run by themselves: for many rows."""


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def check() -> bool:
    """Norm-relative errors on V4-Flash's shapes; quantisation to the bit."""
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
    plain = {name: one for name, one in products(SHAPES["flash"]).items() if one.groups == 1 and not one.rest}
    for rows in (1, 3, 8, 16, 17, 32, 33, 64, 128, 257, 1000):
        for name, (n, k, *_) in {**plain, **SHARED}.items():
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
    """Microseconds of V4-Flash's products."""
    print(torch.cuda.get_device_name(), "\nwhat      rows       us    floor  share  TFLOP/s", flush=True)
    for rows in (1, 8, 16, 64, 8192, 32, 128, 2048):
        for name, one in {**products(SHAPES["flash"]), **SHARED}.items():
            found = one.figures(rows)
            print(
                name.ljust(9),
                "{:4} {us:8.1f} {floor_us:8.1f} {of_floor:6.0%} {tflops}".format(rows, **found),
                flush=True,
            )


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
        took = timed([call], launches=1)
        print(
            tall, wide, warps, stages, share, f"{took:.0f} us {2 * rows * n * k / took / 1e6:.0f} TFLOP/s", flush=True
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(1 if {"check": check, "time": time, "sweep": sweep}[sys.argv[1]]() is False else 0)
