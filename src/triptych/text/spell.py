"""A conversation as DeepSeek-V4 reads it, as text (reference section 6.2):

    BOS effort? system tools? format? ( <|User|> body | <|latest_reminder|> text | <|Assistant|> turn )*
    <|Assistant|> slot

    turn   <think> reasoning </think> text calls EOS      with tools, where the model thinks
           </think> text calls EOS                        everywhere else
    slot   <think> or </think>, then what the answer has to begin with

Nothing stands between the parts. The text comes with the places of the control tokens in it: a user who types a control
token's spelling sends plain text. This is the plain renderer; it equals DeepSeek's own (see `recipe`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from triptych.text.numbers import dumps
from triptych.text.tools import DSML, calls_parts, tools_block
from triptych.text.turns import Assistant, Reminder, System, Turn, User

BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
USER, ASSISTANT, REMINDER = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<\uff5clatest_reminder\uff5c>"
THINK, END_THINK = "<think>", "</think>"
_CONTROLS = re.compile(f"({THINK}|{END_THINK}|{DSML})")

_EFFORT_TEXTS = {
    "high": """Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.

""",  # noqa: E501
    "max": """Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.
You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying cause rather than any surface symptom.
Do not stop reasoning until you have independently verified the solution from multiple angles and are certain that no assumption remains unchecked and no error remains undiscovered.

""",  # noqa: E501
}
_JSON_OBJECT = (
    "You are a helpful assistant designed to output JSON.\n## Response Format:\n\nReply with JSON object ONLY."
)
_JSON_SCHEMA = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
EFFORTS = {"minimal": "", "low": "", "medium": "high", "high": "high", "xhigh": "high", "max": "max"}
"""What clients may ask for, and whose words it is rendered with; low has none."""


@dataclass(frozen=True, slots=True)
class Style:
    """How a conversation is rendered.

    `response`: a response_format of type json_object or json_schema that the prompt is to tell the model.
    `begin`: what the answer begins with, control tokens in it meant as such.
    """

    thinking: bool = False
    effort: str = "low"
    functions: tuple[dict[str, object], ...] = ()
    response: dict[str, Any] | None = None
    begin: str = ""

    @property
    def preamble(self) -> str:
        """What stands before the system text."""
        return _EFFORT_TEXTS.get(EFFORTS.get(self.effort, ""), "") if self.thinking else ""

    @property
    def ending(self) -> str:
        """What stands after system text and tools."""
        if self.response is None:
            return ""
        inner = self.response.get("json_schema")
        schema = dumps(inner["schema"]) if inner else ""
        return "\n\n" + (_JSON_SCHEMA + schema if inner else _JSON_OBJECT)


@dataclass(frozen=True, slots=True)
class Spelled:
    """A prompt as text, and the ascending ranges [start, end) of the characters that are control tokens."""

    text: str
    controls: tuple[tuple[int, int], ...]


class PlainEncoding:
    """Renders in pure Python."""

    def spell(self, turns: Sequence[Turn], style: Style) -> Spelled:
        """The prompt that asks for the next assistant turn, or for more of the last one."""
        parts: list[str] = []
        controls: list[tuple[int, int]] = []
        at = 0
        for text, is_control in _parts(turns, style):
            if is_control:
                controls.append((at, at + len(text)))
            parts.append(text)
            at += len(text)
        return Spelled("".join(parts), tuple(controls))


def _parts(turns: Sequence[Turn], style: Style) -> Iterator[tuple[str, bool]]:
    """(text, is it a control token?)"""
    yield BOS, True
    yield style.preamble, False
    yield system_text(turns), False
    if style.functions:
        before, schemas, after = tools_block(style.functions)
        yield from ours("\n\n" + before)
        yield schemas, False
        yield from ours(after)
    yield style.ending, False
    calls: list[str] = []
    for turn in turns:
        if isinstance(turn, User):
            yield USER, True
            yield turn.body(calls), False
        elif isinstance(turn, Reminder):
            yield REMINDER, True
            yield turn.text, False
        elif isinstance(turn, Assistant):
            yield from _assistant(turn, style)
            calls = [call.id for call in turn.calls]
    if not continued(turns):
        yield ASSISTANT, True
        yield (THINK if style.thinking else END_THINK), True
    yield from ours(style.begin)


def _assistant(turn: Assistant, style: Style) -> Iterator[tuple[str, bool]]:
    yield ASSISTANT, True
    if keeps_reasoning(turn, style):
        yield THINK, True
        yield turn.reasoning or "", False
        if turn.text or not turn.open:
            yield END_THINK, True
    else:
        yield END_THINK, True
    yield turn.text, False
    for text, is_ours in calls_parts(turn.calls) if turn.calls else ():
        yield from ours(text) if is_ours else [(text, False)]
    if not turn.open:
        yield EOS, True


def keeps_reasoning(turn: Assistant, style: Style) -> bool:
    """With tools a thinking model sees all it thought; without, only what it is in the middle of."""
    return style.thinking and bool(style.functions or turn.open)


def continued(turns: Sequence[Turn]) -> Assistant | None:
    """The last turn, if the answer goes on with it."""
    last = turns[-1] if turns else None
    return last if isinstance(last, Assistant) and last.open else None


def system_text(turns: Sequence[Turn]) -> str:
    """The system text, which comes first; empty without one."""
    return turns[0].text if turns and isinstance(turns[0], System) else ""


def ours(text: str) -> Iterator[tuple[str, bool]]:
    """(text, is it a control token?) of text of ours, in which control tokens are meant as such."""
    for i, part in enumerate(_CONTROLS.split(text)):
        if part:
            yield part, i % 2 == 1
