"""What one connection may do before there is a request: uvicorn's protocol with bounds on headers, time and number.

uvicorn bounds none of these with httptools: a client that sends one byte a minute, or headers without end, would hold
memory and a file handle for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from triptych.server.options import ServerOptions

_HEAD = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n"
_REFUSAL = _HEAD + b"retry-after: %d\r\n\r\n%b"
_BODY = b'{"error":{"message":"%b","type":"%b","param":null,"code":"%b"}}'


class _Bounded(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """Closes connections that send no complete head in time, too long a head, or are too many."""

    options: ServerOptions
    _head = 0  # bytes since the last complete head
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.options.max_connections:
            self._refuse(b"503 Service Unavailable", b"Too many connections are open.", b"too_many_connections")
            return
        self._timer = self.loop.call_later(self.options.header_timeout, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        waits_for_head = self.cycle is None or self.cycle.response_complete
        if waits_for_head:
            if self._timer is None:  # a further request on a kept connection
                self._timer = self.loop.call_later(self.options.header_timeout, self._late)
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before:
                self._stop_timer()
                self._head = 0
            else:
                self._head += len(data)
                if self._head > self.options.max_header:
                    self._refuse(
                        b"431 Request Header Fields Too Large", b"The headers are too long.", b"headers_too_large"
                    )
            return
        super().data_received(data)

    def _late(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self._refuse(b"408 Request Timeout", b"The request did not arrive in time.", b"request_timeout")

    def _refuse(self, status: bytes, sentence: bytes, code: bytes) -> None:
        kind = b"server_error" if status.startswith(b"5") else b"invalid_request_error"
        body = _BODY % (sentence, kind, code)
        self._stop_timer()
        self.transport.write(_REFUSAL % (status, len(body), self.options.retry_after, body))
        self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def bounded_protocol(options: ServerOptions) -> type[asyncio.Protocol]:
    """The HTTP protocol class that uvicorn shall use, with the bounds of `options`."""
    return type("Bounded", (_Bounded,), {"options": options})
