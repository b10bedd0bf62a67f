"""HTTP that Starlette leaves to us: bounded bodies, errors in OpenAI's shape, event streams, clients that leave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from triptych.errors import BodyTooLarge, TriptychError
from triptych.server import wire

logger = logging.getLogger(__name__)

_LINGER = 2.0  # seconds that the rest of an oversized body is read and thrown away


class ClientLeft(Exception):
    """The client closed the connection before its answer was complete."""


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. BodyTooLarge before more than `limit` bytes are kept, ClientLeft if the client leaves."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise _too_large(f"{int(length):,}", limit)
    parts: list[bytes] = []
    size = 0
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _too_large("more", limit)
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)


def _too_large(size: str, limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body has {size} bytes; at most {limit:,} are accepted.", "Send a smaller request.")


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A struct of `wire` as a JSON response."""
    return Response(wire.encode(value), status, dict(headers or {}), media_type="application/json")


def error_body(error: TriptychError) -> wire.ErrorBody:
    """`error` in OpenAI's shape."""
    kinds = {429: "rate_limit_error"}
    kind = kinds.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return wire.ErrorBody(wire.WireError(str(error), kind, getattr(error, "param", None), error.code))


def error_response(error: TriptychError, retry_after: int) -> Response:
    """`error` as a response of its status; 429 and 503 say when to come back."""
    headers = {"retry-after": str(retry_after)} if error.status in (429, 503) else {}
    if isinstance(error, BodyTooLarge):
        return _LastWords(wire.encode(error_body(error)), error.status, {"connection": "close"})
    return json_response(error_body(error), error.status, headers)


class _LastWords(Response):
    """A response to a body that nobody wants to read.

    Closing at once would reset the connection, and the client, still sending, would see that and not our sentence.
    So the rest is thrown away for a moment before the connection closes.
    """

    media_type = "application/json"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b""})


async def until_left(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_left(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`; if the client leaves first, `work` is cancelled and ClientLeft raised."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(until_left(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return working.result()
    finally:
        await _cancelled(working, watching)


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    """Cancel the tasks and wait until they have cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Server-sent events from a generator of encoded events.

    The status line waits for the first event, so an error before it is an ordinary error response; after `idle`
    seconds of silence it goes out with a comment, and such an error becomes an event. When the client leaves, the
    generator is closed; when the client reads slowly, only this generator waits.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], idle: float) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._idle = idle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_left(receive, self._answer(send))

    async def _answer(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            first = asyncio.ensure_future(anext(events, None))
            try:
                await asyncio.wait({first}, timeout=self._idle)
                if first.done():
                    first.result()  # raises what becomes an ordinary error response
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await self._tell(first, events, send)
            finally:
                await _cancelled(first)

    async def _tell(self, first: asyncio.Future[Any], events: AsyncGenerator[bytes, None], send: Send) -> None:
        keeper = _Keeper(send, self._idle)
        try:
            event = await first
            while event is not None:
                await keeper.send(event)
                event = await anext(events, None)
        except TriptychError as error:
            await keeper.send(wire.event(error_body(error)))
        except Exception:
            logger.exception("a stream failed")
            await keeper.send(wire.event(error_body(TriptychError("An internal error ended this answer."))))
        finally:
            await keeper.close()
        await send({"type": "http.response.body", "body": b""})


class _Keeper:
    """Sends events, and a comment whenever nothing was sent for `idle` seconds."""

    def __init__(self, send: Send, idle: float) -> None:
        self._send = send
        self._idle = idle
        self._sent = False
        self._task = asyncio.create_task(self._keep())

    async def send(self, data: bytes) -> None:
        self._sent = True
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def close(self) -> None:
        await _cancelled(self._task)

    async def _keep(self) -> None:
        while True:
            if not self._sent:
                await self._send({"type": "http.response.body", "body": wire.COMMENT, "more_body": True})
            self._sent = False
            await asyncio.sleep(self._idle)
