"""From a conversation to token ids, with the places where prompts of one family part ways.

    turns --spell--> text and its control tokens --encode--> ids

Texts between control tokens are encoded without control vocabulary; control tokens are put in by id. A turn that was
sampled here is put in as the ids that were sampled (see `history`).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from triptych.errors import ContextTooLong, RequestError
from triptych.text import recipe
from triptych.text.history import History
from triptych.text.spell import (
    ASSISTANT,
    BOS,
    REMINDER,
    USER,
    PlainEncoding,
    Spelled,
    Style,
    keeps_reasoning,
    system_text,
)
from triptych.text.tokenizer import Tokenizer
from triptych.text.turns import Assistant, Turn
from triptych.words import TokenIds

_ROLES = (USER, ASSISTANT, REMINDER)


class ChatEncoding(Protocol):
    """How a conversation is written down. All encodings of one model give the same text."""

    def spell(self, turns: Sequence[Turn], style: Style) -> Spelled:
        """The prompt that asks for the next assistant turn, or for more of the last one."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """Token ids [n] and the semantic boundaries in them, ascending.

    `ids[:b]` of a boundary b is where prompts part ways: the ends of the system text, of the tools, of each turn (of an
    assistant's its EOS included). `forced`: how many ids at the end belong to the answer's own turn, whether it goes on
    with a message or has to begin with a call.
    """

    ids: TokenIds
    boundaries: tuple[int, ...]
    forced: int = 0


@functools.cache
def default_encoding() -> ChatEncoding:
    """DeepSeek's own where it is installed, else the plain one."""
    return recipe.RecipeEncoding() if recipe.available() else PlainEncoding()


def render_turns(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    style: Style,
    *,
    limit: int,
    history: History | None = None,
    salt: str = "",
    encoding: ChatEncoding | None = None,
) -> Prompt:
    """The prompt that asks for the next assistant turn.

    Raises ContextTooLong beyond `limit` tokens, RequestError for what cannot be spelled.
    """
    if tokenizer.bos_id is None or tokenizer.eos_id is None:
        raise RequestError("This model's tokenizer names no BOS or EOS token, which chat needs.")
    try:
        spelled = (encoding or default_encoding()).spell(turns, style)
    except RecursionError:  # of DeepSeek's package beyond 128 levels, of our own beyond some hundreds
        raise RequestError("A schema or an argument of a tool is nested too deeply.", "Use fewer levels.") from None
    outline = _Outline(spelled, turns, style)
    writer = _Writer(spelled, tokenizer, limit)
    for turn, start, end in outline.said:
        writer.until(start)
        if history is not None:
            found = history.recall(salt, writer.digest(), writer.last, turn)
            if found is not None:
                writer.replace(found, end)
        writer.until(end)
    writer.until(outline.begins)
    before = writer.position
    writer.until(len(spelled.text))
    ids = writer.ids(limit)
    return Prompt(ids, writer.places(outline.marks), len(ids) - before)


class _Outline:
    """What stands where in a spelled prompt, in characters: marks, remembered turns, the begin of the answer's turn."""

    def __init__(self, spelled: Spelled, turns: Sequence[Turn], style: Style) -> None:
        text = spelled.text
        said = iter([turn for turn in turns if isinstance(turn, Assistant)])
        roles = [(i, start) for i, (start, end) in enumerate(spelled.controls) if text[start:end] in _ROLES]
        head = roles[0][1] if roles else len(text)
        system = len(BOS) + len(style.preamble) + len(system_text(turns))
        tools = head - len(style.ending)
        marks = {system if system > len(BOS) else head, tools, head}
        self.said: list[tuple[Assistant, int, int]] = []
        self.begins = len(text)
        for (i, start), after in zip(roles, [*roles[1:], (-1, len(text))], strict=True):
            _, end = spelled.controls[i]
            if text[start:end] != ASSISTANT:
                marks.add(after[1])
                continue
            slot = spelled.controls[i + 1][1]
            turn = next(said, None)
            if turn is None or turn.open:  # what is to be answered
                self.begins = slot
                continue
            # without its thoughts a turn is remembered as it is after them
            shown = turn if keeps_reasoning(turn, style) else Assistant(turn.text, None, turn.calls)
            self.said.append((shown, slot, after[1]))
            marks.add(after[1])
        self.marks = sorted(mark for mark in marks if mark <= self.begins)


class _Writer:
    """Turns a spelled prompt into ids from its beginning to its end; remembered ids may take the place of a part."""

    def __init__(self, spelled: Spelled, tokenizer: Tokenizer, limit: int) -> None:
        self._tokenizer = tokenizer
        edges = [0]
        for start, end in spelled.controls:
            edges += [start, end]
        edges.append(len(spelled.text))
        spans = list(itertools.pairwise(edges))  # text, control, text, ... control, text
        texts = [spelled.text[start:end] for start, end in spans[::2]]
        encoded = tokenizer.encode_texts(texts, limit=limit)
        controls = [tokenizer.control_id(spelled.text[start:end]) for start, end in spans[1::2]]
        self._ids = [
            np.array([controls[i // 2]], dtype=np.int32) if i % 2 else encoded[i // 2] for i in range(len(spans))
        ]
        self._spans = spans
        self._spelled = spelled
        self._at = 0
        self._out: list[tuple[int, int, TokenIds]] = []  # characters [start, end), ids
        self._digest = hashlib.blake2b(digest_size=16)
        self.position = 0
        self.last = -1

    def until(self, end: int) -> None:
        """Write all spans that end at or before the character `end`, which lies between spans."""
        while self._at < len(self._spans) and self._spans[self._at][1] <= end:
            self._put(*self._spans[self._at], self._ids[self._at])
            self._at += 1

    def replace(self, ids: TokenIds, end: int) -> None:
        """Write `ids`, and EOS where they lack it, instead of what stands before the character `end`."""
        eos = self._tokenizer.eos_id
        if not len(ids) or ids[-1] != eos:
            ids = np.append(ids, np.int32(eos or 0))
        start = self._spans[self._at][0]
        while self._at < len(self._spans) and self._spans[self._at][1] <= end:
            self._at += 1
        self._put(start, end, ids)

    def digest(self) -> str:
        """A digest of all ids so far."""
        return self._digest.copy().hexdigest()

    def _put(self, start: int, end: int, ids: TokenIds) -> None:
        if len(ids):
            ids = np.ascontiguousarray(ids, dtype=np.int32)
            self._out.append((start, end, ids))
            self._digest.update(ids.tobytes())
            self.position += len(ids)
            self.last = int(ids[-1])

    def ids(self, limit: int) -> TokenIds:
        """All that was written. Raises ContextTooLong beyond `limit`."""
        whole = np.concatenate([ids for _, _, ids in self._out])
        if len(whole) > limit:
            raise ContextTooLong(
                f"The prompt has {len(whole)} tokens; at most {limit} fit here.", "Shorten the prompt."
            )
        whole.flags.writeable = False
        return whole

    def places(self, marks: Sequence[int]) -> tuple[int, ...]:
        """Token positions of characters; of one inside a token, the token's begin."""
        found: set[int] = set()
        left = list(marks)
        position = 0
        for start, end, ids in self._out:
            while left and left[0] <= end:
                mark = left.pop(0)
                inside = 0 if mark <= start else len(ids) if mark == end else self._inside(start, mark, ids)
                found.add(position + inside)
            position += len(ids)
        return tuple(sorted(found - {0, 1}))

    def _inside(self, start: int, mark: int, ids: TokenIds) -> int:
        ends = np.cumsum([len(self._tokenizer.token_bytes(int(token))) for token in ids])
        return int(np.searchsorted(ends, len(self._spelled.text[start:mark].encode("utf-8")), side="right"))
