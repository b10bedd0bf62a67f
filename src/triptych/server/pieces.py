"""What an answer is made of, whatever API it goes out in: reasoning, text and tool calls, as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from triptych.text.pieces import CallBegin, CallText, Content, Piece, Reasoning
from triptych.words import Delta, PromptLogprobs, TokenLogprob, Usage

__all__ = ["Answer", "Call", "CallBegin", "CallText", "Content", "Piece", "PlainReader", "Reader", "Reasoning", "Step"]


@dataclass(frozen=True, slots=True)
class Step:
    """What one delta of one choice adds. `finish`: stop, length or tool_calls. `stop`: the stop string that was met."""

    pieces: Sequence[Piece] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: str | None = None
    stop: str | None = None
    usage: Usage | None = None
    prompt: PromptLogprobs | None = None


@dataclass(slots=True)
class Call:
    """One tool call, collected."""

    id: str
    name: str
    parts: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> str:
        """The arguments as JSON text, perhaps cut off if the answer was."""
        return "".join(self.parts)


@dataclass(slots=True)
class Answer:
    """One choice, collected."""

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reasoning_tokens: int = 0
    finish: str = ""
    stop: str | None = None
    prompt: PromptLogprobs | None = None

    @property
    def text(self) -> str:
        """All of the answer's text."""
        return "".join(self.texts)

    @property
    def reasoning(self) -> str:
        """All that was thought."""
        return "".join(self.thoughts)

    def add(self, step: Step) -> None:
        """Take one step in."""
        self.token_ids += step.token_ids
        self.logprobs += step.logprobs
        self.prompt = step.prompt or self.prompt
        only_thoughts = bool(step.pieces)
        for piece in step.pieces:
            if isinstance(piece, Reasoning):
                self.thoughts.append(piece.text)
                continue
            only_thoughts = False
            if isinstance(piece, Content):
                self.texts.append(piece.text)
            elif isinstance(piece, CallBegin):
                self.calls.append(Call(piece.id, piece.name))
            else:
                self.calls[piece.index].parts.append(piece.text)
        if only_thoughts:
            self.reasoning_tokens += len(step.token_ids)
        if step.finish is not None:
            self.finish, self.stop = step.finish, step.stop


class Reader(Protocol):
    """Reads one choice: from the engine's deltas to what they say."""

    def read(self, delta: Delta) -> Step:
        """What this delta adds."""


class PlainReader:
    """For raw completions: all text is content."""

    def read(self, delta: Delta) -> Step:
        """The delta's text as it is."""
        return Step(
            (Content(delta.text),) if delta.text else (),
            delta.token_ids,
            delta.logprobs,
            str(delta.finish_reason) if delta.finish_reason is not None else None,
            delta.stop,
            delta.usage,
            delta.prompt_logprobs,
        )
