"""Keys, tenants, limits, CORS, bounded connections and logs: what a server on the internet needs."""

from __future__ import annotations

import hashlib
import json
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from conftest import Server, wait_for
from fake_engine import FakeEngine

from triptych.errors import ConfigError, RateLimited
from triptych.server.app import build_app
from triptych.server.connection import bounded_protocol
from triptych.server.keys import Keys, load_keys
from triptych.server.limits import Limits, Quota
from triptych.server.logs import JsonLines
from triptych.server.options import ServerOptions

TEXT: dict[str, Any] = {"model": "fake", "prompt": [1, 2, 3], "max_tokens": 2}
KEYS = """
[[key]]
name = "alice"
key = "sk-alice-0001"
requests_per_minute = 3
cache_share = 0.25

[[key]]
name = "bob"
sha256 = "{hash}"
tenant = "bobs"
tokens_per_minute = 100
concurrent = 1

[[key]]
name = "ops"
key = "sk-ops-000001"
admin = true
""".format(hash=hashlib.sha256(b"sk-bob-00000002").hexdigest())
ALICE, BOB, OPS = ({"authorization": f"Bearer {key}"} for key in ("sk-alice-0001", "sk-bob-00000002", "sk-ops-000001"))


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    file = tmp_path / "keys.toml"
    file.write_text(KEYS)
    return load_keys(str(file))


@pytest.fixture
def server(engine: FakeEngine, keys: Keys) -> Iterator[Server]:
    options = ServerOptions(max_body=1 << 20, max_bodies=3 << 19, keep_alive=0.2, body_timeout=0.5)
    running = Server(build_app(engine, options, keys))
    yield running
    running.stop()


def test_who_has_no_key_is_not_served(http: httpx.Client, server: Server, engine: FakeEngine) -> None:
    for headers in ({}, {"authorization": "Bearer nope-nope"}, {"authorization": "Basic x"}, {"x-api-key": "sk"}):
        for path in ("/v1/completions", "/v1/messages", "/tokenize", "/nowhere"):
            answer = http.post(path, json=TEXT, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert "x-request-id" in answer.headers and "nope" not in answer.text
        assert http.get("/v1/models", headers=headers).status_code == 401
        assert http.get("/metrics", headers=headers).status_code == 401
    assert http.get("/health").status_code == http.get("/health/live").status_code == 200
    assert not engine.stats().steps
    with pytest.raises(openai.AuthenticationError):
        server.client().completions.create(**TEXT)
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0).messages.create(
            model="fake", max_tokens=5, messages=[{"role": "user", "content": "x"}]
        )


def test_either_header_will_do_and_pages_for_operators_need_their_key(http: httpx.Client) -> None:
    assert http.post("/v1/completions", json=TEXT, headers=ALICE).status_code == 200
    assert http.post("/v1/completions", json=TEXT, headers={"x-api-key": "sk-alice-0001"}).status_code == 200
    assert http.get("/metrics", headers=OPS).status_code == 200
    refused = http.get("/metrics", headers=ALICE)
    assert refused.status_code == 403 and refused.json()["error"]["type"] == "permission_error"


def test_each_key_has_the_salt_of_its_tenant(http: httpx.Client, engine: FakeEngine) -> None:
    for headers in (ALICE, BOB):
        http.post("/v1/completions", json=TEXT, headers=headers)
    assert engine.salts == ["alice", "bobs"]


def test_requests_per_minute(http: httpx.Client) -> None:
    for _ in range(3):
        assert http.post("/v1/completions", json=TEXT, headers=ALICE).status_code == 200
    refused = http.post("/v1/completions", json=TEXT, headers=ALICE)
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 15 <= int(refused.headers["retry-after"]) <= 20
    assert http.post("/v1/completions", json=TEXT, headers=OPS).status_code == 200


def test_tokens_per_minute_and_requests_at_once(http: httpx.Client, server: Server, engine: FakeEngine) -> None:
    engine.token_delay = 0.01
    ask = TEXT | {"max_tokens": 200, "stream": True}
    with server.http() as other, other.stream("POST", "/v1/completions", json=ask, headers=BOB) as answer:
        lines = answer.iter_lines()
        next(lines)
        refused = http.post("/v1/completions", json=TEXT, headers=BOB)
        assert refused.status_code == 429 and "1 requests at once" in refused.json()["error"]["message"]
        assert "data: [DONE]" in list(lines)
    wait_for(lambda: server.app.state.server.in_flight == 0)
    refused = http.post("/v1/completions", json=TEXT, headers=BOB)
    assert refused.status_code == 429 and "100 tokens per minute" in refused.json()["error"]["message"]
    assert 55 <= int(refused.headers["retry-after"]) <= 70


def test_buckets_refill_and_debts_are_paid() -> None:
    now = 0.0
    limits = Limits(Quota(60, 600, None), lambda: now)
    for _ in range(60):
        with limits.admitted():
            pass
    with pytest.raises(RateLimited) as refused, limits.admitted():
        pass
    assert refused.value.retry_after == 1
    now = 1.0
    with limits.admitted():
        limits.spend(900)
    now = 20.0
    with pytest.raises(RateLimited) as refused, limits.admitted():
        pass
    assert refused.value.retry_after == 12  # 301 tokens at ten a second, one second of them gone at the cap
    now = 33.0
    with limits.admitted():
        assert limits.running == 1
    assert limits.running == 0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"must hold \[\[key\]\] tables"),
        ("[[key]]\nname = 3", "name must be of type str"),
        ("[[key]]\nname = 'a b'\nkey='12345678'", "letters, digits"),
        ("[[key]]\nname = 'a'", "either key or sha256"),
        ("[[key]]\nname = 'a'\nkey = 'short'", "shorter than 8"),
        ("[[key]]\nname = 'a'\nsha256 = 'zz'", "64 hexadecimal digits"),
        ("[[key]]\nname = 'a'\nkey = '12345678'\nrequest_per_minute = 1", "Did you mean 'requests_per_minute'"),
        ("[[key]]\nname = 'a'\nkey = '12345678'\nconcurrent = 0", "at least 1"),
        ("[[key]]\nname = 'a'\nkey = '12345678'\ncache_share = 2", "at most 1"),
        ("[[key]]\nname = 'a'\nkey = '12345678'\n[[key]]\nname = 'b'\nkey = '12345678'", "repeats"),
        ("[[key", "not valid TOML"),
    ],
)
def test_a_keys_file_that_is_wrong_is_named_with_its_entry(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_keys(str(file))
    assert "12345678" not in str(caught.value)


def test_keys_of_the_command_line_and_shares(keys: Keys) -> None:
    assert keys.shares == {"alice": 0.25}
    assert load_keys(None, ("a-long-key",)).caller({"x-api-key": "a-long-key"}).admin
    with pytest.raises(ConfigError, match="number 1 is shorter"):
        load_keys(None, ("tiny",))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_keys("/nowhere/keys.toml")


def test_a_body_that_does_not_come_is_a_408(server: Server) -> None:
    with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=20) as raw:  # type: ignore[arg-type]
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-api-key: sk-ops-000001\r\ncontent-length: 100\r\n\r\n{"
        )
        assert raw.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_bodies_of_all_requests_together_are_bounded(server: Server) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-api-key: sk-ops-000001\r\ncontent-length: 1000000\r\n\r\n"
    address = tuple(server.url.removeprefix("http://").split(":"))
    first, second = (socket.create_connection(address, timeout=20) for _ in range(2))
    for raw in (first, second):
        raw.sendall(head + b" " * 900_000)
    answers = [raw.recv(4096).split(b"\r\n")[0] for raw in (first, second)]
    assert sorted(answers) == [b"HTTP/1.1 408 Request Timeout", b"HTTP/1.1 429 Too Many Requests"]
    for raw in (first, second):
        raw.close()
    wait_for(lambda: server.app.state.server.bodies._held == 0)


@pytest.fixture
def plain(engine: FakeEngine) -> Iterator[Server]:
    """A server with tight bounds on connections, a page that may call it, and no keys."""
    options = ServerOptions(
        header_timeout=0.3,
        max_header=4096,
        max_connections=3,
        request_timeout=0.5,
        write_timeout=0.3,
        keep_alive=0.1,
        cors_origins=("https://page.example",),
    )
    running = Server(build_app(engine, options), http=bounded_protocol(options))
    yield running
    running.stop()


def connected(server: Server) -> socket.socket:
    return socket.create_connection(tuple(server.url.removeprefix("http://").split(":")), timeout=20)


def test_connections_have_bounds(plain: Server) -> None:
    with connected(plain) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nhost:")
        assert raw.recv(4096).startswith(b"HTTP/1.1 408 ")
    with connected(plain) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\n" + b"x-long: 1234567890\r\n" * 400)
        assert raw.recv(4096).startswith(b"HTTP/1.1 431 ")
    with connected(plain) as raw:
        for _ in range(3):  # the bounds are those of one head, not of all together
            raw.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx-long: " + b"x" * 2000 + b"\r\n\r\n")
            answer = raw.recv(4096)
            while not answer.endswith(b"}"):
                answer += raw.recv(4096)
            assert answer.startswith(b"HTTP/1.1 200 ")
            time.sleep(0.15)
    time.sleep(0.05)
    held = [connected(plain) for _ in range(3)]
    with connected(plain) as raw:
        assert raw.recv(4096).startswith(b"HTTP/1.1 503 ")
    for one in held:
        one.close()


def test_an_answer_that_takes_too_long_is_ended(plain: Server, engine: FakeEngine) -> None:
    engine.token_delay = 0.01
    with plain.http() as http:
        answer = http.post("/v1/completions", json=TEXT | {"max_tokens": 4000})
        assert answer.status_code == 503 and "longer than this server allows" in answer.text
    wait_for(lambda: not engine.live)


def test_a_reader_that_stops_reading_is_let_go(engine: FakeEngine) -> None:
    options = ServerOptions(write_timeout=0.3, keep_alive=0.1)
    server = Server(build_app(engine, options))
    try:
        body = json.dumps({"model": "fake", "prompt": [1], "max_tokens": 4000, "stream": True, "logprobs": 20}).encode()
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(tuple([server.url.removeprefix("http://").split(":")[0], int(server.url.rsplit(":", 1)[1])]))
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        wait_for(lambda: server.app.state.server.in_flight == 1)
        wait_for(lambda: server.app.state.server.in_flight == 0)
        assert not engine.live
        raw.close()
    finally:
        server.stop()


def test_only_named_origins_may_call_from_a_browser(plain: Server, http: httpx.Client) -> None:
    ask = {"origin": "https://page.example", "access-control-request-method": "POST"}
    with plain.http() as client:
        allowed = client.options("/v1/completions", headers=ask)
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        other = client.options("/v1/completions", headers=ask | {"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
    assert "access-control-allow-origin" not in http.get("/health", headers=ask).headers


def test_json_lines_have_fields_and_no_secret(
    http: httpx.Client, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "triptych")
    http.post("/v1/completions", json=TEXT | {"prompt": "private words"}, headers=ALICE | {"x-request-id": "abc"})
    wait_for(lambda: any(r.name == "triptych.access" for r in caplog.records))
    [record] = [r for r in caplog.records if r.name == "triptych.access"]
    line = json.loads(JsonLines().format(record))
    assert (line["request_id"], line["key"], line["status"], line["completion_tokens"]) == ("abc", "alice", 200, 2)
    ours = "\n".join(JsonLines().format(r) for r in caplog.records if r.name.startswith(("triptych", "uvicorn")))
    assert "private words" not in ours and "sk-alice" not in ours
    assert b"sk-alice" not in server.app.state.server.metrics.text()


def test_prompts_are_logged_where_asked(engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    running = Server(build_app(engine, ServerOptions(log_prompts=True)))
    with running.http() as http:
        http.post("/v1/completions", json=TEXT | {"prompt": "private words"})
    running.stop()
    assert any("private words" in r.getMessage() for r in caplog.records if r.name == "triptych.prompts")


def test_tokens_and_back(http: httpx.Client, engine: FakeEngine) -> None:
    answer = http.post("/tokenize", json={"prompt": "Hello 猫", "return_token_strs": True}, headers=OPS).json()
    assert answer["tokens"] == engine.tokenizer.encode("Hello 猫").tolist() and answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 4096 and answer["token_strs"][0] == "Hello"
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}, headers=OPS).json() == {"prompt": "Hello 猫"}
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]}, headers=OPS).json()
    assert chat["tokens"][0] == engine.tokenizer.bos_id
    for path, body in [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": []}),
        ("/tokenize", {"text": "a"}),
        ("/detokenize", {"tokens": [10**9]}),
        ("/detokenize", {"tokens": "a"}),
        ("/detokenize", {}),
        ("/v1/embeddings", {"input": "a"}),
    ]:
        answer = http.post(path, json=body, headers=OPS)
        assert answer.status_code == 400 and answer.json()["error"]["message"].endswith((".", "?")), path


def test_hints_of_a_client_reach_the_engine(http: httpx.Client, engine: FakeEngine) -> None:
    def hints(**change: Any) -> Any:
        assert http.post("/v1/completions", json=TEXT | change, headers=OPS).status_code == 200
        return engine.hints[-1]

    assert hints(prompt_cache_key="s").session == "ops/s"
    assert hints(prompt_cache_retention="24h").ttl == 86400
    assert hints(prompt_cache_options={"ttl": "30m"}).ttl == 1800
    given = hints(cache_hints={"session": "t", "ttl": 60, "pin": 30})
    assert (given.session, given.ttl, given.pin) == ("ops/t", 60.0, 30.0)
    for change, param in [
        ({"prompt_cache_retention": "1y"}, "prompt_cache_retention"),
        ({"prompt_cache_options": {"ttl": "soon"}}, "prompt_cache_options.ttl"),
        ({"cache_hints": {"tttl": 1}}, "cache_hints.tttl"),
        ({"cache_hints": {"pin": -1}}, "cache_hints.pin"),
        ({"prompt_cache_key": "x" * 300}, "prompt_cache_key"),
    ]:
        answer = http.post("/v1/completions", json=TEXT | change, headers=OPS)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param
