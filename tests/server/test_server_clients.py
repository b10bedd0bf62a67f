"""Clients that leave, read slowly or come in crowds, and an engine that fails: each harms nobody else."""

from __future__ import annotations

import contextlib
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from conftest import Server, wait_for
from fake_engine import FakeEngine, expected_tokens

from triptych.words import SamplingParams

TEXT: dict[str, Any] = {"model": "fake", "prompt": [1, 2, 3], "max_tokens": 50}


def raw_post(server: Server, body: dict[str, Any]) -> socket.socket:
    """A connection on which a completion was asked for."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    data = json.dumps(body).encode()
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
    return connection


def text_of(engine: FakeEngine, ids: list[int], max_tokens: int) -> str:
    params = SamplingParams(max_tokens=max_tokens)
    return engine.tokenizer.decode(expected_tokens(engine, np.asarray(ids, dtype=np.int32), params))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("prompts", [1, 3])
def test_a_client_that_leaves_aborts_its_request(
    server: Server, engine: FakeEngine, stream: bool, phase: str, prompts: int
) -> None:
    engine.prefill_delay = 60.0 if phase == "prefill" else 0.0
    engine.token_delay = 0.01
    connection = raw_post(server, TEXT | {"prompt": [[5]] * prompts, "max_tokens": 4000, "stream": stream})
    wait_for(lambda: len(engine.live) == prompts)
    if phase == "decode":
        wait_for(lambda: engine.stats().steps > 3)
    connection.close()
    wait_for(lambda: not engine.live)
    assert len(engine.aborted) == prompts


def test_a_client_that_leaves_while_sending_is_forgotten(server: Server, engine: FakeEngine) -> None:
    connection = raw_post(server, TEXT)
    connection.close()
    host, port = server.url.removeprefix("http://").split(":")
    half = socket.create_connection((host, int(port)), timeout=20)
    half.sendall(b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n{"model"')
    wait_for(lambda: server.app.state.server.in_flight >= 1)
    half.close()
    wait_for(lambda: server.app.state.server.in_flight == 0)
    assert not engine.live


def test_closing_a_stream_of_the_official_client_aborts(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.token_delay = 0.01
    stream = client.completions.create(model="fake", prompt=[7], max_tokens=4000, stream=True)
    next(iter(stream))
    assert len(engine.live) == 1
    stream.close()
    wait_for(lambda: not engine.live)
    assert len(engine.aborted) == 1


def test_eight_clients_at_once_with_one_killed(server: Server, engine: FakeEngine) -> None:
    engine.token_delay = 0.002

    def ask(i: int) -> str:
        with server.client() as client:
            pieces = client.completions.create(model="fake", prompt=[i, i], max_tokens=100, stream=True)
            return "".join(piece.choices[0].text for piece in pieces)

    killed = raw_post(server, TEXT | {"max_tokens": 4000, "stream": True})
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, i) for i in range(8)]
        assert killed.recv(100)
        killed.close()
        texts = [answer.result() for answer in answers]
    assert texts == [text_of(engine, [i, i], 100) for i in range(8)]
    wait_for(lambda: not engine.live)
    assert len(engine.aborted) == 1


def test_a_slow_reader_holds_nobody_up(server: Server, client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.max_context = 200_000
    slow = raw_post(server, TEXT | {"max_tokens": 100_000, "stream": True, "logprobs": 5})
    wait_for(lambda: engine.stats().steps > 100)
    steps = -1
    while steps != engine.stats().steps:  # its socket is full: the engine's stream is no longer read
        steps = engine.stats().steps
        client.models.list()
    assert len(engine.live) == 1 and steps < 100_000
    answer = client.completions.create(model="fake", prompt=[9], max_tokens=20)
    assert answer.choices[0].text == text_of(engine, [9], 20)
    slow.close()
    wait_for(lambda: not engine.live)


def test_comments_keep_a_long_prefill_alive(server: Server, engine: FakeEngine) -> None:
    engine.prefill_delay = 1.0  # the server comments after 0.2 s
    with server.http() as http, http.stream("POST", "/v1/completions", json=TEXT | {"stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    comments = [line for line in lines if line.startswith(":")]
    assert len(comments) >= 2
    assert lines[: len(comments)] == comments
    assert lines[-1] == "data: [DONE]"
    with server.client() as client:  # the official client passes over them
        pieces = client.completions.create(**TEXT, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == text_of(engine, [1, 2, 3], 50)


def test_an_error_during_a_long_prefill_is_an_event(server: Server, engine: FakeEngine) -> None:
    engine.prefill_delay = 0.5
    engine.fail_after = 0
    with server.client() as client, pytest.raises(openai.APIError, match="not finite"):
        list(client.completions.create(**TEXT, stream=True))


def test_too_many_requests_are_told_to_come_back(server: Server, http: httpx.Client, engine: FakeEngine) -> None:
    engine.prefill_delay = 60.0
    with contextlib.ExitStack() as stack:
        for _ in range(engine.config.max_waiting):
            stack.enter_context(raw_post(server, TEXT))
        wait_for(lambda: len(engine.live) == engine.config.max_waiting)
        for stream in (False, True):
            answer = http.post("/v1/completions", json=TEXT | {"stream": stream})
            assert answer.status_code == 429
            assert answer.headers["retry-after"] == "2"
            assert answer.json()["error"]["type"] == "rate_limit_error"
            assert answer.json()["error"]["code"] == "queue_full"
        batch = http.post("/v1/completions", json=TEXT | {"prompt": [[1], [2]]})
        assert batch.status_code == 429
    wait_for(lambda: not engine.live)


def test_a_stream_that_fails_ends_with_an_error_event(server: Server, engine: FakeEngine) -> None:
    engine.fail_after = 5
    with server.http() as http, http.stream("POST", "/v1/completions", json=TEXT | {"stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert (error["type"], error["message"]) == ("server_error", "The logits of this request are not finite.")
    with server.client() as client, pytest.raises(openai.APIError, match="not finite"):
        list(client.completions.create(**TEXT, stream=True))
    engine.fail_after = None
    with server.http() as http:
        assert http.post("/v1/completions", json=TEXT).status_code == 200


@pytest.mark.parametrize("prompt", [[1], [[1], [2]]])
def test_a_whole_answer_that_fails_is_a_500_in_openais_shape(
    http: httpx.Client, engine: FakeEngine, prompt: object
) -> None:
    engine.fail_after = 5
    answer = http.post("/v1/completions", json=TEXT | {"prompt": prompt})
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "The logits of this request are not finite."
    wait_for(lambda: not engine.live)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [0, 5])
def test_a_bug_in_the_engine_shows_no_traceback(
    http: httpx.Client, engine: FakeEngine, stream: bool, after: int, caplog: pytest.LogCaptureFixture
) -> None:
    engine.break_after = after
    answer = http.post("/v1/completions", json=TEXT | {"stream": stream})
    assert answer.status_code == (200 if stream and after else 500)
    assert "internal error" in answer.text and "bug in the engine" not in answer.text
    assert "bug in the engine" in caplog.text  # the log has it
    engine.break_after = None
    assert http.post("/v1/completions", json=TEXT).status_code == 200


def test_pipelined_and_kept_alive_requests_are_each_answered(http: httpx.Client, server: Server) -> None:
    for _ in range(3):
        assert http.post("/v1/completions", json=TEXT).status_code == 200  # one connection
    connection = raw_post(server, TEXT)
    data = json.dumps(TEXT).encode()
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
    received = b""
    while received.count(b"HTTP/1.1 200") < 2:
        received += connection.recv(65536)
    connection.close()
