"""JSON schemas of request fields and of answers, for /openapi.json. Values only; openapi.py puts them together."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

_INTEGER: Json = {"type": "integer"}
_STRING: Json = {"type": "string"}
_FLAG: Json = {"type": "boolean"}
_OBJECT: Json = {"type": "object"}


def _number(low: float, high: float, *, open_low: bool = False) -> Json:
    return {"type": "number", "exclusiveMinimum" if open_low else "minimum": low, "maximum": high}


def _integer(low: int, high: int) -> Json:
    return {"type": "integer", "minimum": low, "maximum": high}


def _list(items: Json, most: int, least: int = 0) -> Json:
    return {"type": "array", "items": items, "maxItems": most, "minItems": least}


def _object(required: tuple[str, ...] = (), **properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _one_of(*values: object) -> Json:
    return {"enum": list(values)}


_TEXT_PART = _object(("type", "text"), type=_one_of("text"), text=_STRING)
_CALL = _object(
    ("id", "function"),
    id=_STRING,
    type=_one_of("function"),
    function=_object(("name", "arguments"), name=_STRING, arguments=_STRING),
)
_CONTENT: Json = {"anyOf": [_STRING, _list(_TEXT_PART, 1000, 1)]}
_CHAT_MESSAGE: Json = {
    "anyOf": [
        _object(("role", "content"), role=_one_of("system", "developer", "user"), content=_CONTENT, name=_STRING),
        _object(
            ("role", "content"),
            role=_one_of("assistant"),
            content=_CONTENT,
            reasoning_content=_STRING,
            tool_calls=_list(_CALL, 128),
        ),
        _object(("role", "content", "tool_call_id"), role=_one_of("tool"), content=_CONTENT, tool_call_id=_STRING),
    ]
}
_FUNCTION = _object(
    ("name",),
    name={"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"},
    description=_STRING,
    parameters=_OBJECT,
    strict=_FLAG,
)
_NAMED = _object(("type", "function"), type=_one_of("function"), function=_object(("name",), name=_STRING))
_CACHE_CONTROL = _object(("type",), type=_one_of("ephemeral"), ttl=_one_of("5m", "1h"))
_BLOCK: Json = {
    "anyOf": [
        _object(("type", "text"), type=_one_of("text"), text=_STRING, cache_control=_CACHE_CONTROL),
        _object(("type", "tool_use_id"), type=_one_of("tool_result"), tool_use_id=_STRING, content=_STRING),
        _object(("type", "thinking"), type=_one_of("thinking"), thinking=_STRING, signature=_STRING),
        _object(("type", "id", "name", "input"), type=_one_of("tool_use"), id=_STRING, name=_STRING, input=_OBJECT),
    ]
}
_TURN = _object(
    ("role", "content"), role=_one_of("user", "assistant"), content={"anyOf": [_STRING, _list(_BLOCK, 1000, 1)]}
)
_ITEM: Json = {
    "anyOf": [
        _object(("role", "content"), role=_one_of("user", "assistant", "system", "developer"), content=_STRING),
        _object(
            ("type", "call_id", "name", "arguments"),
            type=_one_of("function_call"),
            call_id=_STRING,
            name=_STRING,
            arguments=_STRING,
        ),
        _object(("type", "call_id", "output"), type=_one_of("function_call_output"), call_id=_STRING, output=_STRING),
    ]
}
_EFFORT = _one_of("none", "minimal", "low", "medium", "high", "xhigh", "max")
_THINKING = _object(("type",), type=_one_of("enabled", "disabled", "adaptive"), budget_tokens=_integer(1, 2**31 - 1))

# path -> field -> schema; "" holds what endpoints share
FIELDS: dict[str, dict[str, Json]] = {
    "": {
        "model": _STRING,
        "messages": _list(_CHAT_MESSAGE, 100_000, 1),
        "prompt": {
            "anyOf": [
                {"type": "string", "minLength": 1},
                _list({"type": "string", "minLength": 1}, 64, 1),
                _list(_integer(0, 129279), 4096, 1),
            ]
        },
        "input": {"anyOf": [{"type": "string", "minLength": 1}, _list(_ITEM, 100_000, 1)]},
        "max_tokens": _integer(1, 2**31 - 1),
        "max_completion_tokens": _integer(1, 2**31 - 1),
        "max_output_tokens": _integer(1, 2**31 - 1),
        "temperature": _number(0, 100),
        "top_p": _number(0, 1, open_low=True),
        "top_k": _integer(-1, 2**31 - 1),
        "min_p": _number(0, 1),
        "repetition_penalty": _number(0, 100, open_low=True),
        "presence_penalty": _number(-2, 2),
        "frequency_penalty": _number(-2, 2),
        "logit_bias": {"type": "object", "additionalProperties": _number(-100, 100), "maxProperties": 1024},
        "seed": _integer(-(2**63), 2**63 - 1),
        "stop": {"anyOf": [{"type": "string", "minLength": 1}, _list({"type": "string", "minLength": 1}, 16)]},
        "stop_sequences": _list({"type": "string", "minLength": 1}, 16),
        "stop_token_ids": _list(_INTEGER, 256),
        "ignore_eos": _FLAG,
        "n": _integer(1, 128),
        "best_of": _integer(1, 128),
        "echo": _FLAG,
        "prompt_logprobs": _integer(0, 20),
        "logprobs": _FLAG,
        "top_logprobs": _integer(0, 20),
        "stream": _FLAG,
        "stream_options": _object(include_usage=_FLAG, continuous_usage_stats=_FLAG, include_obfuscation=_FLAG),
        "tools": _list(_object(("type", "function"), type=_one_of("function"), function=_FUNCTION), 1024),
        "tool_choice": {"anyOf": [_one_of("auto", "none", "required"), _NAMED]},
        "parallel_tool_calls": _FLAG,
        "response_format": {
            "anyOf": [
                _object(("type",), type=_one_of("text", "json_object")),
                _object(("type", "regex"), type=_one_of("regex"), regex=_STRING),
                _object(("type", "lark"), type=_one_of("lark"), lark=_STRING),
                _object(
                    ("type", "json_schema"),
                    type=_one_of("json_schema"),
                    json_schema=_object(("name", "schema"), name=_STRING, schema=_OBJECT, strict=_FLAG),
                ),
            ]
        },
        "reasoning_effort": _EFFORT,
        "thinking": _THINKING,
        "reasoning": _object(effort=_EFFORT, summary=_one_of("auto", "concise", "detailed", None)),
        "text": _object(format=_OBJECT, verbosity=_one_of("low", "medium", "high")),
        "instructions": _STRING,
        "previous_response_id": _STRING,
        "store": _FLAG,
        "metadata": _OBJECT,
        "include": _list(_one_of("message.output_text.logprobs", "reasoning.encrypted_content"), 16),
        "system": {"anyOf": [_STRING, _list(_object(("type", "text"), type=_one_of("text"), text=_STRING), 1000)]},
        "output_config": _object(effort=_one_of("low", "medium", "high", "xhigh", "max"), format=_OBJECT),
        "prompt_cache_key": {"type": "string", "maxLength": 256},
        "prompt_cache_retention": _one_of("in_memory", "24h"),
        "prompt_cache_options": _object(ttl={"type": "string", "pattern": "^[0-9]{1,6}[smhd]$"}, mode=_STRING),
        "cache_hints": _object(session=_STRING, ttl=_number(0, 1e9, open_low=True), pin=_number(0, 1e9)),
        "tokens": _list(_integer(0, 129279), 4_000_000),
        "return_token_strs": _FLAG,
    },
    "/v1/completions": {
        "max_tokens": _integer(0, 2**31 - 1),
        "logprobs": _integer(0, 20),
        "return_token_ids": _FLAG,
    },
    "/admin/update_weights": {
        "path": {"type": "string", "minLength": 1},
        "running": _one_of("drain", "abort", "recompute"),
        "timeout": {"type": "number", "exclusiveMinimum": 0},
    },
    "/v1/messages": {"messages": _list(_TURN, 100_000, 1)},
    "/v1/messages/count_tokens": {"messages": _list(_TURN, 100_000, 1)},
    "/tokenize": {"prompt": _STRING},
}
_ANTHROPIC_TOOL = _object(
    ("name", "input_schema"),
    name={"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"},
    description=_STRING,
    input_schema=_OBJECT,
    cache_control=_CACHE_CONTROL,
)
_ANTHROPIC_CHOICE = _object(
    ("type",), type=_one_of("auto", "any", "none", "tool"), name=_STRING, disable_parallel_tool_use=_FLAG
)
for _path in ("/v1/messages", "/v1/messages/count_tokens"):
    FIELDS[_path] |= {"tools": _list(_ANTHROPIC_TOOL, 1024), "tool_choice": _ANTHROPIC_CHOICE}
FIELDS["/v1/responses"] = {
    "tools": _list({**_FUNCTION, "properties": {**_FUNCTION["properties"], "type": _one_of("function")}}, 1024),
    "tool_choice": {
        "anyOf": [_one_of("auto", "none", "required"), _object(("type",), type=_one_of("function"), name=_STRING)]
    },
}


def _answer(*required: str, **properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(required)}


_COUNT: Json = {"type": "integer", "minimum": 0}
SHAPES: dict[str, Json] = {
    "ChatCompletion": _answer(
        *("id", "object", "created", "model", "choices", "usage"),
        id=_STRING,
        object=_one_of("chat.completion"),
        choices=_list(_answer("index", "message", "finish_reason", finish_reason=_STRING), 128),
        usage=_answer("prompt_tokens", "completion_tokens", "total_tokens", prompt_tokens=_COUNT),
    ),
    "TextCompletion": _answer(
        *("id", "object", "created", "model", "choices", "usage"),
        object=_one_of("text_completion"),
        choices=_list(_answer("index", "text", "finish_reason", text=_STRING), 10_000),
    ),
    "Response": _answer(
        *("id", "object", "created_at", "model", "status", "output", "usage"),
        object=_one_of("response"),
        status=_one_of("completed", "incomplete"),
        output=_list(_answer("id", "type"), 10_000),
    ),
    "AnthropicMessage": _answer(
        *("id", "type", "role", "model", "content", "stop_reason", "usage"),
        type=_one_of("message"),
        content=_list(_answer("type"), 10_000),
        usage=_answer("input_tokens", "output_tokens", input_tokens=_COUNT),
    ),
    "TokenCount": _answer("input_tokens", input_tokens=_COUNT),
    "Tokens": _answer("tokens", "count", "max_model_len", tokens={"type": "array", "items": _COUNT}),
    "Text": _answer("prompt", prompt=_STRING),
    "Model": _answer("id", "object", "created", "owned_by", "max_model_len", id=_STRING),
    "ModelList": _answer("object", "data", data={"type": "array"}),
    "ItemList": _answer("object", "data", "first_id", "last_id", "has_more"),
    "Deleted": _answer("id", "object", "deleted"),
    "Health": _answer("status", status=_STRING),
    "EngineState": _answer(
        *("state", "weights", "running", "waiting"), state=_one_of("running", "paused", "updating"), weights=_COUNT
    ),
    "WeightsUpdate": _answer("version", "identity", "tensors", "bytes", version=_COUNT, identity=_STRING, bytes=_COUNT),
    "Error": _answer("error", error=_answer("message", "type", "param", "code", message=_STRING, type=_STRING)),
    "AnthropicError": _answer(
        "type", "error", type=_one_of("error"), error=_answer("type", "message", message=_STRING)
    ),
}
