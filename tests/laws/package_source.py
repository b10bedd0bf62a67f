"""The package as text: its modules, their syntax trees and what they import. Shared by the laws."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "triptych"


@dataclass(frozen=True)
class Module:
    """One file of the package. `name` is dotted, without the leading `triptych.`; `room` is its first part."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def room(self) -> str:
        """The first part of the name: a top-level module or folder; `__init__` for the package itself."""
        return self.name.split(".")[0]

    @property
    def where(self) -> str:
        """The path to show in a failure."""
        return str(self.path.relative_to(ROOT))


@cache
def modules() -> tuple[Module, ...]:
    """Every Python file of the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found.append(Module(name, path, ast.parse(path.read_text(encoding="utf-8"), str(path))))
    return tuple(found)


def imports(module: Module, *, runtime_only: bool = False) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of everything the module imports, also inside functions.

    `from a import b` yields `a.b` when that is a module of the package, else `a`.
    `runtime_only` leaves out what only type checkers see.
    """
    skipped = set(_type_checking_nodes(module.tree)) if runtime_only else set()
    for node in ast.walk(module.tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.where}:{node.lineno} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if inner in _names() else str(node.module)), node.lineno


def at_module_level(module: Module) -> set[str]:
    """Dotted names imported when the module is imported: not in functions, not for type checkers only."""
    inside = {
        id(inner)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    skipped = set(_type_checking_nodes(module.tree))
    top = Module(module.name, module.path, ast.Module([], []))
    top.tree.body = [
        node  # type: ignore[misc]
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in inside and node not in skipped
    ]
    return {name for name, _ in imports(top)}


def third_party(name: str) -> str | None:
    """The top-level package of an import that is neither the standard library's nor ours."""
    top = name.split(".")[0]
    return None if top == "triptych" or top in sys.stdlib_module_names else top


@cache
def _names() -> frozenset[str]:
    return frozenset(f"triptych.{module.name}" for module in modules())


def _type_checking_nodes(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for statement in node.body:
                yield from ast.walk(statement)
