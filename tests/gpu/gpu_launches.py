"""Which of the project's kernels a program launches, and which it leaves out."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import textwrap
from collections.abc import Iterator
from typing import Any

from triton.runtime.jit import JITFunction

import triptych.kernels

_ROOT = "triptych.kernels."


class Launches:
    """Names of kernels that are launched from now on, such as `linear.few.products`."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        run = JITFunction.run

        def noted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            self.seen.add(_name(kernel))
            return run(kernel, *args, **kwargs)

        JITFunction.run = noted

    def missing(self) -> list[str]:
        """Kernels of the project that were not launched."""
        return sorted(kernels() - self.seen)


def kernels() -> set[str]:
    """All that are launched from the host: those that no other one calls."""
    found = list(_compiled())
    called = {id(other) for one in found for other in _calls(one)}
    return {_name(one) for one in found if id(one) not in called}


def _compiled() -> Iterator[Any]:
    for info in pkgutil.walk_packages(triptych.kernels.__path__, _ROOT):
        module = importlib.import_module(info.name)
        for value in vars(module).values():
            if isinstance(value, JITFunction) and value.fn.__module__ == info.name:
                yield value


def _calls(kernel: Any) -> Iterator[Any]:
    """Functions that a kernel names, of its module or of one that it imported."""
    known = kernel.fn.__globals__
    for node in ast.walk(ast.parse(textwrap.dedent(kernel.src))):
        if isinstance(node, ast.Name):
            yield known.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield getattr(known.get(node.value.id), node.attr, None)


def _name(kernel: Any) -> str:
    return f"{kernel.fn.__module__}.{kernel.fn.__name__}".removeprefix(_ROOT)
