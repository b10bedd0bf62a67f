"""What `Engine` and `AsyncEngine` have in common: how they are loaded and what they tell of themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from triptych.engine.load import LoadedEngine, load_with
from triptych.text.grammar import GrammarCache


class Face:
    """A loaded model with its loop; who steps the loop, and where, is what the engines differ in."""

    def __init__(self, loaded: LoadedEngine) -> None:
        self._loaded = loaded
        self._loop = loaded.loop
        self.model_name = loaded.name
        self.shape = loaded.shape
        self.config = loaded.config
        self.max_context = loaded.max_context

    @classmethod
    def load(cls, model: str | Path = "tiny", **options: Any) -> Self:
        """Load a bundled model or a checkpoint directory. Options are the fields of EngineConfig and CacheConfig, sizes
        in bytes or as text like "2GiB", and `profile`, a name or a TOML file that gives those which are not named here.

        ConfigError or CheckpointError names the option, the file or the tensor that is wrong.
        """
        return cls(load_with(model, options))

    @property
    def grammars(self) -> GrammarCache | None:
        """The compiled grammars; None without a tokenizer."""
        return self._loop.masks.grammars if self._loop.masks is not None else None

    def describe(self) -> str:
        """A few lines: the model, the cache and what it holds."""
        return self._loaded.banner
