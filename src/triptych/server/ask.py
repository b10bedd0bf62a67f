"""What a client asks for, as one value: the prompts as ids, how to sample and how to answer."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from msgspec import UNSET, UnsetType

from triptych.errors import RequestError, TriptychError
from triptych.server.fields import Fields
from triptych.server.merge import merged
from triptych.server.pieces import Answer, PlainReader, Reader, Step
from triptych.server.protocol import ServingEngine
from triptych.server.store import ResponseStore
from triptych.server.wire import WireUsage
from triptych.text.history import History
from triptych.words import NO_HINTS, CacheHints, Delta, SamplingParams, TokenIds, Usage

STREAM_FIELDS = frozenset({"model", "stream", "stream_options"})
# fields of OpenAI's API that change nothing about the answer's text here
HARMLESS = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls", "prediction"),
    }
)


@dataclass(frozen=True, slots=True)
class Head:
    """What every chunk of one response repeats."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, prefix: str, model: str, joint: str = "-") -> Head:
        """A fresh id such as chatcmpl-3f2a..."""
        return cls(f"{prefix}{joint}{uuid.uuid4().hex}", int(time.time()), model)


def _nothing(choice: int, answer: Answer) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True, slots=True)
class Desk:
    """Where a request is read: the engine it is for, the model's name as the client knows it, whose request it is.

    `effort` is that of requests that name none.
    """

    engine: ServingEngine
    model: str
    salt: str
    responses: ResponseStore
    history: History
    effort: str = "none"


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """One HTTP request, ready to run. Choice c is sample c % n of prompt c // n.

    `include_usage`: a stream ends with the usage; `continuous_usage`: each chunk bears that of its choice so far.
    `reader` makes what reads one choice; `ended` is told each choice that came to its end. `plan` is what an API notes
    for its own answer, `desk` where the request was read.
    """

    head: Head
    prompts: tuple[TokenIds, ...]
    params: SamplingParams
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    hints: CacheHints = NO_HINTS
    salt: str = ""
    reader: Callable[[], Reader] = PlainReader
    ended: Callable[[int, Answer], None] = _nothing
    plan: object = None
    desk: Desk | None = None

    @property
    def choices(self) -> int:
        """How many answers there will be."""
        return len(self.prompts) * self.params.n

    async def run(self, engine: ServingEngine) -> AsyncGenerator[tuple[int, Delta], None]:
        """(choice, delta) of all prompts as they come. Closing aborts what still runs."""
        n = self.params.n
        streams = [
            engine.stream(
                prompt,
                self.params,
                request_id=f"{self.head.id}-{i}" if i else self.head.id,
                salt=self.salt,
                hints=self.hints,
            )
            for i, prompt in enumerate(self.prompts)
        ]
        if len(streams) == 1:  # the usual case: each generator in between costs every token
            async with aclosing(streams[0]) as only:
                async for delta in only:
                    yield delta.index, delta
            return
        async with aclosing(merged(streams)) as deltas:
            async for at, delta in deltas:
                yield at * n + delta.index, delta


class Counting:
    """The usage that each chunk of a stream bears: none, null, or what its choice has come to."""

    def __init__(self, ask: Ask) -> None:
        self._prompts = [len(prompt) for prompt in ask.prompts]
        self._said = [0] * ask.choices
        self._n = ask.params.n
        self._without = None if ask.include_usage else UNSET
        self._continuous = ask.continuous_usage

    def add(self, choice: int, step: Step) -> None:
        """Take one step of one choice in."""
        self._said[choice] += len(step.token_ids)
        if step.usage is not None:  # the last one knows better
            self._said[choice] = step.usage.completion_tokens

    def of(self, choice: int) -> WireUsage | UnsetType | None:
        """What a chunk of `choice` says now."""
        if not self._continuous:
            return self._without
        return WireUsage.so_far(self._prompts[choice // self._n], self._said[choice])


class Shape(Protocol):
    """How one API spells a response. What it returns are structs or plain values for `wire.encode`."""

    def opening(self, choice: int) -> list[object]:
        """Events before the first step of a choice."""

    def chunks(self, choice: int, step: Step) -> list[object]:
        """Events for one step."""

    def closing(self, usage: Usage, answers: Sequence[Answer]) -> list[object]:
        """Events after the last step of all choices."""

    def error(self, error: TriptychError) -> object:
        """The event that ends a stream that went wrong."""

    def whole(self, answers: Sequence[Answer], usage: Usage) -> object:
        """The response that is not streamed."""


_STREAM_OPTIONS = ("include_usage", "continuous_usage_stats", "include_obfuscation")


def stream_fields(fields: Fields) -> tuple[bool, bool, bool]:
    """`stream`, and of `stream_options` include_usage and continuous_usage_stats, which vLLM has and which means
    nothing without the former. Raises RequestError for options without a stream.
    """
    stream = fields.flag("stream")
    options = Fields(fields.entries("stream_options", 16))
    if fields.given("stream_options") and not stream:
        raise RequestError("stream_options needs stream to be true.", param="stream_options")
    for name in fields.entries("stream_options", 16):
        if name not in _STREAM_OPTIONS:
            raise RequestError(f"stream_options has no option {name[:60]!r}.", param="stream_options")
    try:
        usage = options.flag("include_usage")
        return stream, usage, options.flag("continuous_usage_stats") and usage
    except RequestError as error:
        raise RequestError(f"stream_options.{error.message}", param="stream_options") from None
