"""Signals: the first drains, the second ends what runs, the third does not wait. Each test runs a server process."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from conftest import wait_for

from triptych.cli.serve import check_tls
from triptych.errors import ConfigError
from triptych.server.options import ServerOptions
from triptych.server.run import run_server

HERE = Path(__file__).parent
LONG = {"model": "fake", "prompt": [1, 2], "stream": True, "max_tokens": 90_000}


@contextmanager
def serving(
    token_delay: float, drain_timeout: float, *tls: str
) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A server process and a client for it. The process is killed if the test leaves it running."""
    command = [sys.executable, str(HERE / "serve_fake.py"), str(token_delay), str(drain_timeout), *tls]
    path = [str(HERE), str(HERE.parents[1] / "src")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={"PYTHONPATH": ":".join(path)}
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        trust = ssl.create_default_context(cafile=tls[0]) if tls else False
        with httpx.Client(base_url=url, timeout=30, verify=trust) as client:
            yield process, client
    finally:
        process.kill()
        process.communicate()


def reads_on(lines: Iterator[str]) -> list[str]:
    """The remaining data of a stream."""
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def test_running_requests_end_while_new_ones_are_refused() -> None:
    with serving(0.01, 30.0) as (process, client):
        ask = LONG | {"max_tokens": 150}
        with client.stream("POST", "/v1/completions", json=ask) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: client.get("/health").status_code == 503)
            refused = client.post("/v1/completions", json=ask)
            assert refused.status_code == 503 and refused.headers["retry-after"] == "2"
            rest = reads_on(lines)
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["choices"][0]["finish_reason"] == "length"
        out, log = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "ended in order engine stopped" in out
    assert "SIGTERM: draining 1 requests" in log and "status=503" in log


def test_what_outlasts_the_drain_ends_with_an_error_event() -> None:
    with serving(0.01, 0.3) as (process, client):
        with client.stream("POST", "/v1/completions", json=LONG) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = reads_on(lines)
        assert "the server stops" in json.loads(rest[-1])["error"]["message"]
        process.communicate(timeout=30)
    assert process.returncode == 0


def test_an_idle_server_stops_at_the_first_signal() -> None:
    with serving(0.0, 30.0) as (process, client):
        assert client.get("/health").status_code == 200  # leaves a connection open
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "ended in order engine stopped" in out


def test_a_second_signal_ends_what_runs_in_order() -> None:
    with serving(0.01, 600.0) as (process, client):
        with client.stream("POST", "/v1/completions", json=LONG) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            with httpx.Client(base_url=client.base_url) as other:
                wait_for(lambda: other.get("/health").status_code == 503)
            process.send_signal(signal.SIGINT)
            rest = reads_on(lines)
        assert "the server stops" in json.loads(rest[-1])["error"]["message"]
        out, log = process.communicate(timeout=30)
    assert process.returncode == 0 and "ended in order engine stopped" in out
    assert "again ends them at once" in log and "Traceback" not in log


def test_who_reads_nothing_does_not_keep_a_stopping_server() -> None:
    with serving(0.0, 3.0) as (process, client):
        body = json.dumps(LONG | {"n": 32}).encode()
        with socket.socket() as silent:
            silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            silent.connect((client.base_url.host, client.base_url.port or 80))
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            silent.sendall(head.encode() + body)
            silent.recv(1)
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=30)
    assert process.returncode == 0 and "Traceback" not in log, log


def test_a_third_signal_stops_at_once() -> None:
    with serving(0.01, 600.0) as (process, client), client.stream("POST", "/v1/completions", json=LONG) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        with httpx.Client(base_url=client.base_url) as other:
            wait_for(lambda: other.get("/health").status_code == 503)
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
        with suppress(httpx.RemoteProtocolError):
            list(lines)
        process.wait(timeout=20)


def test_an_address_in_use_is_a_clear_error(tokenizer: object) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"Cannot listen on 127.0.0.1:{port}: Address already in use"):
            run_server(None, ServerOptions(port=port))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"Cannot listen on no\.such\.host\.invalid"):
        run_server(None, ServerOptions(host="no.such.host.invalid", port=0))  # type: ignore[arg-type]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_tls(tmp_path: Path) -> None:
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "2"]
    subprocess.run([*make, *subject], check=True, capture_output=True)
    with serving(0.0, 1.0, cert, key) as (process, client):
        assert str(client.base_url).startswith("https://")
        answer = client.post("/v1/completions", json=LONG | {"max_tokens": 3, "stream": False})
        assert answer.json()["usage"]["completion_tokens"] == 3
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    check_tls(cert, key)
    for pair in ((cert, cert), (str(tmp_path / "none.pem"), key)):
        with pytest.raises(ConfigError, match="cannot be used"):
            check_tls(*pair)
    with pytest.raises(ConfigError, match=r"cannot be used: no PEM\."):
        check_tls(__file__, __file__)
