"""A conversation to go on, whatever API it came in, made into what the engine runs and what reads its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from triptych.errors import Unsupported
from triptych.server.ask import Desk
from triptych.server.pieces import Answer, PlainReader, Reader
from triptych.server.sampling import blaming
from triptych.text.chat import render
from triptych.text.messages import parse_messages
from triptych.words import SamplingParams, TokenIds


@dataclass(frozen=True, slots=True)
class Talk:
    """The parts of a conversation, as OpenAI's chat API spells them."""

    messages: object
    tools: list[object] = field(default_factory=list)
    tool_choice: object = None
    parallel_tool_calls: bool = True
    response_format: object = None
    thinking: bool | None = None
    effort: str | None = None


def _nothing(choice: int, answer: Answer) -> None:
    """Nothing is remembered."""


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """A prompt with its boundaries, how to sample, what reads the answer and who is told its end."""

    ids: TokenIds
    marks: tuple[int, ...]
    params: SamplingParams
    reader: Callable[[], Reader] = PlainReader
    ended: Callable[[int, Answer], None] = _nothing


def prepare(talk: Talk, desk: Desk, params: SamplingParams) -> Ready:
    """What the engine needs for `talk`. Tokenises: not for the event loop. Raises RequestError."""
    _refuse_what_is_not_built(talk)
    messages = parse_messages(talk.messages)
    with blaming("messages"):
        prompt = render(messages, desk.engine.tokenizer, limit=desk.engine.max_context - 1)
    return Ready(prompt.ids, prompt.boundaries, params)


def _refuse_what_is_not_built(talk: Talk) -> None:
    asked = {
        "tools": bool(talk.tools),
        "tool_choice": talk.tool_choice not in (None, "auto", "none"),
        "response_format": talk.response_format not in (None, {"type": "text"}),
        "thinking": bool(talk.thinking),
        "reasoning_effort": talk.effort not in (None, "none"),
    }
    for name, wanted in asked.items():
        if wanted:
            raise Unsupported(f"{name} is not supported.", "Leave it out.", param=name)
