"""Reading what DeepSeek-V4 writes, as it comes: reasoning, text, and tool calls in DSML (reference section 6.5).

Whatever the model writes, the result is well formed: no fragment of markup reaches the text, calls have a known name,
complete arguments are JSON objects. How the text was cut into pieces does not change what comes out.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Collection

from triptych.text.numbers import loads
from triptych.text.pieces import CallBegin, CallText, Content, Piece, Reasoning
from triptych.text.tools import DSML

_OPEN, _CLOSE = f"<{DSML}", f"</{DSML}"
_THINK, _END_THINK = "<think>", "</think>"
_END_VALUE = f"</{DSML}parameter>"
_MARKERS = (_OPEN, _CLOSE, _THINK, _END_THINK, DSML)
_LONGEST_MARKER = max(map(len, _MARKERS))
_FIRSTS = frozenset(marker[0] for marker in _MARKERS)
_SUSPECT = re.compile(f"[{''.join(sorted(_FIRSTS))}\n]")  # without these, text is only text
_LONGEST_TAG = 1024  # characters; what is longer is no tag
_ATTRIBUTES = re.compile(r'.*? name="(.*?)"(?: string="(\w+)")?>', re.DOTALL)
_MARKER = re.compile("|".join(map(re.escape, _MARKERS)))


def new_call_id() -> str:
    """A fresh id of a tool call."""
    return f"call_{uuid.uuid4().hex[:24]}"


class OutputParser:
    """Reads one answer. `thinking`: it begins inside <think>. `tools`: names that may be called.

    Calls of other names are dropped, and with `parallel` False all but the first.
    """

    def __init__(
        self,
        *,
        thinking: bool = False,
        tools: Collection[str] = (),
        parallel: bool = True,
        call_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._read = self._reasoning if thinking else self._content
        self._tools = frozenset(tools)
        self._parallel = parallel
        self._call_id = call_id
        self._buffer = ""
        self._tail = ""  # what was shown last
        self._out: list[Piece] = []
        self._ended = False
        self.calls = 0
        self._index = -1  # of the open call; -1 while there is none or it is dropped
        self._keys: set[str] = set()
        self._is_string = False
        self._raw: list[str] = []  # a value that is JSON, until it is whole
        self._dropped = False

    @property
    def in_reasoning(self) -> bool:
        """True while what comes is thought and not said."""
        return self._read == self._reasoning

    def push(self, text: str) -> list[Piece]:
        """What `text` adds that is certain."""
        if not self._buffer and text and not _SUSPECT.search(self._tail + text):
            kind = self._plain_kind()  # the usual token, at a fraction of the work
            if kind is not None:
                self._say_text(kind, text)
                return self._taken()
        self._buffer += text
        while self._read():
            pass
        return self._taken()

    def finish(self) -> list[Piece]:
        """What was held back, once no more text comes. Markup that was never finished is dropped."""
        self._ended = True
        while self._read():
            pass
        return self._taken()

    def _taken(self) -> list[Piece]:
        out, self._out = self._out, []
        if len(out) < 2:
            return out
        merged: list[Piece] = []
        for piece in out:
            last = merged[-1] if merged else None
            if isinstance(piece, Content) and isinstance(last, Content):
                merged[-1] = Content(last.text + piece.text)
            elif isinstance(piece, Reasoning) and isinstance(last, Reasoning):
                merged[-1] = Reasoning(last.text + piece.text)
            elif isinstance(piece, CallText) and isinstance(last, CallText) and piece.index == last.index:
                merged[-1] = CallText(piece.index, last.text + piece.text)
            else:
                merged.append(piece)
        return merged

    def _plain_kind(self) -> type[Content] | type[Reasoning] | None:
        if self._read == self._content:
            return Content
        return Reasoning if self.in_reasoning else None

    # -- states: each takes from the buffer and returns True if there may be more to do

    def _reasoning(self) -> bool:
        return self._said(Reasoning)

    def _content(self) -> bool:
        return self._said(Content)

    def _said(self, kind: type[Content] | type[Reasoning]) -> bool:
        """Text up to the next marker, and that marker.

        What was shown last is looked at too: where a marker was taken out, its neighbours may make up another one.
        """
        shown = len(self._tail)
        joined = self._tail + self._buffer
        found = _MARKER.search(joined)
        if found is None:
            self._emit(kind, self._safe(joined, newlines=kind is Content) - shown)
            return False
        if found.start() < shown:
            self._buffer = joined[found.end() :]
            return True
        before, self._buffer = joined[shown : found.start()], joined[found.start() :]
        if kind is Content and found[0] in (_OPEN, _CLOSE):  # the blank line before a call belongs to it
            before = before.removesuffix("\n\n")
        self._say_text(kind, before)
        state = self._read
        taken = self._marker(found[0])
        if self._read != state:
            self._tail = ""
        return taken

    def _marker(self, marker: str) -> bool:
        """Take the marker that the buffer begins with; False if its tag is not whole yet."""
        if marker in (_OPEN, _CLOSE):
            tag = self._tag()
            if tag is not None:
                self._enter(tag)
            return tag is not None
        self._buffer = self._buffer.removeprefix(marker)  # alone it says nothing, unless it ends the thoughts
        if marker == _END_THINK:
            self._read = self._content
        return True

    def _calls(self) -> bool:
        """Between tags of a block of calls: only tags count."""
        at = self._buffer.find("<")
        self._buffer = "" if at < 0 else self._buffer[at:]
        if not self._buffer:
            return False
        if not (self._buffer.startswith((_OPEN, _CLOSE))):
            if (_OPEN.startswith(self._buffer) or _CLOSE.startswith(self._buffer)) and not self._ended:
                return False
            self._buffer = self._buffer[1:]
            return True
        tag = self._tag()
        if tag is not None:
            self._enter(tag)
        return tag is not None

    def _value(self) -> bool:
        """Inside a parameter: all is its value up to the exact closing tag."""
        at = self._buffer.find(_END_VALUE)
        keep = 0 if self._ended else _overlap(self._buffer, (_END_VALUE,))
        end = at if at >= 0 else len(self._buffer) - keep
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        if self._is_string:
            self._say(json.dumps(text, ensure_ascii=False)[1:-1])
        else:
            self._raw.append(text)
        if at < 0:
            return False
        self._buffer = self._buffer.removeprefix(_END_VALUE)
        self._close_value()
        self._read = self._calls
        return True

    # -- tags

    def _tag(self) -> str | None:
        """The tag that the buffer begins with, taken; None if it is not whole yet. Unfinished at the end: dropped."""
        named = self._buffer.startswith((_OPEN + "invoke ", _OPEN + "parameter "))
        mark = '">' if named else ">"  # a name may have any character
        at = self._buffer.find(mark, 0, _LONGEST_TAG)
        if at < 0 and not self._ended and len(self._buffer) < _LONGEST_TAG:
            return None
        if at < 0:
            cut = len(self._buffer) if len(self._buffer) < _LONGEST_TAG else len(_OPEN)
            self._buffer = self._buffer[cut:]
            return ""
        end = at + len(mark)
        again = [i for i in (self._buffer.find(_OPEN, 1, end), self._buffer.find(_CLOSE, 1, end)) if i > 0]
        if again and not named:  # a tag that broke off before another one
            self._buffer = self._buffer[min(again) :]
            return ""
        tag, self._buffer = self._buffer[:end], self._buffer[end:]
        return tag

    def _enter(self, tag: str) -> None:
        kind = tag[len(_OPEN) if tag.startswith(_OPEN) else len(_CLOSE) : -1].split(" ", 1)[0]
        if tag.startswith(_OPEN):
            found = _ATTRIBUTES.fullmatch(tag)
            name, is_string = (found[1], found[2] != "false") if found else ("", True)
            if kind == "tool_calls":
                self._read = self._calls
            elif kind == "invoke":
                self._end_call()
                self._begin_call(name)
                self._read = self._calls
            elif kind == "parameter" and self._read == self._calls:
                self._begin_value(name, is_string)
                self._read = self._value
        elif kind == "invoke":
            self._end_call()
        elif kind == "tool_calls":
            self._end_call()
            self._read = self._content

    def _begin_call(self, name: str) -> None:
        self._keys = set()
        self._index = -1
        if name in self._tools and (self._parallel or not self.calls):
            self._index = self.calls
            self.calls += 1
            self._out.append(CallBegin(self._index, self._call_id(), name))
            self._say("{")

    def _end_call(self) -> None:
        if self._index >= 0:
            self._say("}")
        self._index = -1

    def _begin_value(self, key: str, is_string: bool) -> None:
        self._is_string = is_string
        self._raw = []
        self._dropped = key in self._keys  # the first of two parameters of one name counts
        if not self._dropped:
            comma = ", " if self._keys else ""
            self._say(f"{comma}{json.dumps(key, ensure_ascii=False)}: " + ('"' if self._is_string else ""))
        self._keys.add(key)

    def _close_value(self) -> None:
        if self._is_string:
            self._say('"')
        else:
            text = "".join(self._raw)
            try:
                loads(text)
                self._say(text.strip())
            except ValueError:
                self._say(json.dumps(text, ensure_ascii=False))
        self._dropped = False

    def _say(self, text: str) -> None:
        if self._index >= 0 and text and not self._dropped:
            self._out.append(CallText(self._index, text))

    # -- text

    def _emit(self, kind: type[Content] | type[Reasoning], end: int) -> None:
        if end > 0:
            text, self._buffer = self._buffer[:end], self._buffer[end:]
            self._say_text(kind, text)

    def _say_text(self, kind: type[Content] | type[Reasoning], text: str) -> None:
        if text:
            self._out.append(kind(text))
            self._tail = (self._tail + text)[-_LONGEST_MARKER:]

    def _safe(self, text: str, *, newlines: bool) -> int:
        """How much of `text` can be no beginning of markup."""
        if self._ended:
            return len(text) - _overlap(text, (_OPEN, _CLOSE, DSML), least=3)
        end = len(text) - _overlap(text, _MARKERS)
        if newlines:
            end -= min(2, end - len(text[:end].rstrip("\n")))
        return end


def _overlap(text: str, markers: Collection[str], least: int = 1) -> int:
    """The length of the longest end of `text`, of at least `least` characters, that begins one of `markers`."""
    most = max(map(len, markers)) - 1
    for at in range(max(0, len(text) - most), len(text) - least + 1):
        if text[at] in _FIRSTS and any(marker.startswith(text[at:]) for marker in markers):
            return len(text) - at
    return 0
