"""/openapi.json: what every endpoint takes and answers, for people, generators of clients and fuzzers.

The fields are those of the endpoints' field tables; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from triptych.server import chat, completions, control, messages_read, responses_read, tokens
from triptych.server.fields import FieldTable
from triptych.server.schemas import FIELDS, SHAPES

Json = dict[str, Any]
UPDATE = "/admin/update_weights"

_ERRORS = {
    "400": "The request is wrong; the message names the field and what to do.",
    "401": "No API key, or an unknown one.",
    "403": "The API key is not for this.",
    "404": "No such model, object or path.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "429": "A limit of the key is used up, or too many requests wait; see Retry-After.",
    "500": "The engine could not go on with this request.",
    "503": "The server is shutting down, or the answer took too long.",
}

# path, method -> (summary, field table, required fields, name of the answer's schema, may stream)
_POSTS: dict[str, tuple[str, FieldTable, tuple[str, ...], str, bool]] = {
    "/v1/chat/completions": ("Answer a conversation", chat.FIELDS, ("model", "messages"), "ChatCompletion", True),
    "/v1/completions": ("Continue a text", completions.FIELDS, ("model", "prompt"), "TextCompletion", True),
    "/v1/responses": ("Answer a conversation, kept", responses_read.FIELDS, ("model", "input"), "Response", True),
    "/v1/messages": (
        "Answer a conversation, in Anthropic's words",
        messages_read.FIELDS,
        ("model", "messages", "max_tokens"),
        "AnthropicMessage",
        True,
    ),
    "/v1/messages/count_tokens": (
        "Count the tokens of a conversation",
        messages_read.COUNT_FIELDS,
        ("model", "messages"),
        "TokenCount",
        False,
    ),
    "/tokenize": ("Text or a conversation as token ids", tokens.TOKENIZE, (), "Tokens", False),
    "/detokenize": ("Token ids as text", tokens.DETOKENIZE, ("tokens",), "Text", False),
}
_GETS = {
    "/v1/models": ("The models served", "ModelList"),
    "/v1/models/{name}": ("One of the models served", "Model"),
    "/v1/responses/{name}": ("A stored response", "Response"),
    "/v1/responses/{name}/input_items": ("The input of a stored response", "ItemList"),
    "/health": ("Readiness", "Health"),
    "/health/live": ("Liveness", "Health"),
}


def document(version: str, *, admin: bool = False) -> Json:
    """The OpenAPI 3.1 document of a server, with the paths below /admin where it has them."""
    paths: Json = {path: {"post": _post(path, *entry)} for path, entry in _POSTS.items()}
    for path, (summary, answer) in _GETS.items():
        paths.setdefault(path, {})["get"] = _operation(path, summary, _json(answer))
    paths["/v1/responses/{name}"]["delete"] = _operation("/v1/responses/{name}", "Forget a response", _json("Deleted"))
    paths["/metrics"] = {"get": _operation("/metrics", "Figures for Prometheus", {"text/plain": {"schema": {}}})}
    embeddings = _operation("/v1/embeddings", "Refused: the model makes none", {})
    embeddings["requestBody"] = {"content": {"application/json": {"schema": {"type": "object"}}}}
    del embeddings["responses"]["200"]
    paths["/v1/embeddings"] = {"post": embeddings}
    if admin:
        paths |= _admin()
    return {
        "openapi": "3.1.0",
        "info": {"title": "Triptych", "version": version, "description": "A server for DeepSeek-V4."},
        "paths": paths,
        "components": {
            "schemas": SHAPES,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _admin() -> Json:
    state = _json("EngineState")
    update = _post(UPDATE, "Replace the weights", control.FIELDS, ("path",), "WeightsUpdate", False)
    # the same as a body: a safetensors file, and the other fields in the query
    update["requestBody"]["content"][control.BYTES] = {"schema": {"type": "string", "format": "binary"}}
    return {
        "/admin/state": {"get": _operation("/admin/state", "Whether steps run, and on which weights", state)},
        "/admin/pause": {"post": _operation("/admin/pause", "Begin no step any more", state)},
        "/admin/resume": {"post": _operation("/admin/resume", "Go on after a pause", state)},
        UPDATE: {"post": update},
    }


def _post(path: str, summary: str, table: FieldTable, required: tuple[str, ...], answer: str, streams: bool) -> Json:
    content = _json(answer)
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    operation = _operation(path, summary, content)
    schema = {
        "type": "object",
        "properties": properties(path, table),
        "required": list(required),
        "additionalProperties": False,
    }
    operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


def properties(path: str, table: FieldTable) -> dict[str, Json]:
    """The schema of every field of an endpoint: its own where it has one, else the common one; null is absence."""
    own: Mapping[str, Json] = FIELDS.get(path, {})
    out = {}
    for name in sorted(table.read):
        schema = own.get(name) or FIELDS[""][name]
        out[name] = {"anyOf": [schema, {"type": "null"}]} if name not in ("model", "messages", "prompt") else schema
    out |= {name: {"description": "Accepted; has no effect here."} for name in sorted(table.harmless)}
    for name, neutral in sorted(table.refused.items()):
        out[name] = {"enum": [None, *neutral], "description": "Only without effect; anything else is refused."}
    return out


def _operation(path: str, summary: str, content: Json) -> Json:
    anthropic = path.startswith("/v1/messages")
    fault = "AnthropicError" if anthropic else "Error"
    codes = dict(_ERRORS)
    if path == "/health":
        codes.pop("503")
    responses: Json = {"200": {"description": "Done.", "content": content}}
    for status, text in codes.items():
        responses[status] = {"description": text, "content": _json(fault)}
    if path == "/health":
        responses["503"] = {"description": "Shutting down, paused or updating.", "content": _json("Health")}
    operation: Json = {"summary": summary, "responses": responses, "security": [{"bearer": []}, {}]}
    if "{name}" in path:
        operation["parameters"] = [
            {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ]
    return operation


def _json(name: str) -> Json:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
