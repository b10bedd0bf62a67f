"""The short way to a prompt: who said what, without tools and without thinking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from triptych.text.render import Prompt, render_turns
from triptych.text.spell import Style
from triptych.text.tokenizer import Tokenizer
from triptych.text.turns import parse_turns

_NO_LIMIT = 2**31


class Role(StrEnum):
    """Who speaks."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn, text only."""

    role: Role
    text: str


def render(messages: Sequence[Message], tokenizer: Tokenizer, *, limit: int | None = None) -> Prompt:
    """The prompt that asks for the next assistant turn. Raises ContextTooLong beyond `limit` tokens."""
    turns = parse_turns([{"role": str(message.role), "content": message.text} for message in messages])
    return render_turns(turns, tokenizer, Style(), limit=_NO_LIMIT if limit is None else limit)
