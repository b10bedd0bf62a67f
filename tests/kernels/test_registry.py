"""Every operation of the registry against its reference, at odd sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from triptych.kernels import inputs, parallel
from triptych.kernels.registry import FOLDER, KernelSet, table
from triptych.kernels.verify import verify

ROWS = (1, 2, 3, 5, 63, 64, 65, 127, 129, 200)
FAST = [row.op for row in table("auto") if row.backend == "cpu"]
DETERMINISTIC = [row.op for row in table("auto", deterministic=True) if row.backend == "cpu"]


def test_every_operation_has_inputs_and_a_folder() -> None:
    ops = {field.name for field in dataclasses.fields(KernelSet)}
    assert ops == set(FOLDER) == set(inputs.MAKERS)


@pytest.mark.parametrize("op", FAST)
@pytest.mark.parametrize("rows", ROWS)
def test_cpu_kernel_equals_reference(op: str, rows: int) -> None:
    for seed in range(3):
        result = verify(op, "cpu", rows, seed)
        assert result.ok, result


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = parallel._threads
    parallel.set_threads(3)
    yield
    parallel.set_threads(before)


@pytest.mark.parametrize("op", FAST)
def test_threads_change_nothing(op: str, three_threads: None) -> None:
    for rows in (1, 4, 17, 64, 200, 400):
        result = verify(op, "cpu", rows, rows)
        assert result.ok, result


def test_a_failure_in_a_thread_is_raised(three_threads: None) -> None:
    def run(first: int, last: int) -> None:
        if first:
            raise ValueError("in a thread")

    with pytest.raises(ValueError, match="in a thread"):
        parallel.over(9, 1, run)


@pytest.mark.parametrize("op", DETERMINISTIC)
def test_deterministic_kernel_equals_reference(op: str) -> None:
    import importlib

    module = importlib.import_module(f"triptych.kernels.{FOLDER[op]}.cpu")
    if not hasattr(module, op + "_deterministic"):
        pytest.skip("one version serves both modes")
    for rows in ROWS:
        result = verify(op, "cpu", rows, rows, deterministic=True)
        assert result.ok, result


def test_a_wrong_kernel_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from triptych.kernels.mhc import cpu

    right = cpu.mhc_post
    # the classic mistake: the mixing matrix not transposed
    monkeypatch.setattr(cpu, "mhc_post", lambda y, x, post, comb: right(y, x, post, comb.transpose(1, 2).contiguous()))
    assert not verify("mhc_post", "cpu", 5).ok
    monkeypatch.setattr(cpu, "mhc_post", lambda y, x, post, comb: torch.full_like(x, float("nan")))
    assert not verify("mhc_post", "cpu", 5).ok
