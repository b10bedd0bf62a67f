"""Whatever a client sends, the answer is 200 or a 4xx sentence, and the server serves on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette

from triptych.server import chat, completions, messages_read, responses_read
from triptych.server.app import build_app
from triptych.server.options import ServerOptions
from triptych.text.tokenizer import Tokenizer

PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"]
VALID: dict[str, dict[str, Any]] = {
    PATHS[0]: {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
    PATHS[1]: {"model": "fake", "prompt": "hi", "max_tokens": 3},
    PATHS[2]: {"model": "fake", "input": "hi", "max_output_tokens": 3},
    PATHS[3]: {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
}
NAMES = sorted(
    {
        name
        for table in (chat.FIELDS, completions.FIELDS, responses_read.FIELDS, messages_read.FIELDS)
        for name in table.read | table.harmless | set(table.refused)
    }
)
numbers = st.integers() | st.floats() | st.sampled_from([2**31, 2**63, 2**64, -1, 0, 10**30, 1e308, 129280])
scalars = st.none() | st.booleans() | numbers | st.text(max_size=8)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)
roles = st.sampled_from(["system", "user", "assistant", "tool", "developer", "x"])
parts = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url"]) | values, "text": st.text(max_size=5) | values}
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": roles | values, "content": st.text(max_size=9) | st.lists(parts, max_size=3) | values}
    ),
    max_size=4,
)
calls = st.fixed_dictionaries(
    {
        "id": st.sampled_from(["a", "b"]),
        "function": st.fixed_dictionaries({"name": st.sampled_from(["f", "g"]), "arguments": st.text(max_size=9)}),
    }
)
blocks = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "tool_use", "tool_result", "thinking", "image"])},
    optional={
        "text": st.text(max_size=5) | values,
        "id": st.sampled_from(["a", "b"]),
        "tool_use_id": st.sampled_from(["a", "b"]),
        "name": st.text(max_size=5),
        "input": st.dictionaries(st.text(max_size=3), values, max_size=2) | values,
        "content": st.text(max_size=5) | values,
        "thinking": st.text(max_size=5),
        "cache_control": st.just({"type": "ephemeral"}) | values,
    },
)
turns = st.lists(
    st.fixed_dictionaries(
        {"role": roles, "content": st.text(max_size=5) | st.lists(blocks, max_size=3) | values},
        optional={"tool_calls": st.lists(calls, max_size=2), "tool_call_id": st.sampled_from(["a", "b"])},
    ),
    max_size=5,
)
items = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["message", "function_call", "function_call_output", "reasoning", "x"])},
        optional={
            "role": roles,
            "content": st.text(max_size=5) | st.lists(parts, max_size=2) | values,
            "call_id": st.sampled_from(["a", "b"]),
            "name": st.text(max_size=5),
            "arguments": st.text(max_size=5) | values,
            "output": st.text(max_size=5) | values,
        },
    ),
    max_size=4,
)
functions = st.fixed_dictionaries({"name": st.sampled_from(["f", "g", "a b"]), "parameters": st.just({}) | values})
plausible = {
    "input": st.text(max_size=5) | items,
    "tools": st.lists(
        st.builds(lambda f: {"type": "function", "function": f}, functions)
        | st.builds(lambda f: {"type": "function"} | f, functions)
        | st.builds(lambda f: {"name": f["name"], "input_schema": f["parameters"]}, functions),
        max_size=2,
    ),
    "tool_choice": st.sampled_from(["auto", "none", "required", {"type": "tool", "name": "f"}, {"type": "any"}])
    | values,
    "thinking": st.sampled_from([{"type": "enabled"}, {"type": "disabled"}]) | values,
    "reasoning_effort": st.sampled_from(["none", "low", "high", "max", "x"]),
    "response_format": st.sampled_from([{"type": "json_object"}, {"type": "text"}]) | values,
    "previous_response_id": st.text(max_size=5),
    "max_output_tokens": st.integers(-1, 300),
    "messages": messages | turns,
    "prompt": st.text(max_size=9) | st.lists(st.integers(-2, 129281), max_size=5) | values,
    "model": st.sampled_from(["fake", "fak", ""]),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries(
        {"include_usage": st.booleans()}, optional={"continuous_usage_stats": st.booleans()}
    ),
    "n": st.integers(-1, 5),
    "max_tokens": st.integers(-1, 300),
    "max_completion_tokens": st.integers(-1, 300),
    "logprobs": st.booleans() | st.integers(-1, 22),
    "top_logprobs": st.integers(-1, 22),
    "temperature": st.floats(-1, 3),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=5),
    "logit_bias": st.dictionaries(st.integers(-3, 129285).map(str) | st.text(max_size=3), numbers, max_size=3),
}


def filled(names: dict[str, None]) -> st.SearchStrategy[dict[str, Any]]:
    """Some of the plausible fields: all at once would always be refused."""
    return st.fixed_dictionaries({name: plausible[name] for name in names})


class App:
    """The app driven through ASGI on one event loop, without sockets."""

    def __init__(self, app: Starlette, engine: FakeEngine) -> None:
        self.app = app
        self.engine = engine
        self.runner = asyncio.Runner()

    def post(self, path: str, *chunks: bytes) -> tuple[int, bytes]:
        """Status and body of a POST whose body comes in these chunks."""
        return self.runner.run(self._post(path, list(chunks)))

    async def _post(self, path: str, chunks: list[bytes]) -> tuple[int, bytes]:
        waiting = [{"type": "http.request", "body": c, "more_body": i + 1 < len(chunks)} for i, c in enumerate(chunks)]
        sent: list[dict[str, Any]] = []
        done = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if waiting:
                return waiting.pop(0)
            await done.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"host", b"test")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        await self.app(scope, receive, send)
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


@pytest.fixture(scope="module")
def app(tokenizer: Tokenizer) -> Iterator[App]:
    engine = FakeEngine(tokenizer, max_context=200)
    driven = App(build_app(engine, ServerOptions(max_body=1 << 16)), engine)
    yield driven
    driven.runner.close()


def check(app: App, path: str, *chunks: bytes) -> None:
    """The law: 200 with a well-formed body or a 4xx in OpenAI's shape; nothing left running; the next one served."""
    status, body = app.post(path, *chunks)
    if status == 200:
        _check_answer(body)
    else:
        assert 400 <= status < 500, (status, body)
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type"} if path == PATHS[3] else {"message", "type", "param", "code"}
        kinds = {400: "invalid_request_error", 404: "not_found_error"} if path == PATHS[3] else {}
        assert error["type"] == kinds.get(status, "invalid_request_error") and 10 < len(error["message"]) < 500
    assert not app.engine.live
    again, _ = app.post(path, json.dumps(VALID[path]).encode())
    assert again == 200


def _check_answer(body: bytes) -> None:
    if not body.startswith((b"data: ", b"event: ")):
        assert json.loads(body)["usage"]
        return
    events = [line for line in body.split(b"\n\n") if line]
    if body.startswith(b"data: "):
        assert events.pop() == b"data: [DONE]"
    for event in events:
        assert not json.loads(event.split(b"data: ", 1)[1]).get("error")


def encoded(value: object) -> bytes:
    """JSON as Python writes it: NaN, lone surrogates and all."""
    return json.dumps(value).encode()


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=80, deadline=None)
@given(body=st.binary(max_size=60))
def test_raw_bytes(app: App, path: str, body: bytes) -> None:
    check(app, path, body)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=80, deadline=None)
@given(value=values)
def test_any_json(app: App, path: str, value: object) -> None:
    check(app, path, encoded(value))


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=150, deadline=None)
@given(change=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=6), values, max_size=3))
def test_valid_requests_with_fields_of_any_type(app: App, path: str, change: dict[str, object]) -> None:
    check(app, path, encoded(VALID[path] | change))


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=150, deadline=None)
@given(change=st.dictionaries(st.sampled_from(sorted(plausible)), st.none()).flatmap(filled))
def test_valid_requests_with_plausible_fields(app: App, path: str, change: dict[str, object]) -> None:
    check(app, path, encoded(VALID[path] | change))


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_valid_requests_with_broken_bytes(app: App, path: str, data: st.DataObject) -> None:
    body = bytearray(encoded(VALID[path]))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
        if not body:
            break
    cut = data.draw(st.integers(0, len(body)))
    check(app, path, bytes(body[:cut]), bytes(body[cut:]))


def test_a_body_in_many_chunks_is_bounded(app: App) -> None:
    status, body = app.post(PATHS[1], *[b" " * 1000] * 100)
    assert status == 413 and b"at most 65,536" in body
