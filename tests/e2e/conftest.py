"""A server and the command line as a user runs them."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from live_server import Server, start_server, stop_server

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment for child processes: the bundled checkpoint is written to a folder of this run."""
    cache = tmp_path_factory.mktemp("cache")
    return {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="session")
def server(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that leave it running."""
    started = start_server(environment, tmp_path_factory.mktemp("server"))
    yield started
    assert stop_server(started) == 0, started.log.read_text()


@dataclass(frozen=True)
class Done:
    """What a command returned and printed."""

    returncode: int
    stdout: str
    stderr: str


class PipedInput(io.TextIOWrapper):
    """Standard input as a pipe would give it."""

    def __init__(self, text: str) -> None:
        super().__init__(io.BytesIO(text.encode()), encoding="utf-8")


@pytest.fixture
def triptych(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> object:
    """Run `triptych ARGV` in this process, with standard input piped in."""
    from triptych.cli.main import main

    def run(*argv: str, stdin: str = "") -> Done:
        monkeypatch.setenv("XDG_CACHE_HOME", environment["XDG_CACHE_HOME"])
        monkeypatch.setattr(sys, "stdin", PipedInput(stdin))
        capsys.readouterr()
        status = main(list(argv))
        return Done(status, *capsys.readouterr())

    return run
