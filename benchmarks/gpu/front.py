"""The kernels between the products of a decode step, on V4-Flash's shapes: checked against references, then timed.

    python -m benchmarks.gpu.front [--check] [--batch N ...]

Inputs rotate, so that what a layer reads once a step (its maps) comes from memory and not from the L2 cache. The floor
is bytes over the copy bandwidth of the run; an empty kernel in a graph takes 1.2 us on an H200. `python -m
benchmarks.gpu.table` keeps the times of decode rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.timing import Figures, against, ceilings, timed
from triptych.config import CSA_LAYER, HCA_LAYER, PAGE, SHAPES, ModelShape
from triptych.kernels.compress.ref import Compressor
from triptych.kernels.front import ref as front_ref
from triptych.kernels.front import triton as front
from triptych.kernels.front.ref import DecodeRows, FrontCaches, FrontWeights
from triptych.kernels.mhc import ref as mhc_ref
from triptych.kernels.mhc import triton as mhc
from triptych.kernels.mhc.ref import MhcHead, MhcSite, Residual
from triptych.kernels.norm import ref as norm_ref
from triptych.kernels.norm import triton as norm
from triptych.kernels.quant.formats import PackedRows, RowFormat, packed

BATCHES = (1, 8, 64, 128)
RING = 260
SETS = 16


class Case(NamedTuple):
    """One operation at one size: fast and reference call on the same kind of inputs, bytes that it must move."""

    op: str
    batch: int
    make: Callable[[], tuple[Any, ...]]
    fast: Callable[..., Any]
    truth: Callable[..., Any]
    size: int


def randn(*size: int, dtype: torch.dtype = torch.float32, device: str = "cuda") -> Tensor:
    """Normal values."""
    return torch.randn(*size, device=device).to(dtype)


def site(shape: ModelShape, device: str) -> MhcSite:
    """Weights of a site whose maps are of the size that training gives them."""
    width = 4 * shape.hidden_size
    return MhcSite(
        randn(24, width, device=device) / width**0.5,
        *(randn(24, device=device), randn(3, device=device), 20, 1e-6, 1e-6),
    )


def residual(rows: int, shape: ModelShape, device: str) -> Residual:
    """Streams in bf16, post and a doubly stochastic comb."""
    comb = mhc_ref.sinkhorn(randn(rows, 4, 4, device=device), 20, 1e-6)
    streams = randn(rows, 4, shape.hidden_size, dtype=torch.bfloat16, device=device)
    return Residual(streams, torch.rand(rows, 4, device=device) * 2, comb)


def mhc_cases(shape: ModelShape, batch: int, device: str, rounds: bool = False) -> Iterator[Case]:
    """A site between two blocks, the first one and the last one; `rounds`: as before a product of rounded rows."""
    d = shape.hidden_size

    def weights() -> MhcSite:
        return site(shape, device)._replace(rounds=rounds)

    def between() -> tuple[Any, ...]:
        y = randn(batch, d, dtype=torch.bfloat16, device=device)
        return y, residual(batch, shape, device), weights(), randn(d, device=device)

    def first() -> tuple[Any, ...]:
        table = randn(4096, d, dtype=torch.bfloat16, device=device)
        ids = torch.randint(0, len(table), (batch,), device=device)
        return ids, table, weights(), randn(d, device=device)

    def last() -> tuple[Any, ...]:
        maps = (randn(4, 4 * d, device=device) / d**0.5 / 2, randn(4, device=device), randn(1, device=device))
        y = randn(batch, d, dtype=torch.bfloat16, device=device)
        return y, residual(batch, shape, device), MhcHead(*maps, 1e-6, 1e-6), randn(d, device=device)

    read, row = 24 * 4 * d * 4, d * 2
    yield Case("mhc_rows", batch, between, mhc.mhc_rows, mhc_ref.mhc_rows, read + batch * row * (1 + 4 + 4 + 1))
    yield Case("mhc_first", batch, first, mhc.mhc_first, mhc_ref.mhc_first, read + batch * row * (1 + 4 + 1))
    yield Case("mhc_last", batch, last, mhc.mhc_last, mhc_ref.mhc_last, read // 6 + batch * row * (1 + 4 + 1))


def front_case(shape: ModelShape, ratio: int, batch: int, device: str, *, done: bool, rounds: bool) -> Case:
    """The front end of one layer; `done`: every row completes a group, or none does; `rounds`: also the query."""
    c, di, at = shape.head_dim, shape.index_head_dim, shape.q_lora_rank + shape.head_dim
    csa = ratio == CSA_LAYER
    wide = {CSA_LAYER: 4 * c, HCA_LAYER: 2 * c}.get(ratio, 0)
    keys_at, heads = at + wide, (at + wide + 4 * di, at + wide + 4 * di + shape.index_heads)
    reach = {CSA_LAYER: 8, HCA_LAYER: 128}.get(ratio, 0)
    entry, pages = RowFormat("entry", c, shape.rope_dim), 16
    per_page = PAGE // ratio if ratio else 1

    def compressor(dim: int) -> Compressor:
        ape = randn(ratio, dim * (2 if csa else 1), device=device)
        return Compressor(ape, randn(dim, device=device), csa, shape.norm_eps)

    def pool(rows: int, form: RowFormat, count: int) -> PackedRows:
        memory = torch.full((count, rows * form.row_bytes), 0x7F, dtype=torch.uint8, device=device)
        return packed(memory, 0, rows, form)

    def make() -> tuple[Any, ...]:
        weights = FrontWeights(
            *(randn(shape.q_lora_rank, device=device), randn(c, device=device)),
            *(compressor(c) if ratio else None, compressor(di) if csa else None, at, keys_at, heads if csa else (0, 0)),
            *(0.01, shape.norm_eps, True, rounds),
        )
        caches = FrontCaches(
            *(pool(RING, entry, batch), RING, RING),
            pool(per_page, entry, batch * pages) if ratio else None,
            pool(per_page, RowFormat("fp8", di), batch * pages) if csa else None,
            randn(batch * reach, wide, device=device) if ratio else None,
            randn(batch * reach, 4 * di, device=device) if csa else None,
            reach,
        )
        group = torch.randint(1, pages * PAGE // max(ratio, 1), (batch,), device=device)
        positions = group * max(ratio, 1) - (1 if done else 2)
        table = torch.randperm(batch * pages, device=device).view(batch, pages).int()
        where = DecodeRows(positions, torch.arange(batch, device=device), table)
        angle = randn(batch, shape.rope_dim // 2, device=device) * 3
        product = randn(batch, heads[1] if csa else at + wide, device=device)
        angles = (angle.cos().contiguous(), angle.sin().contiguous())
        return product, weights, caches, where, (angles, angles if ratio else None)

    size = batch * (
        4 * (at + wide + (4 * di if csa else 0)) * 2 + (reach * wide * 4 // (2 if csa else 1) if done else 0)
    )
    name = f"front_rows {({CSA_LAYER: 'CSA', HCA_LAYER: 'HCA'}).get(ratio, 'SWA')}{' entry' if done else ''}"
    return Case(name, batch, make, front.front_rows, front_ref.front_rows, size)


def cases(shape: ModelShape, batch: int, device: str = "cuda", *, rounds: bool = False) -> Iterator[Case]:
    """Everything that is measured at one batch size; `rounds`: as where the products are of FP8."""
    yield from mhc_cases(shape, batch, device, rounds)
    for ratio in (0, CSA_LAYER, HCA_LAYER):
        for done in (False, True) if ratio else (False,):
            yield front_case(shape, ratio, batch, device, done=done, rounds=rounds)


def chunk_cases(shape: ModelShape, rows: int, device: str = "cuda") -> Iterator[Case]:
    """What prefill does between its products, of a chunk of `rows`."""
    d, c, heads, lora = shape.hidden_size, shape.head_dim, shape.num_heads, shape.q_lora_rank
    angle = randn(rows, shape.rope_dim // 2, device=device)
    angles = (angle.cos(), angle.sin())

    def between() -> tuple[Any, ...]:
        y = randn(rows, d, dtype=torch.bfloat16, device=device)
        return y, residual(rows, shape, device), site(shape, device), randn(d, device=device)

    def latent() -> tuple[Any, ...]:
        norms = (randn(lora, device=device), randn(c, device=device))
        return randn(rows, lora + c, device=device), lora, norms, angles, shape.norm_eps, torch.bfloat16

    def query() -> tuple[Any, ...]:
        raw = randn(rows, heads * c, dtype=torch.bfloat16, device=device)
        return raw, heads, c, angles, shape.norm_eps

    def index() -> tuple[Any, ...]:
        return (randn(rows, shape.index_heads, shape.index_head_dim, dtype=torch.bfloat16, device=device),)

    def out() -> tuple[Any, ...]:
        return randn(rows, heads, c, dtype=torch.bfloat16, device=device), angles

    yield Case("mhc_rows", rows, between, mhc.mhc_rows, mhc_ref.mhc_rows, 24 * 16 * d + rows * 2 * d * 10)
    yield Case("latent_rows", rows, latent, norm.latent_rows, norm_ref.latent_rows, rows * (lora + c) * 6)
    yield Case("query_rows", rows, query, norm.query_rows, norm_ref.query_rows, rows * heads * c * 4)
    wide = shape.index_heads * shape.index_head_dim
    yield Case("index_round", rows, index, norm.index_round, norm_ref.index_round, rows * wide * 4)
    yield Case("derotate", rows, out, norm.derotate, norm_ref.derotate, rows * heads * c * 4)


def tensors(value: Any) -> Iterator[Tensor]:
    """What an operation returned or may have written, as floats."""
    if isinstance(value, PackedRows):
        values, scales = value.values.flatten(0, 1), value.scales.flatten(0, 1)
        written = ~(values == 0x7F).all(1)
        yield written
        yield value.format.unpack(values[written], scales[written])
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors(part)


def check(shape: ModelShape, batches: tuple[int, ...]) -> bool:
    """Every case against its reference on the processor; prints norm-wise errors. True if all are small."""
    right = True
    for batch in batches:
        more = chunk_cases(shape, 200) if batch == batches[0] else ()
        for case in (*cases(shape, batch), *more):
            given = case.make()
            there = _moved(given)
            got = [*tensors(case.fast(*given)), *tensors(given[2:3])]
            want = [*tensors(case.truth(*there)), *tensors(there[2:3])]
            errors = [_error(a.cpu(), b) for a, b in zip(got, want, strict=True)]
            fine = all(error < 4e-3 for error in errors)
            right &= fine
            print(
                "check",
                shape.hidden_size,
                case.op,
                batch,
                *(f"{e:.1e}" for e in errors),
                "ok" if fine else "WRONG",
                flush=True,
            )
    return right


def _moved(given: Any) -> Any:
    from triptych.kernels.inputs import on_device

    return on_device(given, torch.device("cpu"))


def _error(got: Tensor, want: Tensor) -> float:
    if got.dtype == torch.bool:
        return float((got != want).sum())
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30)) if got.numel() else 0.0


def compile_offline() -> None:
    """Run every launch wrapper once on the processor, where something else than a GPU takes the launches."""
    for shape in (SHAPES["flash"], SHAPES["pro"]):
        for case in cases(shape, 2, "cpu"):
            case.fast(*case.make())


def figures(case: Case, bandwidth: float, sets: int = SETS) -> Figures:
    """Microseconds of a case, and its bytes over `bandwidth`."""
    made = [case.make() for _ in range(sets)]
    us = timed([partial(case.fast, *given) for given in made])
    return {**against(case.size / bandwidth * 1e6, us)}


def main() -> int:
    """Check, or time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES)
    options = parser.parse_args()
    flash = SHAPES["flash"]
    if options.check:
        return 0 if all([check(flash, (1, 3, 64)), check(SHAPES["pro"], (2, 17))]) else 1
    bandwidth, _ = ceilings()
    measured = [(case, SETS) for batch in options.batch for case in cases(flash, batch, rounds=True)]
    for case, sets in [*measured, *((case, 2) for case in chunk_cases(flash, 8192))]:
        print(case.op, case.batch, figures(case, bandwidth, sets), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
