"""Anthropic's /v1/messages: from its blocks to the conversation that every API here is read into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import msgspec

from triptych.errors import RequestError, Unsupported, nearest
from triptych.server.ask import Ask, Desk, Head
from triptych.server.fields import Fields, FieldTable, wrong
from triptych.server.hints import breakpoint_ttl, cache_hints
from triptych.server.sampling import check_room
from triptych.server.talk import Talk, prepare
from triptych.words import CacheHints, SamplingParams

COUNT_FIELDS = FieldTable(
    read=frozenset({"model", "messages", "system", "tools", "tool_choice", "thinking", "output_config"}),
    harmless=frozenset({"cache_control", "context_management", "speed", "user_profile_id", "workspace_id"}),
    refused={"mcp_servers": ([],), "container": ()},
)
FIELDS = FieldTable(
    read=COUNT_FIELDS.read
    | {"max_tokens", "stop_sequences", "stream", "temperature", "top_p", "top_k", "metadata", "cache_hints"},
    harmless=COUNT_FIELDS.harmless | {"service_tier", "inference_geo", "diagnostics"},
    refused=COUNT_FIELDS.refused,
)
_MOST_MESSAGES = 100_000
_MOST_TOOLS = 1024
_LONGEST_STOP = 1024  # characters


def read_messages(raw: dict[str, object], desk: Desk) -> Ask:
    """The Ask in a body of /v1/messages. Tokenises: not for the event loop. Raises RequestError."""
    FIELDS.check(raw)
    fields = Fields(raw)
    params = _params(fields)
    talk, ttl = read_conversation(fields)
    ready = prepare(talk, desk, params)
    check_room(len(ready.ids), params.max_tokens, desk.engine.max_context, "messages")
    hints = _hints(fields, desk, ready.marks, ttl)
    return Ask(
        Head.new("msg", desk.model),
        (ready.ids,),
        ready.params,
        fields.flag("stream"),
        hints=hints,
        salt=desk.salt,
        reader=ready.reader,
        ended=ready.ended,
    )


def _params(fields: Fields) -> SamplingParams:
    most = fields.integer("max_tokens")
    if most is None:
        raise RequestError("max_tokens is missing.", "Say how many tokens the answer may have.", param="max_tokens")
    stops = fields.items("stop_sequences", 16)
    for i, stop in enumerate(stops):
        if not isinstance(stop, str) or not stop or len(stop) > _LONGEST_STOP:
            at = f"stop_sequences[{i}]"
            raise RequestError(f"{at} must be a string of 1 to {_LONGEST_STOP} characters.", param=at)
    given = SamplingParams(max_tokens=most, stop=tuple(map(str, stops)), top_k=fields.integer("top_k") or 0)
    numbers = {name: value for name in ("temperature", "top_p") if (value := fields.number(name)) is not None}
    return replace(given, **numbers)  # type: ignore[arg-type]


def _hints(fields: Fields, desk: Desk, marks: tuple[int, ...], ttl: float | None) -> CacheHints:
    user = fields.inside("metadata", ("user_id",)).text("user_id")
    known = {"prompt_cache_key": user[:256]} if user else {}
    return cache_hints(Fields(known | {"cache_hints": fields.value("cache_hints")}), desk.salt, marks, ttl)


def read_conversation(fields: Fields) -> tuple[Talk, float | None]:
    """The conversation in a body, and how long its `cache_control` marks ask to keep it."""
    reader = _Blocks()
    messages = reader.system(fields.value("system"))
    raw = fields.value("messages")
    if not isinstance(raw, list) or not raw or len(raw) > _MOST_MESSAGES:
        raise RequestError("messages must be a non-empty list of objects with role and content.", param="messages")
    for i, message in enumerate(raw):
        messages += reader.message(message, f"messages[{i}]")
    last = messages[-1]
    if isinstance(last, dict) and last["role"] == "assistant":
        last["prefix"] = True  # the answer goes on from what is put into the model's mouth
    tools = [reader.tool(tool, f"tools[{i}]") for i, tool in enumerate(fields.items("tools", _MOST_TOOLS))]
    choice, parallel = _tool_choice(fields)
    thinking, effort = _thinking(fields)
    output = fields.inside("output_config", ("effort", "format"))
    talk = Talk(
        messages=messages,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=parallel,
        response_format=_format(output),
        thinking=thinking,
        effort=output.text("effort") or effort,
    )
    return talk, reader.ttl


def _tool_choice(fields: Fields) -> tuple[object, bool]:
    raw = fields.entries("tool_choice", 4)
    if not raw:
        return None, True
    inner = fields.inside("tool_choice", ("type", "name", "disable_parallel_tool_use"))
    parallel = not inner.flag("disable_parallel_tool_use")
    kind = inner.text("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": inner.text("name")}}, parallel
    kinds = {"auto": "auto", "any": "required", "none": "none"}
    if kind not in kinds:
        raise wrong("tool_choice.type", "auto, any, tool or none", kind)
    return kinds[kind], parallel


def _thinking(fields: Fields) -> tuple[bool | None, str | None]:
    raw = fields.entries("thinking", 4)
    if not raw:
        return None, None
    kind = raw.get("type")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise wrong("thinking.type", "enabled, adaptive or disabled", kind)
    budget = fields.inside("thinking", ("type", "budget_tokens"), ("display",)).integer("budget_tokens")
    if budget is not None and budget < 1:
        raise RequestError("thinking.budget_tokens must be positive.", param="thinking.budget_tokens")
    return kind != "disabled", None


def _format(output: Fields) -> object:
    raw = output.entries("format", 4)
    if not raw:
        return None
    if raw.get("type") != "json_schema" or not isinstance(raw.get("schema"), dict):
        raise wrong("output_config.format", 'an object like {"type": "json_schema", "schema": {...}}', raw)
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": raw["schema"], "strict": True}}


class _Blocks:
    """Turns Anthropic's messages into chat messages; notes the longest time to live that a block asks for."""

    def __init__(self) -> None:
        self.ttl: float | None = None

    def system(self, raw: object) -> list[object]:
        """The system prompt, if there is one."""
        if raw is None or raw == "" or raw == []:
            return []
        return [{"role": "system", "content": self._texts(raw, "system")}]

    def message(self, raw: object, at: str) -> list[object]:
        """One message: tool results become messages of their own, before what the user says beside them."""
        if not isinstance(raw, dict) or set(raw) - {"role", "content"}:
            raise RequestError(f"{at} must be an object with role and content, and nothing else.", param=at)
        role, content = raw.get("role"), raw.get("content")
        if role == "system":
            return [{"role": "system", "content": self._texts(content, f"{at}.content")}]
        if role not in ("user", "assistant"):
            raise wrong(f"{at}.role", "user or assistant", role)
        if isinstance(content, str):
            return [{"role": role, "content": content}]
        if not isinstance(content, list) or not content:
            raise wrong(f"{at}.content", "a string or a non-empty list of blocks", content)
        blocks = [self._block(block, f"{at}.content[{i}]") for i, block in enumerate(content)]
        return self._assistant(blocks, at) if role == "assistant" else self._user(blocks, at)

    def _block(self, raw: object, at: str) -> dict[str, object]:
        if not isinstance(raw, dict) or not isinstance(raw.get("type"), str):
            raise RequestError(f'{at} must be an object like {{"type": "text", "text": "..."}}.', param=at)
        known = _BLOCKS.get(raw["type"])
        if known is None:
            kinds = ", ".join(_BLOCKS)
            raise Unsupported(f"{at} is of type {raw['type'][:60]!r}; only {kinds} are read.", param=f"{at}.type")
        for name in raw:
            if name not in known:
                raise RequestError(f"Unknown field {name[:60]!r} in {at}.", nearest(name[:60], known), param=at)
        self._note(raw, at)
        return raw

    def _note(self, raw: Mapping[str, object], at: str) -> None:
        wanted = breakpoint_ttl(f"{at}.cache_control", raw.get("cache_control"))
        if wanted is not None:
            self.ttl = max(self.ttl or 0.0, wanted)

    def _texts(self, raw: object, at: str) -> object:
        """A string, or text blocks as text parts."""
        if isinstance(raw, str):
            return raw
        if not isinstance(raw, list):
            raise wrong(at, "a string or a list of text blocks", raw)
        parts: list[object] = []
        for i, item in enumerate(raw):
            block = self._block(item, f"{at}[{i}]")
            if block["type"] != "text":
                raise Unsupported(f"{at}[{i}] is of type {block['type']!r}; only text may stand here.", param=at)
            parts.append({"type": "text", "text": _text(block, "text", f"{at}[{i}]")})
        return parts or ""

    def _user(self, blocks: list[dict[str, object]], at: str) -> list[object]:
        out: list[object] = []
        parts: list[object] = []
        for i, block in enumerate(blocks):
            where = f"{at}.content[{i}]"
            if block["type"] == "text":
                parts.append({"type": "text", "text": _text(block, "text", where)})
            elif block["type"] == "tool_result":
                content = block.get("content")
                text = "" if content is None else self._texts(content, f"{where}.content")
                call = _text(block, "tool_use_id", where)
                out.append({"role": "tool", "tool_call_id": call, "content": text})
            else:
                raise RequestError(f"{where} of type {block['type']!r} belongs to the assistant.", param=where)
        return [*out, {"role": "user", "content": parts}] if parts else out

    def _assistant(self, blocks: list[dict[str, object]], at: str) -> list[object]:
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[object] = []
        for i, block in enumerate(blocks):
            where = f"{at}.content[{i}]"
            if block["type"] == "text":
                texts.append(_text(block, "text", where))
            elif block["type"] == "thinking":
                thoughts.append(_text(block, "thinking", where))
            elif block["type"] == "tool_use":
                arguments = block.get("input")
                if not isinstance(arguments, dict):
                    raise wrong(f"{where}.input", "an object", arguments)
                function = {
                    "name": _text(block, "name", where),
                    "arguments": msgspec.json.encode(arguments).decode(),
                }
                calls.append({"id": _text(block, "id", where), "type": "function", "function": function})
            elif block["type"] == "tool_result":
                raise RequestError(f"{where} of type 'tool_result' belongs to the user.", param=where)
        message: dict[str, object] = {"role": "assistant", "content": "".join(texts)}
        if thoughts:
            message["reasoning_content"] = "".join(thoughts)
        if calls:
            message["tool_calls"] = calls
        return [message]

    def tool(self, raw: object, at: str) -> object:
        """A tool's definition as a function of the chat API."""
        if not isinstance(raw, dict):
            raise wrong(at, "an object with name and input_schema", raw)
        if raw.get("type", "custom") not in ("custom", None):
            raise Unsupported(f"{at} is of type {str(raw['type'])[:60]!r}; only custom tools are known.", param=at)
        for name in raw:
            if name not in _TOOL:
                raise RequestError(f"Unknown field {name[:60]!r} in {at}.", nearest(name[:60], _TOOL), param=at)
        self._note(raw, at)
        if not isinstance(raw.get("input_schema"), dict):
            raise wrong(f"{at}.input_schema", "an object", raw.get("input_schema"))
        function = {"name": _text(raw, "name", at), "parameters": raw["input_schema"]}
        for name in ("description", "strict"):
            if raw.get(name) is not None:
                function[name] = raw[name]
        return {"type": "function", "function": function}


_BLOCKS = {
    "text": {"type", "text", "cache_control", "citations"},
    "thinking": {"type", "thinking", "signature", "cache_control"},
    "redacted_thinking": {"type", "data"},
    "tool_use": {"type", "id", "name", "input", "cache_control", "caller"},
    "tool_result": {"type", "tool_use_id", "content", "is_error", "cache_control"},
}
_TOOL = {"name", "description", "input_schema", "type", "cache_control", "strict", "eager_input_streaming"} | {
    *("input_examples", "allowed_callers", "defer_loading")
}


def _text(block: Mapping[str, object], name: str, at: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise wrong(f"{at}.{name}", "a string", value)
    return value
