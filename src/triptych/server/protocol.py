"""What the server needs of an engine; `AsyncEngine` is one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from pathlib import Path
from typing import Protocol

from triptych.config import EngineConfig, ModelShape
from triptych.text.grammar import GrammarCache
from triptych.text.tokenizer import Tokenizer
from triptych.words import (
    NO_HINTS,
    CacheHints,
    Delta,
    EngineStats,
    Facts,
    Panels,
    Running,
    SamplingParams,
    TokenIds,
    WeightsUpdate,
)


class ServingEngine(Protocol):
    """An engine that serves many requests at once. `max_context` counts prompt and answer of one request."""

    model_name: str
    shape: ModelShape
    config: EngineConfig
    tokenizer: Tokenizer
    max_context: int
    panels: Panels

    @property
    def grammars(self) -> GrammarCache | None:
        """Where grammars are compiled; None where answers cannot be constrained."""

    async def start(self) -> None:
        """Become ready for `stream`."""

    async def stop(self) -> None:
        """Stop now; what still runs ends with finish reason abort. Harmless when stopped."""

    async def facts(self) -> Facts:
        """Who runs and what could be resumed, as soon as the step that runs now has ended."""

    def stats(self) -> EngineStats:
        """Figures as of the last step."""

    async def pause(self) -> None:
        """No step begins until `resume`."""

    async def resume(self) -> None:
        """Go on."""

    async def update_weights(
        self, source: Path, *, running: Running = "drain", timeout: float | None = None
    ) -> WeightsUpdate:
        """Weights of a checkpoint directory in place of those that there are."""

    async def upload_weights(
        self, pieces: Iterable[bytes], *, running: Running = "drain", timeout: float | None = None
    ) -> WeightsUpdate:
        """Those of a safetensors file that arrives; `pieces` are asked for in another thread."""

    def stream(
        self,
        prompt_ids: TokenIds,
        params: SamplingParams,
        *,
        request_id: str,
        salt: str = "",
        hints: CacheHints = NO_HINTS,
    ) -> AsyncGenerator[Delta, None]:
        """Deltas of all n samples; RequestError or Unavailable before the first. Closing aborts."""
