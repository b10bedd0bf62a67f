"""Chat messages as a client sends them, checked and made plain. What cannot be honoured yet is refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from triptych.errors import RequestError, UnknownField, Unsupported, nearest

_JOINT = "\n\n"  # between text parts and between messages that merge, as DeepSeek's own request conversion does


class Role(StrEnum):
    """Who speaks. Other roles of the API are refused until their encoding is built."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn, text only."""

    role: Role
    text: str


_LATER = {
    "tool": "Tool results are not supported yet.",
    "function": "Function results are not supported yet.",
    "latest_reminder": "Reminders are not supported yet.",
    "developer": "Use 'system' instead.",
}
# read and deliberately without effect: labels, and what clients echo of an earlier answer
_IGNORED = {"name", "annotations", "reasoning_content", "reasoning"}
_REFUSED_UNLESS_EMPTY = {"tool_calls", "function_call", "audio", "refusal", "tool_call_id", "prefix"}


def parse_messages(raw: object) -> tuple[Message, ...]:
    """The `messages` of a request body. Raises RequestError whose `param` is the path of the fault."""
    if not isinstance(raw, list):
        raise RequestError("messages must be a list of objects with role and content.", param="messages")
    if not raw:
        raise RequestError("messages is empty.", "Send at least one message.", param="messages")
    return tuple(_message(item, f"messages[{i}]") for i, item in enumerate(raw))


def _message(raw: object, at: str) -> Message:
    if not isinstance(raw, dict):
        raise RequestError(f"{at} must be an object with role and content.", param=at)
    role = _role(raw.get("role"), f"{at}.role")
    for name, value in raw.items():
        if name in _REFUSED_UNLESS_EMPTY:
            if value:
                raise Unsupported(f"{at}.{name} is not supported yet.", "Leave it out.", param=f"{at}.{name}")
        elif name not in _IGNORED and name not in ("role", "content"):
            known = {"role", "content"} | _IGNORED
            raise UnknownField(f"Unknown field {name!r:.80} in {at}.", nearest(name[:80], known), param=at)
    return Message(role, _content(raw.get("content"), f"{at}.content"))


def _role(raw: object, at: str) -> Role:
    if not isinstance(raw, str):
        raise RequestError(f"{at} must be one of system, user, assistant.", param=at)
    if raw in _LATER:
        raise Unsupported(f"{at} is {raw!r}.", _LATER[raw], param=at)
    try:
        return Role(raw)
    except ValueError:
        raise RequestError(
            f"{at} is {raw[:80]!r}, which is no known role.", nearest(raw[:80], map(str, Role)), param=at
        ) from None


def _content(raw: object, at: str) -> str:
    if isinstance(raw, str):
        return raw
    if raw is None:
        raise RequestError(f"{at} is missing.", "Give a string or a list of text parts.", param=at)
    if not isinstance(raw, list) or not raw:
        raise RequestError(f"{at} must be a string or a non-empty list of text parts.", param=at)
    return _JOINT.join(_part(part, f"{at}[{i}]") for i, part in enumerate(raw))


def _part(raw: object, at: str) -> str:
    if not isinstance(raw, dict) or not isinstance(raw.get("type"), str):
        raise RequestError(f'{at} must be an object like {{"type": "text", "text": "..."}}.', param=at)
    if raw["type"] != "text":
        raise Unsupported(f"{at} is of type {raw['type'][:80]!r}; only text is supported.", "Send text.", param=at)
    if not isinstance(raw.get("text"), str):
        raise RequestError(f"{at}.text must be a string.", param=f"{at}.text")
    return str(raw["text"])


def merge(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """System texts joined and first, runs of user messages joined: the turns that the encoding has words for."""
    system = [m.text for m in messages if m.role is Role.SYSTEM]
    turns: list[Message] = [Message(Role.SYSTEM, _JOINT.join(system))] if system else []
    for message in messages:
        if message.role is Role.SYSTEM:
            continue
        if turns and message.role is Role.USER and turns[-1].role is Role.USER:
            turns[-1] = Message(Role.USER, turns[-1].text + _JOINT + message.text)
        else:
            turns.append(message)
    return tuple(turns)
