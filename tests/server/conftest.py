"""A fake engine behind a real uvicorn on loopback, and the official client for it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from fake_engine import FakeEngine
from starlette.applications import Starlette

from triptych.server.app import build_app
from triptych.server.options import ServerOptions
from triptych.text.tokenizer import Tokenizer


class Server:
    """An app served in a thread of its own. `stop` gives open connections a second."""

    def __init__(self, app: Starlette, **settings: Any) -> None:
        self.app = app
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        settings = {"log_config": None, "access_log": False, "lifespan": "on", "ws": "none"} | settings
        config = uvicorn.Config(app, timeout_graceful_shutdown=1, **settings)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve([self._listener])))
        self._thread.start()
        wait_for(lambda: self._server.started)

    def client(self) -> openai.OpenAI:
        """The official client, without retries, so that tests see every error."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def http(self) -> httpx.Client:
        """A plain client."""
        return httpx.Client(base_url=self.url, timeout=60)

    def stop(self) -> None:
        """End the server thread."""
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until `condition` holds; fail if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.deepseek()


@pytest.fixture
def engine(tokenizer: Tokenizer) -> FakeEngine:
    return FakeEngine(tokenizer)


@pytest.fixture
def options() -> ServerOptions:
    return ServerOptions(max_body=1 << 20, keep_alive=0.2, aliases=("an-alias",))


@pytest.fixture
def server(engine: FakeEngine, options: ServerOptions) -> Iterator[Server]:
    running = Server(build_app(engine, options))
    yield running
    running.stop()


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client
