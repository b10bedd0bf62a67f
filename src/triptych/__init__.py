"""Triptych: a serving engine for DeepSeek-V4, built around its three caches.

    from triptych import Engine, SamplingParams
    engine = Engine.load("tiny")
    [out] = engine.generate(["Once upon a time"], SamplingParams(max_tokens=32, temperature=0.0))
    print(out.text, out.usage)

The names below are loaded when first touched, so that `import triptych` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych.engine.api import AsyncEngine, Engine
    from triptych.errors import TriptychError
    from triptych.words import SamplingParams

__version__ = "0.1.0"
__all__ = ["AsyncEngine", "Engine", "SamplingParams", "TriptychError", "__version__"]

_HOME = {
    "AsyncEngine": "triptych.engine.api",
    "Engine": "triptych.engine.api",
    "SamplingParams": "triptych.words",
    "TriptychError": "triptych.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'triptych' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
