"""Budgets: 500 lines a file, 60 a function, 7 parameters. Exceptions are listed with their reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from package_source import ROOT, Module, modules

FILE_LINES, FUNCTION_LINES, PARAMETERS = 500, 60, 7

# "path" or "path:function" -> why it may be larger
_KERNEL = "one kernel: its registers flow through all of its stages, and a stage would take thirty arguments"
EXCEPTIONS: dict[str, str] = {
    "src/triptych/kernels/attend_rows/portable.py:partial": _KERNEL,
    "src/triptych/kernels/attend_rows/chunk.py:attend": _KERNEL,
    "src/triptych/kernels/attend_rows/hopper.py:partial": _KERNEL,
    "src/triptych/kernels/attend_rows/vendor_rows.py:prepare": _KERNEL,
    "src/triptych/kernels/mhc/many.py:expand": _KERNEL,
    "src/triptych/kernels/select_rows/chunk.py:scores": _KERNEL,
    "src/triptych/kernels/select_rows/hopper.py:scores": _KERNEL,
    "src/triptych/kernels/select_rows/triton.py:_scores": _KERNEL,
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files() -> list[Path]:
    """Every Python file that people maintain."""
    return [path for room in ("src", "tests", "benchmarks", "docs") for path in sorted((ROOT / room).rglob("*.py"))]


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_file_fits_the_budget(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    where = str(path.relative_to(ROOT))
    assert lines <= FILE_LINES or where in EXCEPTIONS, f"{where} has {lines} lines: split it by idea"


@pytest.mark.parametrize("module", modules(), ids=lambda m: m.name)
def test_functions_fit_the_budget(module: Module) -> None:
    over = []
    for function in functions(module.tree):
        if f"{module.where}:{function.name}" in EXCEPTIONS:
            continue
        lines = (function.end_lineno or 0) - function.lineno + 1
        if lines > FUNCTION_LINES:
            over.append(f"{module.where}:{function.lineno} {function.name} has {lines} lines")
        if not is_exempt(function) and parameters(function) > PARAMETERS:
            over.append(f"{module.where}:{function.lineno} {function.name} takes {parameters(function)} parameters")
    assert not over, "\n".join(over)


def test_exceptions_are_still_needed() -> None:
    for key, reason in EXCEPTIONS.items():
        path, _, name = key.partition(":")
        assert len(reason) > 20, f"{key} needs a reason"
        text = (ROOT / path).read_text(encoding="utf-8")
        if name:
            [function] = [f for f in functions(ast.parse(text)) if f.name == name]
            lines = (function.end_lineno or 0) - function.lineno + 1
            assert lines > FUNCTION_LINES or parameters(function) > PARAMETERS, f"{key} fits the budget again"
        else:
            assert len(text.splitlines()) > FILE_LINES, f"{key} fits the budget again"


def functions(tree: ast.AST) -> Iterator[Function]:
    """All functions and methods, nested ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def parameters(function: Function) -> int:
    """How many parameters a caller sees: without self and cls."""
    names = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def is_exempt(function: Function) -> bool:
    """Functions whose parameters are no interface between people.

    The parameters of a subcommand are the options of the command line; a function that numba or Triton compiles takes
    arrays, because an object would have to be unpacked at every call.
    """
    decorators = [ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in function.decorator_list]
    return any(
        name.endswith(".command") or name in ("kernel", "inline", "triton.jit", "gluon.jit") for name in decorators
    )
