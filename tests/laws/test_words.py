"""What every text of the project must hold to: docstrings, no hidden settings, nothing of one machine."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from package_source import PACKAGE, ROOT, Module, modules

# path -> why it may read or set the environment
ENVIRONMENT = {
    "src/triptych/tiny/bundle.py": "the platform's convention for where caches live; no setting of ours",
}

# spelled in pieces, so that this file does not break its own law
FORBIDDEN = [
    "/" + "work" + "/",
    "/" + "root" + "/",
    "/" + "home" + "/",
    "/" + "opt" + "/",
    "pypi" + ".org",
    "files.python" + "hosted",
    "work" + "place",
    "CONTRACTS" + ".md",
    "shared" + "/reference",
    "shared" + "/design",
]


@pytest.mark.parametrize("module", modules(), ids=lambda m: m.name)
def test_everything_public_has_a_docstring(module: Module) -> None:
    if not module.tree.body:
        return
    missing = [] if ast.get_docstring(module.tree) else [f"{module.where}: the module"]
    missing += [f"{module.where}:{node.lineno} {node.name}" for node in public(module.tree) if not documented(node)]
    assert not missing, "without docstring:\n" + "\n".join(missing)


@pytest.mark.parametrize("module", modules(), ids=lambda m: m.name)
def test_nothing_is_set_by_environment_variables(module: Module) -> None:
    if module.where in ENVIRONMENT:
        return
    for node in ast.walk(module.tree):
        text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        assert text not in ("os.environ", "os.getenv", "os.putenv"), f"{module.where}:{node.lineno} uses {text}"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {a.name for a in node.names} & {"environ", "getenv"}, f"{module.where}:{node.lineno}"


def test_texts_name_no_machine() -> None:
    found = []
    for path in tracked_texts():
        text = path.read_text(encoding="utf-8")
        for pattern in FORBIDDEN:
            found += [f"{path.relative_to(ROOT)} has {pattern!r}"] if pattern in text else []
    assert not found, "\n".join(found)


def test_architecture_names_every_room_in_one_page() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p.is_dir() and (p / "__init__.py").exists())}
    rooms -= {"__init__", "__main__"}
    described = re.findall(r"^\| `(\w+)`? *\|", text, flags=re.MULTILINE)
    assert rooms <= set(described), f"docs/architecture.md has no line for {sorted(rooms - set(described))}"
    assert set(described) <= rooms, (
        f"docs/architecture.md describes what is not there: {sorted(set(described) - rooms)}"
    )
    assert len(text.splitlines()) <= 90, "docs/architecture.md is one page"


def public(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Public classes and functions of a module, and public methods of public classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node
            yield from (
                inner
                for inner in node.body
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and not inner.name.startswith("_")
            )


def documented(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    """True with a docstring, and for what only completes a documented thing: setters and overloads."""
    decorators = [ast.unparse(d) for d in node.decorator_list]
    return bool(ast.get_docstring(node)) or any(d.endswith((".setter", "overload", "override")) for d in decorators)


def tracked_texts() -> list[Path]:
    """Text files under version control, or all that are not ignored where git is missing."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        names = listed.stdout.splitlines()
    else:
        names = [str(p.relative_to(ROOT)) for room in ("src", "tests", "docs") for p in (ROOT / room).rglob("*.*")]
    suffixes = {".py", ".md", ".toml", ".txt", ".yml", ".json", ""}
    paths = [ROOT / name for name in names]
    return [p for p in paths if p.suffix in suffixes and p.is_file() and p.name != "test_words.py"]
