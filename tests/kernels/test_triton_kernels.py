"""The Triton kernels without a GPU: what the table promises is there, and the interpreter computes the right thing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from in_interpreter import rows_of

import triptych.kernels
from triptych.errors import ConfigError
from triptych.kernels import registry

KERNELS = Path(triptych.kernels.__file__).parent


def test_the_table_names_what_the_modules_have() -> None:
    for own, folders in registry._FAST.items():
        for folder, ops in folders.items():
            tree = ast.parse((KERNELS / folder / f"{own}.py").read_text(encoding="utf-8"))
            assert set(ops) <= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (own, folder)


def test_every_operation_of_fixed_tiles_is_there() -> None:
    for folder, ops in registry.FIXED.items():
        tree = ast.parse((KERNELS / folder / "fixed.py").read_text(encoding="utf-8"))
        assert set(ops) == {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"}, folder


@pytest.mark.parametrize(("script", "least"), [("interpreted.py", 40), ("portable_cases.py", 15)])
def test_every_triton_kernel_equals_its_reference_in_the_interpreter(script: str, least: int) -> None:
    results = rows_of(script)
    assert len(results) > least
    assert not [result for result in results if not result["ok"]]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"backend": "cpu", "device": "cuda"}, "cpu kernels run on the processor"),
        ({"backend": "triton", "device": "cpu"}, "triton kernels run on an NVIDIA GPU"),
        ({"deterministic": True, "device": "cuda", "backend": "ref"}, "Deterministic mode needs the triton kernels"),
    ],
)
def test_a_backend_that_cannot_serve_the_device_is_refused(options: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        registry.table(**options)
