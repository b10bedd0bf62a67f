"""Everything a client can get wrong: one clear sentence in OpenAI's error shape, and the server serves on."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from conftest import Server
from fake_engine import FakeEngine

from triptych.server.app import build_app
from triptych.server.options import ServerOptions
from triptych.text.tokenizer import Tokenizer

CHAT: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT: dict[str, Any] = {"model": "fake", "prompt": "hi", "max_tokens": 2}


def refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error object of a refusal, after checking its shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith((".", "?")) and len(error["message"]) < 400
    return dict(error)


def post(http: httpx.Client, base: dict[str, Any], **change: Any) -> httpx.Response:
    path = "/v1/chat/completions" if "messages" in base else "/v1/completions"
    return http.post(path, json=base | change)


@pytest.fixture(scope="module")
def engine(tokenizer: Tokenizer) -> FakeEngine:
    return FakeEngine(tokenizer)


@pytest.fixture(scope="module")
def server(engine: FakeEngine) -> Iterator[Server]:
    """One server for all refusals: it has to survive each of them."""
    running = Server(build_app(engine, ServerOptions(max_body=1 << 20)))
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def serves_on(http: httpx.Client):  # type: ignore[no-untyped-def]
    """After each test the server must still answer."""
    yield
    assert post(http, CHAT).status_code == 200


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object, not a list"),
        (b"null", "not null"),
        (b'"text"', "not 'text'"),
        (b'{"model": "fake", "prompt": "\xff"}', "not valid UTF-8"),
        (b'{"model": "fake", "prompt": "\xed\xa0\x80"}', "not valid UTF-8"),
        (b'{"model": "fake", "prompt": "\\ud800"}', "npaired surrogates"),
        (b'{"model": "fake", "prompt": "a", "temperature": NaN}', "not valid JSON"),
        (b'{"model": "fake", "prompt": "a", "temperature": Infinity}', "not valid JSON"),
        (b'{"model": "fake", "prompt": "a", "temperature": 1e999}', "out of range"),
        (b'{"model": "fake", "max_tokens": 1' + b"0" * 400 + b"}", "an enormous number"),
        (b'{"model": "fake", "prompt": "a", "seed": 1' + b"0" * 9000 + b"}", "out of range"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        ('{"model": "fake"}'.encode("utf-16"), "not valid JSON"),
    ],
)
def test_bodies_that_are_no_json_object(http: httpx.Client, body: bytes, sentence: str) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert sentence in refused(http.post(path, content=body))["message"]


@pytest.mark.parametrize(
    ("change", "param", "sentence"),
    [
        ({"temperature": "hot"}, "temperature", "must be a number, not 'hot'"),
        ({"temperature": -1}, "temperature", "must be a number in [0, 100], not -1"),
        ({"temperature": True}, "temperature", "must be a number, not true"),
        ({"temperature": 10**400}, "temperature", "an enormous number"),
        ({"top_p": 0}, "top_p", "(0, 1]"),
        ({"top_k": 1.5}, "top_k", "must be an integer, not 1.5"),
        ({"min_p": 2}, "min_p", "[0, 1]"),
        ({"repetition_penalty": 0}, "repetition_penalty", "(0, 100]"),
        ({"presence_penalty": 3}, "presence_penalty", "[-2, 2]"),
        ({"frequency_penalty": [1]}, "frequency_penalty", "not a list"),
        ({"max_tokens": 0}, "max_tokens", "from 1 to"),
        ({"max_tokens": -5}, "max_tokens", "from 1 to"),
        ({"max_tokens": 5000}, "max_tokens", "Lower max_tokens to at most 40"),
        ({"max_tokens": 2**31}, "max_tokens", "from 1 to"),
        ({"max_tokens": 10**30}, "max_tokens", "an enormous number"),
        ({"max_tokens": "7"}, "max_tokens", "must be an integer, not '7'"),
        ({"n": 0}, "n", "from 1 to 128"),
        ({"n": 10**6}, "n", "from 1 to 128"),
        ({"seed": 2**64}, "seed", "an enormous number"),
        ({"seed": "x"}, "seed", "must be an integer"),
        ({"stop": ""}, "stop", "non-empty string"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": [1]}, "stop", "non-empty string"),
        ({"stop": {"a": 1}}, "stop", "must be a list, not an object"),
        ({"stop": "x" * 1025}, "stop", "longer than 1024"),
        ({"stop_token_ids": [129280]}, "stop_token_ids", "outside [0, 129280)"),
        ({"stop_token_ids": 5}, "stop_token_ids", "must be a list, not 5"),
        ({"ignore_eos": 1}, "ignore_eos", "true or false"),
        ({"logit_bias": []}, "logit_bias", "must be an object"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "keys are token ids"),
        ({"logit_bias": {"\u0663": 1}}, "logit_bias", "keys are token ids"),
        ({"logit_bias": {"129280": 1}}, "logit_bias", "outside [0, 129280)"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "[-100, 100]"),
        ({"logit_bias": {"5": "1"}}, "logit_bias", "must be a number"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"stream": True, "stream_options": {"include_usage": 3}}, "stream_options", "true or false"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": 1}}, "stream_options", "true or false"),
        ({"stream": True, "stream_options": {"inlude_usage": True}}, "stream_options", "no option 'inlude_usage'"),
        ({"stream": True, "stream_options": []}, "stream_options", "must be an object"),
        ({"temprature": 1}, "temprature", "Unknown field 'temprature'. Did you mean 'temperature'?"),
        ({"guided_json": {}}, "guided_json", "Unknown field"),
        ({"": 1}, "", "Unknown field ''."),
        ({"x" * 10_000: 1}, "x" * 80, "Unknown field"),
    ],
)
def test_sampling_fields(http: httpx.Client, change: dict[str, Any], param: str, sentence: str) -> None:
    for base in (CHAT, TEXT):
        error = refused(post(http, base, **change))
        assert sentence in error["message"]
        assert error["param"] == param
        assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"tools": [{"type": "web"}]}, "tools[0].type", "unsupported_parameter"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "invalid_value"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "invalid_value"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}},
            "response_format.json_schema.schema",
            "invalid_value",
        ),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
        ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
        ({"functions": [{}]}, "functions", "unsupported_parameter"),
        ({"reasoning_effort": "hihg"}, "reasoning_effort", "invalid_value"),
        ({"thinking": {"type": "on"}}, "thinking.type", "invalid_value"),
        ({"thinking": {"type": "disabled"}, "reasoning_effort": "high"}, "thinking", "invalid_value"),
        ({"web_search_options": {}}, "web_search_options", "unsupported_parameter"),
        ({"prompt": "x"}, "prompt", "unknown_parameter"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"logprobs": 2}, "logprobs", "invalid_value"),
        ({"max_completion_tokens": 5}, "max_tokens", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": None}, "messages", "invalid_value"),
        ({"messages": "hi"}, "messages", "invalid_value"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "invalid_value"),
        ({"messages": [{"role": "user", "content": "long " * 5000}]}, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "word " * 4090}]}, "max_tokens", "context_length_exceeded"),
    ],
)
def test_chat_fields(http: httpx.Client, change: dict[str, Any], param: str, code: str) -> None:
    error = refused(post(http, CHAT, **change))
    assert error["param"] == param
    assert error["code"] == code


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [[]]}, "prompt is empty"),
        ({"prompt": ["a", ""]}, "prompt is empty"),
        ({"prompt": 7}, "must be a string, a list of strings, or token ids, not 7"),
        ({"prompt": {"a": 1}}, "not an object"),
        ({"prompt": [1, "a"]}, "integers only, not 'a'"),
        ({"prompt": ["a", [1]]}, "strings only or token ids only"),
        ({"prompt": [1.0]}, "integers only, not 1.0"),
        ({"prompt": [True]}, "integers only, not true"),
        ({"prompt": [None]}, "integers only, not null"),
        ({"prompt": [[[1]]]}, "integers only, not a list"),
        ({"prompt": [-1]}, "Token id -1 is outside [0, 129280)"),
        ({"prompt": [129280]}, "Token id 129280 is outside"),
        ({"prompt": [2**31]}, "outside"),
        ({"prompt": [2**70]}, "flat list of integers"),
        ({"prompt": [5] * 4096}, "Shorten the prompt to at most 4095 tokens"),
        ({"prompt": [5] * 4095}, "Lower max_tokens to at most 1."),
        ({"prompt": "word " * 5000}, "more than 4095 tokens"),
        ({"prompt": [[1]] * 65}, "Split them over several requests"),
        ({"n": 65}, "Split them over several requests"),
        ({"logprobs": 21}, "from 0 to 20"),
        ({"logprobs": True}, "must be an integer"),
        ({"suffix": "x"}, "suffix is not supported"),
        ({"best_of": 3}, "best_of other than n"),
        ({"messages": []}, "Unknown field 'messages'"),
    ],
)
def test_completion_fields(http: httpx.Client, change: dict[str, Any], sentence: str) -> None:
    assert sentence in refused(http.post("/v1/completions", json=TEXT | change))["message"]


def test_a_model_that_is_not_served(http: httpx.Client, client: openai.OpenAI) -> None:
    error = refused(post(http, CHAT, model="fakee"), 404)
    assert error["code"] == "model_not_found" and "Did you mean 'fake'?" in error["message"]
    assert "model is missing" in refused(post(http, CHAT, model=None))["message"]
    assert "model must be a string" in refused(post(http, CHAT, model=3))["message"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_paths_and_methods(http: httpx.Client) -> None:
    assert "Did you mean '/v1/completions'?" in refused(http.post("/v1/completion", json=TEXT), 404)["message"]
    assert refused(http.get("/v1/chat/completions/"), 404)
    answer = http.get("/v1/chat/completions")
    assert "does not take GET. Use POST." in refused(answer, 405)["message"] and answer.headers["allow"] == "POST"
    assert refused(http.delete("/v1/models"), 405)


def test_any_content_type_will_do(http: httpx.Client) -> None:
    body = json.dumps(TEXT).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert http.post("/v1/completions", content=body, headers={"content-type": kind}).status_code == 200


def test_a_50_mb_body_is_refused_in_a_sentence(http: httpx.Client, client: openai.OpenAI) -> None:
    error = refused(http.post("/v1/completions", content=b" " * 50_000_000), 413)
    assert "50,000,000 bytes; at most 1,048,576" in error["message"] and error["code"] == "request_too_large"
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="fake", prompt="x" * 50_000_000)
    assert caught.value.status_code == 413


def test_a_client_that_first_sends_all_still_hears_why(server: Server) -> None:
    """Closing at once would reset the connection under a client that is still sending."""
    with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=20) as raw:  # type: ignore[arg-type]
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 20000000\r\n\r\n")
        for _ in range(200):
            raw.sendall(b" " * 100_000)
        assert raw.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_large_body_without_length_is_not_read_to_its_end(server: Server) -> None:
    """A chunked body that never ends: the answer comes all the same."""
    with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=20) as raw:  # type: ignore[arg-type]
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(20):
            raw.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
        assert raw.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_waits_for_100_continue_is_spared_the_upload(server: Server) -> None:
    with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=20) as raw:  # type: ignore[arg-type]
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 9999999\r\n\r\n"
        )
        assert raw.recv(4096).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "junk",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: -4\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /%ff%00%0a HTTP/1.1\r\nhost: x\r\n\r\n",
        b"\r\n" * 100,
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
    ],
)
def test_junk_on_the_socket(server: Server, junk: bytes) -> None:
    with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=20) as raw:  # type: ignore[arg-type]
        raw.sendall(junk)
        raw.shutdown(socket.SHUT_WR)
        answer = raw.recv(4096)
    assert not answer or b" 4" in answer.split(b"\r\n")[0]


def test_the_engine_is_untouched_by_refusals(http: httpx.Client, engine: FakeEngine) -> None:
    before = engine.stats().steps
    refused(post(http, CHAT, temperature=-1))
    refused(post(http, TEXT, prompt=[-1]))
    assert engine.stats().steps == before and not engine.live
