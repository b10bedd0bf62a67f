"""OpenAI's /v1/responses: from its items to the conversation that every API here is read into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from triptych.errors import NotFound, RequestError, Unsupported, nearest
from triptych.server.ask import HARMLESS, Ask, Desk, Head
from triptych.server.fields import Fields, FieldTable, wrong
from triptych.server.hints import HINT_FIELDS, cache_hints
from triptych.server.sampling import SAMPLING_FIELDS, check_room, sampling_params
from triptych.server.store import Stored
from triptych.server.talk import Talk, prepare

FIELDS = FieldTable(
    read=(SAMPLING_FIELDS - {"n", "max_tokens"})
    | HINT_FIELDS
    | {"model", "input", "instructions", "max_output_tokens", "stream", "stream_options", "tools", "tool_choice"}
    | {
        "parallel_tool_calls",
        "reasoning",
        "text",
        "previous_response_id",
        "store",
        "metadata",
        "top_logprobs",
        "include",
    },
    harmless=(HARMLESS - {"metadata", "store", "parallel_tool_calls"})
    | {"client_metadata", "access_programs", "diagnostics", "truncation"},
    refused={
        "background": (False,),
        "conversation": (),
        "prompt": (),
        "max_tool_calls": (),
        "moderation": (),
        "context_management": ([],),
    },
)
_MOST_ITEMS = 100_000
_MOST_TOOLS = 1024
_INCLUDE = {"message.output_text.logprobs", "reasoning.encrypted_content"}


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What the response repeats of its request, and what storing it needs."""

    echo: dict[str, object]
    store: bool
    before: Stored | None
    new: list[object]
    items: object


def read_responses(raw: dict[str, object], desk: Desk) -> Ask:
    """The Ask in a body of /v1/responses. Tokenises: not for the event loop. Raises RequestError."""
    FIELDS.check(raw)
    fields = Fields(raw)
    params = sampling_params(
        fields,
        desk.engine.shape.vocab_size,
        max_tokens=fields.integer("max_output_tokens"),
        logprobs=_logprobs(fields),
    )
    fields.inside("stream_options", (), ("include_obfuscation",))
    fields.entries("metadata", 64)
    before = _before(fields, desk)
    new = input_messages(fields.value("input"))
    talk = _talk(fields, [*(before.conversation() if before else []), *new])
    ready = prepare(talk, desk, params)
    check_room(len(ready.ids), params.max_tokens, desk.engine.max_context, "input")
    plan = Plan(_echo(fields, desk), fields.flag("store", True), before, new, fields.value("input"))
    return Ask(
        Head.new("resp", desk.model, "_"),
        (ready.ids,),
        ready.params,
        fields.flag("stream"),
        hints=cache_hints(fields, desk.salt, ready.marks),
        salt=desk.salt,
        reader=ready.reader,
        ended=ready.ended,
        plan=plan,
        desk=desk,
    )


def _before(fields: Fields, desk: Desk) -> Stored | None:
    previous = fields.text("previous_response_id")
    if previous is None:
        return None
    try:
        return desk.responses.get(desk.salt, previous)
    except NotFound as error:
        error.param = "previous_response_id"
        raise


def _logprobs(fields: Fields) -> int | None:
    include = fields.items("include", 16)
    for i, name in enumerate(include):
        if not isinstance(name, str) or name not in _INCLUDE:
            at = f"include[{i}]"
            raise Unsupported(f"{at} asks for what is not there.", nearest(str(name)[:80], _INCLUDE), param=at)
    top = fields.integer("top_logprobs")
    if top is not None and not 0 <= top <= 20:
        raise RequestError(f"top_logprobs must be from 0 to 20, not {top}.", param="top_logprobs")
    return (top or 0) if "message.output_text.logprobs" in include else None


def _talk(fields: Fields, messages: list[object]) -> Talk:
    instructions = fields.text("instructions")
    system: list[object] = [{"role": "system", "content": instructions}] if instructions else []
    effort = fields.inside("reasoning", ("effort",), ("summary", "generate_summary")).text("effort")
    tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(fields.items("tools", _MOST_TOOLS))]
    return Talk(
        messages=[*system, *messages],
        tools=tools,
        tool_choice=_tool_choice(fields.value("tool_choice")),
        parallel_tool_calls=fields.flag("parallel_tool_calls", True),
        response_format=_format(fields.inside("text", ("format",), ("verbosity",))),
        effort=effort,
    )


def _tool(raw: object, at: str) -> object:
    if not isinstance(raw, dict):
        raise wrong(at, "an object with type, name and parameters", raw)
    if raw.get("type") != "function":
        raise Unsupported(f"{at}.type is {str(raw.get('type'))[:60]!r}; only 'function' is known.", param=f"{at}.type")
    function = {k: v for k, v in raw.items() if k != "type" and v is not None}
    return {"type": "function", "function": function}


def _tool_choice(raw: object) -> object:
    if raw is None or isinstance(raw, str):
        return raw
    if isinstance(raw, dict) and raw.get("type") == "function":
        return {"type": "function", "function": {"name": raw.get("name")}}
    if isinstance(raw, dict):
        raise Unsupported("tool_choice must be auto, none, required or a function.", param="tool_choice")
    raise wrong("tool_choice", "auto, none, required or an object", raw)


def _format(text: Fields) -> object:
    raw = text.entries("format", 8)
    if not raw or raw.get("type") in ("text", "json_object"):
        return raw or None
    if raw.get("type") != "json_schema":
        raise wrong("text.format.type", "text, json_object or json_schema", raw.get("type"))
    return {"type": "json_schema", "json_schema": {k: v for k, v in raw.items() if k != "type"}}


def _echo(fields: Fields, desk: Desk) -> dict[str, object]:
    """What a response repeats of its request."""
    defaults: dict[str, object] = {
        **{"instructions": None, "max_output_tokens": None, "metadata": {}, "parallel_tool_calls": True},
        **{"previous_response_id": None, "reasoning": {"effort": None, "summary": None}, "store": True},
        **{"temperature": 1.0, "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": []},
        **{"top_p": 1.0, "truncation": "disabled", "user": None, "top_logprobs": 0},
    }
    return {name: default if fields.value(name) is None else fields.value(name) for name, default in defaults.items()}


def input_messages(raw: object) -> list[object]:
    """`input` as chat messages. Raises RequestError whose `param` is the path of the fault."""
    if isinstance(raw, str) and raw:
        return [{"role": "user", "content": raw}]
    if not isinstance(raw, list) or not raw or len(raw) > _MOST_ITEMS:
        raise wrong("input", "a non-empty string or list of items", raw)
    gathered = _Items()
    for i, item in enumerate(raw):
        gathered.take(item, f"input[{i}]")
    return gathered.messages


class _Items:
    """Gathers items into messages: reasoning, text and calls of the assistant that follow each other are one turn."""

    def __init__(self) -> None:
        self.messages: list[object] = []
        self._turn: dict[str, object] | None = None

    def take(self, raw: object, at: str) -> None:
        """One item more."""
        if not isinstance(raw, dict):
            raise wrong(at, "an object", raw)
        kind = raw.get("type", "message")
        if kind == "message":
            self._message(raw, at)
        elif kind == "function_call":
            function = {"name": _text(raw, "name", at), "arguments": _text(raw, "arguments", at)}
            call = {"id": _text(raw, "call_id", at), "type": "function", "function": function}
            turn = self._assistant()
            turn["tool_calls"] = [*turn.get("tool_calls", ()), call]  # type: ignore[misc]
        elif kind == "function_call_output":
            self._turn = None
            output = _parts(raw.get("output"), f"{at}.output")
            self.messages.append({"role": "tool", "tool_call_id": _text(raw, "call_id", at), "content": output})
        elif kind == "reasoning":
            turn = self._assistant()
            turn["reasoning_content"] = str(turn.get("reasoning_content", "")) + _reasoning(raw, at)
        else:
            known = ", ".join(("message", "function_call", "function_call_output", "reasoning"))
            raise Unsupported(f"{at} is of type {str(kind)[:60]!r}; only {known} are read.", param=f"{at}.type")

    def _message(self, raw: Mapping[str, object], at: str) -> None:
        role = raw.get("role")
        if role not in ("user", "assistant", "system", "developer"):
            raise wrong(f"{at}.role", "user, assistant, system or developer", role)
        content = _parts(raw.get("content"), f"{at}.content")
        if role == "assistant":
            turn = self._assistant()
            turn["content"] = str(turn["content"]) + _joined(content)
            return
        self._turn = None
        self.messages.append({"role": "system" if role == "developer" else role, "content": content})

    def _assistant(self) -> dict[str, object]:
        if self._turn is None:
            self._turn = {"role": "assistant", "content": ""}
            self.messages.append(self._turn)
        return self._turn


def _parts(raw: object, at: str) -> object:
    """A string, or text parts of any kind as the chat API's."""
    if isinstance(raw, str):
        return raw
    if not isinstance(raw, list):
        raise wrong(at, "a string or a list of parts", raw)
    out: list[object] = []
    for i, part in enumerate(raw):
        if not isinstance(part, dict):
            raise wrong(f"{at}[{i}]", "an object with type and text", part)
        if part.get("type") not in ("input_text", "output_text", "text"):
            raise Unsupported(f"{at}[{i}] is of type {str(part.get('type'))[:60]!r}; only text is read.", param=at)
        out.append({"type": "text", "text": _text(part, "text", f"{at}[{i}]")})
    return out or ""


def _joined(content: object) -> str:
    if isinstance(content, str):
        return content
    assert isinstance(content, list)
    return "".join(part["text"] for part in content)


def _reasoning(raw: Mapping[str, object], at: str) -> str:
    parts = raw.get("content") or []
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise wrong(f"{at}.content", "a list of reasoning_text parts", parts)
    return "".join(_text(part, "text", f"{at}.content[{i}]") for i, part in enumerate(parts))


def _text(raw: Mapping[str, object], name: str, at: str) -> str:
    value = raw.get(name)
    if not isinstance(value, str):
        raise wrong(f"{at}.{name}", "a string", value)
    return value
