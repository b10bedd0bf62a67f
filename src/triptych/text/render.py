"""A conversation with tools and thinking as token ids (reference section 6.2):

    BOS effort? system tools? format? <|User|> body <|Assistant|><think> reasoning </think> text calls EOS ...

Nothing stands between the parts. Texts are encoded without control tokens, which are put in by id, so a user who types
a control token's spelling sends plain text. A turn that was sampled here is put in as the ids that were sampled.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from triptych.errors import ContextTooLong, RequestError
from triptych.text.history import History
from triptych.text.tokenizer import Tokenizer
from triptych.text.tools import DSML, call_start, calls_parts, tools_block
from triptych.text.turns import Assistant, System, Turn, User
from triptych.words import TokenIds

_USER, _ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
_THINK, _END_THINK = "<think>", "</think>"
_CONTROLS = re.compile(f"({_THINK}|{_END_THINK}|{DSML})")

_EFFORTS = {
    "high": """Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.

""",  # noqa: E501
    "max": """Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.
You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying cause rather than any surface symptom.
Do not stop reasoning until you have independently verified the solution from multiple angles and are certain that no assumption remains unchecked and no error remains undiscovered.

""",  # noqa: E501
}
EFFORTS = {"minimal": "", "low": "", "medium": "high", "high": "high", "xhigh": "high", "max": "max"}
"""What clients may ask for, and whose words it is rendered with; low has none."""


@dataclass(frozen=True, slots=True)
class Style:
    """How a conversation is rendered. `force`: the answer has to begin with a call, of this tool or ("") of any."""

    thinking: bool = False
    effort: str = "low"
    functions: tuple[dict[str, object], ...] = ()
    response_format: str = ""
    force: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """Token ids [n], the boundaries of its turns, and how many of the ids at the end are the answer's forced begin."""

    ids: TokenIds
    boundaries: tuple[int, ...]
    forced: int = 0


def format_block(schema: object) -> str:
    """What the system prompt says about a response format: None asks for any JSON object."""
    if schema is None:
        return (
            "You are a helpful assistant designed to output JSON.\n## Response Format:\n\nReply with JSON object ONLY."
        )
    text = json.dumps(schema, ensure_ascii=False)
    return f"## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n{text}"


def render_turns(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    style: Style,
    *,
    limit: int,
    history: History | None = None,
    salt: str = "",
) -> Prompt:
    """The prompt that asks for the next assistant turn. Raises ContextTooLong beyond `limit` tokens."""
    writer = _Writer(tokenizer, limit)
    if style.thinking:
        writer.text(_EFFORTS.get(EFFORTS.get(style.effort, ""), ""))
    first = turns[0] if turns else None
    writer.text(first.text if isinstance(first, System) else "")
    if style.functions:
        before, schemas, after = tools_block(style.functions)
        writer.text("\n\n" + before, controls=True)
        writer.text(schemas)
        writer.text(after, controls=True)
    if style.response_format:
        writer.text("\n\n" + style.response_format)
    writer.mark()
    last_user = max((i for i, turn in enumerate(turns) if isinstance(turn, User)), default=-1)
    order: list[str] = []
    for i, turn in enumerate(turns):
        if isinstance(turn, User):
            writer.control(_USER)
            writer.text(turn.body(order))
            writer.mark()
        elif isinstance(turn, Assistant):
            # without tools only the turns after the last question keep their thoughts
            keeps = style.thinking and (bool(style.functions) or i > last_user)
            writer.assistant(turn, keeps)
            order = [call.id for call in turn.calls]
    writer.slot(style.thinking)
    return writer.prompt(style, history, salt)


class _Writer:
    """Collects texts, control ids and marks; encodes all texts in one go at the end."""

    def __init__(self, tokenizer: Tokenizer, limit: int) -> None:
        if tokenizer.bos_id is None or tokenizer.eos_id is None:
            raise RequestError("This model's tokenizer names no BOS or EOS token, which chat needs.")
        self._tokenizer = tokenizer
        self._limit = limit
        self._eos = tokenizer.eos_id
        self._texts: list[str] = []
        # what follows what: an index into the texts, an id as [id], a mark, or a turn that may be remembered
        self._parts: list[int | list[int] | tuple[Assistant, int] | None] = [[tokenizer.bos_id]]

    def text(self, text: str, *, controls: bool = False) -> None:
        """Plain text; with `controls`, text of ours, in which control tokens are meant as such."""
        for i, piece in enumerate(_CONTROLS.split(text) if controls else [text]):
            if i % 2:
                self.control(piece)
            elif piece:
                self._plain(piece)

    def _plain(self, text: str) -> None:
        if self._parts and isinstance(self._parts[-1], int):
            self._texts[-1] += text  # what touches is encoded together
            return
        self._texts.append(text)
        self._parts.append(len(self._texts) - 1)

    def control(self, spelling: str) -> None:
        self._parts.append([self._tokenizer.control_id(spelling)])

    def mark(self) -> None:
        self._parts.append(None)

    def slot(self, thinking: bool) -> None:
        self.control(_ASSISTANT)
        self.control(_THINK if thinking else _END_THINK)

    def assistant(self, turn: Assistant, keeps: bool) -> None:
        """A whole turn; where its ids are remembered they take the place of what follows the slot."""
        self.slot(keeps)
        at = len(self._parts)
        self._parts.append((turn, 0))
        if keeps:
            self.text(turn.reasoning or "")
            self.control(_END_THINK)
        self.text(turn.text)
        for text, controls in calls_parts(turn.calls) if turn.calls else ():
            self.text(text, controls=controls)
        self._parts.append([self._eos])
        self._parts[at] = (turn if keeps else replace(turn, reasoning=None), len(self._parts) - at - 1)
        self.mark()

    def prompt(self, style: Style, history: History | None, salt: str) -> Prompt:
        """All of it as ids."""
        forced = self._force(style)
        encoded = self._tokenizer.encode_texts(self._texts, limit=self._limit)
        out: list[TokenIds] = []
        marks: list[int] = []
        state = hashlib.blake2b(digest_size=16)
        position = at = 0
        while at < len(self._parts):
            part = self._parts[at]
            at += 1
            if part is None:
                marks.append(position)
                continue
            if isinstance(part, tuple):
                turn, length = part
                found = None
                if history is not None:
                    found = history.recall(salt, state.copy().hexdigest(), int(out[-1][-1]), turn)
                if found is None:
                    continue
                at += length
                ids = found if len(found) and found[-1] == self._eos else np.append(found, np.int32(self._eos))
            else:
                ids = encoded[part] if isinstance(part, int) else np.asarray(part, dtype=np.int32)
            ids = np.ascontiguousarray(ids, dtype=np.int32)
            out.append(ids)
            state.update(ids.tobytes())
            position += len(ids)
        whole = np.concatenate(out)
        if len(whole) > self._limit:
            sentence = f"The prompt has {len(whole)} tokens; at most {self._limit} fit here."
            raise ContextTooLong(sentence, "Shorten the prompt.")
        whole.flags.writeable = False
        ends = [encoded[part] if isinstance(part, int) else part for part in self._parts[forced:]]
        return Prompt(whole, tuple(marks), sum(len(part) for part in ends if not isinstance(part, tuple | None)))

    def _force(self, style: Style) -> int:
        """Begin the answer for the model where it must call a tool; the index of the first part that does so."""
        before = len(self._parts)
        if style.force is not None:
            if style.thinking:
                self.control(_END_THINK)
            self.text(call_start(style.force or None), controls=True)
        return before
