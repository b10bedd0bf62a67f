"""Holds every fast kernel against its reference on random inputs. Tests walk the registry with it; so can users.

Inputs are float32 with odd sizes; memory that a kernel must not read is NaN, so that reading it shows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from triptych.kernels import inputs
from triptych.kernels.registry import FOLDER

# largest |fast - reference| relative to the norm-wise size of the reference, by storage dtype
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far a kernel is from its reference: largest error relative to the reference's RMS (or mismatch count)."""

    op: str
    backend: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """True if the error is within tolerance; NaN never passes."""
        return self.error <= self.tolerance


def verify(
    op: str,
    backend: str,
    rows: int,
    seed: int = 0,
    *,
    deterministic: bool = False,
    device: torch.device | str = "cpu",
) -> Comparison:
    """Run `op` of `backend` and of the reference on the same inputs of `rows` rows and compare all they produce.

    Results and everything an operation writes (rings, pools) count. The fast one runs on `device`, the reference on
    the processor. Raises KeyError for an unknown op.
    """
    make: Callable[[int, torch.Generator], tuple[Any, ...]] = inputs.MAKERS[op]
    name = op + "_deterministic" if deterministic else op
    fast = getattr(importlib.import_module(f"triptych.kernels.{FOLDER[op]}.{backend}"), name)
    truth = getattr(importlib.import_module(f"triptych.kernels.{FOLDER[op]}.ref"), op)
    given = inputs.on_device(make(rows, torch.Generator().manual_seed(seed)), torch.device(device))
    got = [tensor.cpu() for tensor in _run(fast, op, given)]
    want = _run(truth, op, make(rows, torch.Generator().manual_seed(seed)))
    assert len(got) == len(want), (op, len(got), len(want))
    error = max((_error(a, b) for a, b in zip(got, want, strict=True)), default=0.0)
    # a kernel for one GPU format may return bf16 where the reference keeps float32
    kinds = [tensor.dtype for tensor in got if tensor.dtype in TOLERANCE]
    return Comparison(op, backend, error, max((TOLERANCE[kind] for kind in kinds), default=TOLERANCE[torch.float32]))


def _run(function: Any, op: str, arguments: tuple[Any, ...]) -> list[Tensor]:
    """What a call returns, and the arguments that the operation is there to write."""
    result = function(*arguments)
    return [*_tensors(result), *(t for i in inputs.WRITES.get(op, ()) for t in _tensors(arguments[i]))]


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors inside tuples and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        for item in fields(value):
            yield from _tensors(getattr(value, item.name))


def _error(got: Tensor, want: Tensor) -> float:
    narrow = got.dtype == torch.bfloat16 and want.dtype == torch.float32
    if got.shape != want.shape or (got.dtype != want.dtype and not narrow):
        return float("inf")
    if not got.dtype.is_floating_point:
        return float((got != want).sum())
    if not got.numel():
        return 0.0
    if not torch.equal(got.isnan(), want.isnan()):
        return float("nan")
    got, want = got.nan_to_num(), want.nan_to_num()
    size = float(want.double().square().mean().sqrt()) or 1.0
    return float((got.double() - want.double()).abs().max()) / size
