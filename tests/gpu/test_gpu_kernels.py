"""Every operation on the GPU against its reference on the processor, in float32, at odd sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from triptych.kernels import inputs
from triptych.kernels.attend import ref as attend_ref
from triptych.kernels.index import ref as index_ref
from triptych.kernels.registry import FOLDER, table
from triptych.kernels.verify import verify

ROWS = (1, 3, 5, 63, 65, 129, 200)
CHOSEN = {row.op: row.backend for row in table("auto", device="cuda")}


@pytest.mark.parametrize("op", FOLDER)
@pytest.mark.parametrize("rows", ROWS)
def test_what_the_gpu_runs_equals_the_reference(op: str, rows: int) -> None:
    result = verify(op, CHOSEN[op], rows, rows, device="cuda")
    assert result.ok, result


@pytest.mark.parametrize("op", [op for op, backend in CHOSEN.items() if backend != "ref"])
def test_the_reference_itself_runs_on_the_gpu(op: str) -> None:
    result = verify(op, "ref", 65, 1, device="cuda")
    assert result.ok, result


def _narrow(entries: index_ref.PagedEntries) -> index_ref.PagedEntries:
    return entries._replace(pool=entries.pool.to(torch.bfloat16))


@pytest.mark.parametrize("rows", (1, 5, 129))
@pytest.mark.parametrize("mode", ("window", "selected", "visible"))
def test_attention_over_a_bfloat16_cache(rows: int, mode: str) -> None:
    from triptych.kernels.attend import triton as fast

    made = inputs.MAKERS["attend"](rows, torch.Generator().manual_seed(rows))
    q, window, entries, selected, core = inputs.on_device(made, torch.device("cuda"))
    window = dataclasses.replace(window, rows=window.rows.to(torch.bfloat16).to(torch.float32))
    arguments: tuple[Any, ...] = (q, window, None, None, core)
    if mode != "window":
        arguments = (q, window, _narrow(entries), selected if mode == "selected" else None, core)
    got, want = fast.attend(*arguments), attend_ref.attend(*arguments)
    error = float((got - want).norm() / want.norm())
    assert error < 1e-2, error
