"""Chat messages with tools and reasoning, as OpenAI's clients send them, as the turns that the encoding knows."""

from __future__ import annotations

from dataclasses import dataclass, field

from triptych.errors import RequestError, UnknownField, Unsupported, nearest
from triptych.text.tools import ToolCall

JOINT = "\n\n"  # between text parts and between messages that merge, as DeepSeek's own request conversion does


@dataclass(slots=True)
class System:
    """What the operator says; all system messages together, first."""

    text: str


@dataclass(slots=True)
class Reminder:
    """What holds for the next answer only, said without a role's turn."""

    text: str


@dataclass(slots=True)
class User:
    """What tools returned, then what the user says."""

    texts: list[str] = field(default_factory=list)
    results: dict[str, str] = field(default_factory=dict)  # tool_call_id -> result

    def body(self, order: list[str]) -> str:
        """The whole text: results in the order of the calls, then what the user said."""
        known = [name for name in order if name in self.results]
        rest = [name for name in self.results if name not in known]
        results = [f"<tool_result>{self.results[name]}</tool_result>" for name in [*known, *rest]]
        said = JOINT.join(filter(None, self.texts))
        return JOINT.join([*results, said] if self.texts else results)


@dataclass(slots=True)
class Assistant:
    """What the model said. `reasoning` is None where it was not sent back; `open`: the answer goes on with it."""

    text: str
    reasoning: str | None = None
    calls: tuple[ToolCall, ...] = ()
    open: bool = False


Turn = System | User | Reminder | Assistant

_ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")
_FIELDS = {
    "assistant": {"tool_calls", "reasoning_content", "reasoning", "prefix"},
    "tool": {"tool_call_id"},
}
# labels, and what clients echo of an earlier answer
_IGNORED = {"name", "annotations", "refusal", "audio", "function_call", "prompt_cache_breakpoint"}


def parse_turns(raw: object) -> list[Turn]:
    """The turns of `messages`. Raises RequestError whose `param` is the path of the fault."""
    if not isinstance(raw, list):
        raise RequestError("messages must be a list of objects with role and content.", param="messages")
    if not raw:
        raise RequestError("messages is empty.", "Send at least one message.", param="messages")
    turns: list[Turn] = []
    system: list[str] = []
    called: set[str] = set()
    for i, message in enumerate(raw):
        at = f"messages[{i}]"
        role = _role(message, at)
        if role == "system":
            system.append(_content(message.get("content"), f"{at}.content"))
        elif role == "assistant":
            turns.append(_assistant(message, at, called, last=i + 1 == len(raw)))
        elif role == "latest_reminder":
            turns.append(Reminder(_content(message.get("content"), f"{at}.content")))
        else:
            last = turns[-1] if turns else None
            if not isinstance(last, User) or (role == "tool" and last.texts):
                last = User()
                turns.append(last)
            _said(last, role, message, at, called)
    if turns and isinstance(turns[-1], Assistant) and turns[-1].open and not (turns[-1].text or turns[-1].reasoning):
        turns.pop()  # nothing to go on with
    text = JOINT.join(filter(None, system))
    return [System(text), *turns] if text else turns


def _role(raw: object, at: str) -> str:
    if not isinstance(raw, dict):
        raise RequestError(f"{at} must be an object with role and content.", param=at)
    role = raw.get("role")
    if not isinstance(role, str):
        raise RequestError(f"{at}.role must be one of {', '.join(_ROLES)}.", param=f"{at}.role")
    if role not in _ROLES:
        raise RequestError(
            f"{at}.role is {role[:80]!r}, which is no known role.", nearest(role[:80], _ROLES), param=f"{at}.role"
        )
    known = {"role", "content"} | _IGNORED | _FIELDS.get(role, set())
    for name in raw:
        if name in known or (raw[name] in (None, [], "") and name in ("tool_calls", "tool_call_id", "prefix")):
            continue
        raise UnknownField(
            f"Unknown field {name[:60]!r} in {at}.", nearest(name[:60], known), param=f"{at}.{name}"[:80]
        )
    return "system" if role == "developer" else role


def _said(turn: User, role: str, raw: dict[str, object], at: str, called: set[str]) -> None:
    text = _content(raw.get("content"), f"{at}.content")
    if role == "user":
        turn.texts.append(text)
        return
    name = raw.get("tool_call_id")
    if not isinstance(name, str) or not name:
        raise RequestError(f"{at}.tool_call_id is missing.", "Name the call this answers.", param=f"{at}.tool_call_id")
    if name not in called:
        raise RequestError(
            f"{at}.tool_call_id {name[:60]!r} answers no call of an earlier assistant message.",
            nearest(name[:60], called),
            param=f"{at}.tool_call_id",
        )
    turn.results[name] = text


def _assistant(raw: dict[str, object], at: str, called: set[str], *, last: bool) -> Assistant:
    items = raw.get("tool_calls") or []
    if not isinstance(items, list):
        raise RequestError(f"{at}.tool_calls must be a list.", param=f"{at}.tool_calls")
    calls = tuple(_call(item, f"{at}.tool_calls[{i}]") for i, item in enumerate(items))
    called.update(call.id for call in calls)
    reasoning = raw.get("reasoning_content")
    reasoning = raw.get("reasoning") if reasoning is None else reasoning
    if reasoning is not None and not isinstance(reasoning, str):
        raise RequestError(f"{at}.reasoning_content must be a string.", param=f"{at}.reasoning_content")
    content = raw.get("content")
    text = "" if content is None and calls else _content(content, f"{at}.content")
    is_open = raw.get("prefix")
    if is_open is not None and not isinstance(is_open, bool):
        raise RequestError(f"{at}.prefix must be true or false.", param=f"{at}.prefix")
    if is_open and (calls or not last):
        why = "has tool calls" if calls else "is not the last"
        raise RequestError(f"{at}.prefix is set, but the message {why}.", "Leave it out.", param=f"{at}.prefix")
    return Assistant(text, reasoning, calls, bool(is_open))


def _call(raw: object, at: str) -> ToolCall:
    function = raw.get("function") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or not isinstance(function, dict):
        raise RequestError(f"{at} must be an object with id and function.", param=at)
    texts = {"id": raw.get("id"), "function.name": function.get("name")}
    texts["function.arguments"] = function.get("arguments", "{}")
    for name, value in texts.items():
        if not isinstance(value, str):
            raise RequestError(f"{at}.{name} must be a string.", param=f"{at}.{name}")
    return ToolCall(*map(str, texts.values()))


def _content(raw: object, at: str) -> str:
    if isinstance(raw, str):
        return raw
    if raw is None:
        raise RequestError(f"{at} is missing.", "Give a string or a list of text parts.", param=at)
    if not isinstance(raw, list) or not raw:
        raise RequestError(f"{at} must be a string or a non-empty list of text parts.", param=at)
    return JOINT.join(_part(part, f"{at}[{i}]") for i, part in enumerate(raw))


def _part(raw: object, at: str) -> str:
    if not isinstance(raw, dict) or not isinstance(raw.get("type"), str):
        raise RequestError(f'{at} must be an object like {{"type": "text", "text": "..."}}.', param=at)
    if raw["type"] == "refusal" and isinstance(raw.get("refusal"), str):
        return str(raw["refusal"])
    if raw["type"] != "text":
        raise Unsupported(f"{at} is of type {raw['type'][:80]!r}; only text is supported.", "Send text.", param=at)
    if not isinstance(raw.get("text"), str):
        raise RequestError(f"{at}.text must be a string.", param=f"{at}.text")
    return str(raw["text"])
