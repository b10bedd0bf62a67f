"""The table of a decode step's kernels: it asks for every shape, ends in time, and says what is missing."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("triton", reason="the kernels that are measured are Triton's")
ROOT = Path(__file__).resolve().parents[2]
SPARSE = {"attend csa", "attend swa", "experts"}  # takes as long at each context


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT))
    yield importlib.import_module("benchmarks.gpu.table")


def test_every_operation_is_measured_for_every_batch_model_and_context(table: ModuleType) -> None:
    asked = [case[:4] for case in table.cases(["flash", "pro"], table.BATCHES, table.CONTEXTS, table.GROUPS)]
    assert len(asked) == len(set(asked))
    assert set(table.BATCHES) == {1, 8, 32, 64, 128} and set(table.CONTEXTS) == {"8K", "128K", "1M"}
    for model in ("flash", "pro"):
        for batch in table.BATCHES:
            for context in table.CONTEXTS:
                for op in ("attend hca", "select fp8", "select mxfp4"):
                    assert (model, op, context, batch) in asked
            assert {op for m, op, context, b in asked if (m, context, b) == (model, table.ANY, batch)} > SPARSE
    assert {batch for *_, batch in asked[: len(asked) // 5]} == {1}, "the most important rows come first"


def test_products_are_those_of_the_released_layers(table: ModuleType) -> None:
    products = table.linears.products(table.SHAPES["flash"])
    assert {name: (one.n, one.k, one.groups, one.rest) for name, one in products.items()} == {
        "front CSA": (1536, 4096, 1, 2624),
        "front HCA": (1536, 4096, 1, 1024),
        "query CSA": (40960, 1024, 1, 0),
        "query HCA": (32768, 1024, 1, 0),
        "o_a": (8192, 4096, 8, 0),
        "o_b": (4096, 8192, 1, 0),
    }


def test_a_case_that_fails_is_named_and_the_others_run(table: ModuleType) -> None:
    lines, failed = table.run([case(table, 1, measured), case(table, 8, broken), case(table, 64, measured)], later())
    assert [line["batch"] for line in lines] == [1, 64]
    assert lines[0] == {"model": "flash", "op": "attend hca", "context": "8K", "batch": 1, "us": 2.0, "floor_us": 1.0}
    assert failed == {"flash attend hca at 8K x 8": "ValueError: too wide"}


def test_a_table_ends_when_its_time_is_over(table: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def slow() -> dict[str, float]:
        clock[0] += 10
        return measured()

    monkeypatch.setattr(table, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    lines, failed = table.run([case(table, 1, measured), case(table, 8, slow), case(table, 64, measured)], until=5.0)
    assert [line["batch"] for line in lines] == [1, 8] and not failed


def test_the_row_says_what_is_missing(
    table: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table.rows, "RESULTS", tmp_path)
    cuda = SimpleNamespace(get_device_name=lambda: "a card")
    fake = SimpleNamespace(manual_seed=id, zeros=lambda *_, **__: None, cuda=cuda, __version__="0")
    monkeypatch.setattr(table, "torch", fake)
    monkeypatch.setattr(table, "ceilings", lambda: (4e12, 8e14))
    steps = [case(table, 1, measured), case(table, 8, broken), case(table, 64, interrupted), case(table, 128, measured)]
    monkeypatch.setattr(table, "cases", lambda *_: iter(steps))
    monkeypatch.setattr(sys, "argv", ["table", "--batches", "1", "8"])
    assert table.main() == 1
    [row] = [json.loads(line) for line in (tmp_path / "gpu_table.jsonl").read_text().splitlines()]
    assert row["command"] == "python -m benchmarks.gpu.table --batches 1 8"
    assert row["missing"] == ["flash attend hca at 8K x 64", "flash attend hca at 8K x 128"]
    assert list(row["failed"]) == ["flash attend hca at 8K x 8"]
    assert [line["us"] for line in row["table"]] == [2.0] and row["card"] == "a card"
    monkeypatch.setattr(sys, "argv", ["table", "--dry"])
    table.main()
    assert len((tmp_path / "gpu_table.jsonl").read_text().splitlines()) == 1
    assert "1 failed, 2 missing" in capsys.readouterr().out


def case(table: ModuleType, batch: int, measure: Callable[[], dict[str, float]]) -> tuple[object, ...]:
    return table.Case("flash", "attend hca", "8K", batch, measure)


def later() -> float:
    return time.monotonic() + 60


def measured() -> dict[str, float]:
    return {"us": 2.0, "floor_us": 1.0}


def broken() -> dict[str, float]:
    raise ValueError("too wide")


def interrupted() -> dict[str, float]:
    raise KeyboardInterrupt
