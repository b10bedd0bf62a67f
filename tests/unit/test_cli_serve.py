"""What `serve` checks before it loads a model."""

from __future__ import annotations

import importlib.util
import socket

import pytest

from triptych.cli.main import main
from triptych.cli.serve import check_address, need_server_packages
from triptych.errors import ConfigError
from triptych.server.options import ServerOptions


@pytest.fixture
def taken() -> object:
    """A port that something listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_taken_port_is_one_sentence_and_no_model_is_loaded(capsys: pytest.CaptureFixture[str], taken: int) -> None:
    assert main(["serve", "/nowhere/at/all", "--port", str(taken)]) == 2
    err = capsys.readouterr().err
    assert err == (
        f"triptych: Cannot listen on 127.0.0.1 port {taken}. "
        "Another program listens there: stop it, or choose another --port.\n"
    )


def test_a_free_port_passes_and_stays_free() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    check_address("127.0.0.1", port)
    check_address("127.0.0.1", port)
    check_address("127.0.0.1", 0)


@pytest.mark.parametrize(
    ("host", "port", "sentence"),
    [
        ("no such host", 8000, "'no such host' is no address"),
        ("192.0.2.1", 8000, "not one of this machine's"),
    ],
)
def test_addresses_that_cannot_work_are_named(host: str, port: int, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_address(host, port)


def test_a_missing_web_stack_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    with pytest.raises(
        ConfigError, match=r"The server needs uvicorn\. Install it with: pip install 'triptych\[server\]'"
    ):
        need_server_packages()


@pytest.mark.parametrize("port", ["70000", "-1"])
def test_a_port_out_of_range_is_named(capsys: pytest.CaptureFixture[str], port: str) -> None:
    assert main(["serve", "--port", port]) == 2
    assert f"port must be from 0 to 65535, not {port}" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "ten", "5 parsecs"])
def test_a_wrong_body_limit_names_its_option(capsys: pytest.CaptureFixture[str], size: str) -> None:
    assert main(["serve", "--max-body", size]) == 2
    assert "--max-body" in capsys.readouterr().err


@pytest.mark.parametrize("origin", ["example.org", "https://example.org/", "https://"])
def test_an_origin_that_no_browser_sends_is_refused(capsys: pytest.CaptureFixture[str], origin: str) -> None:
    assert main(["serve", "/nowhere/at/all", "--cors-origin", origin]) == 2
    assert f"--cors-origin {origin!r} is none. Write it as browsers do" in capsys.readouterr().err


def test_origins_that_browsers_send_are_taken() -> None:
    ServerOptions(cors_origins=("https://example.org", "http://127.0.0.1:3000", "http://[::1]:5173", "null", "*"))
