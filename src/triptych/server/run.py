"""Listening on a socket until told to stop: uvicorn, with a drain before its shutdown."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from triptych.errors import ConfigError
from triptych.server.app import build_app
from triptych.server.connection import bounded_protocol
from triptych.server.keys import Keys
from triptych.server.logs import configure
from triptych.server.options import ServerOptions
from triptych.server.protocol import ServingEngine
from triptych.server.state import ServerState

logger = logging.getLogger("triptych.server")

_FLUSH = 2  # seconds that connections get to send what is written, after the last request


def run_server(
    engine: ServingEngine,
    options: ServerOptions | None = None,
    keys: Keys | None = None,
    *,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. `ready` is called with the base URL once requests are accepted.

    The first signal drains: running requests may end within `options.drain_timeout`, new ones get 503. A second one
    ends them now, with an error event, and a third does not wait for that. Raises ConfigError if the address cannot
    be had.
    """
    options = options or ServerOptions()
    listener = _listen(options.host, options.port)
    configure(options.log_level, options.log_format)
    app = build_app(engine, options, keys)
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        ws="none",
        http=bounded_protocol(options),
        h11_max_incomplete_event_size=options.max_header,
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=_FLUSH,
    )
    host, port = listener.getsockname()[:2]
    scheme = "https" if options.tls_cert else "http"
    url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    def announce() -> None:
        logger.info("serving %s on %s", ", ".join(app.state.server.names), url)
        if ready is not None:
            ready(url)

    _DrainingServer(config, app.state.server, announce).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"Cannot listen on {host}:{port}: {error.strerror}.", "Choose another --port.") from None


class _DrainingServer(uvicorn.Server):
    """uvicorn closes its socket on the first signal, and drops connections on the second, with a trace of each.

    This one first lets running requests end, then ends them.
    """

    def __init__(self, config: uvicorn.Config, state: ServerState, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._state = state
        self._announce = announce
        self._signals = 0
        self._events: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Bind, then tell that requests are welcome."""
        await super().startup(sockets)
        self._events = asyncio.get_running_loop()
        self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See `run_server`. uvicorn would re-raise the signal after an orderly end."""
        self._signals += 1
        if self._signals > 2 or self._events is None:
            self.should_exit = self.force_exit = True
        elif self._signals == 2:
            self._events.call_soon_threadsafe(self._state.hurry)
        else:
            self._events.call_soon_threadsafe(self._begin_drain, signal.Signals(sig).name)

    def _begin_drain(self, name: str) -> None:
        self._drain = asyncio.create_task(self._drain_then_exit(name))

    async def _drain_then_exit(self, name: str) -> None:
        timeout = self._state.options.drain_timeout
        running = self._state.in_flight
        logger.info("%s: draining %d requests, %g s at most; again ends them at once", name, running, timeout)
        if not await self._state.drain(timeout):
            logger.warning("%d requests were still running and are ended", self._state.in_flight)
            await self._state.engine.stop()  # their streams end with an error event
        self.should_exit = True
