"""HTTP that Starlette leaves to us: bounded bodies, errors in OpenAI's shape, event streams, clients that leave."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from triptych.errors import BodyTooLarge, QueueFull, TooSlow, TriptychError
from triptych.server import wire
from triptych.server.options import ServerOptions

logger = logging.getLogger(__name__)

_LINGER = 2.0  # seconds that the rest of an oversized body is read and thrown away


class ClientLeft(Exception):
    """The client closed the connection before its answer was complete."""


class Bodies:
    """Reads request bodies, each bounded in size and time, all together in memory."""

    def __init__(self, options: ServerOptions) -> None:
        self._options = options
        self._held = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The whole body, accounted for while the block runs.

        BodyTooLarge before more than the limit is kept, QueueFull if the bodies of all requests take too much, TooSlow
        if it does not come in time, ClientLeft if the client leaves.
        """
        limit = self._options.max_body
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise _too_large(f"{int(length):,}", limit)
        size = 0
        try:
            try:
                async with asyncio.timeout(self._options.body_timeout):
                    whole: list[bytes] = []
                    async for part in parts(request):
                        size += len(part)
                        self._held += len(part)
                        self._check(size)
                        whole.append(part)
            except TimeoutError:
                raise TooSlow(f"The body did not arrive within {self._options.body_timeout:g} s.", "Retry.") from None
            yield b"".join(whole)
        finally:
            self._held -= size

    def _check(self, size: int) -> None:
        if size > self._options.max_body:
            raise _too_large("more", self._options.max_body)
        if self._held > self._options.max_bodies:
            raise QueueFull("The bodies of all requests together take too much memory now.", "Retry later.")


async def parts(request: Request) -> AsyncIterator[bytes]:
    """The body as it comes. ClientLeft if the client leaves."""
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        yield message.get("body", b"")
        more = message.get("more_body", False)


def _too_large(size: str, limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body has {size} bytes; at most {limit:,} are accepted.", "Send a smaller request.")


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A struct of `wire` as a JSON response."""
    return Response(wire.encode(value), status, dict(headers or {}), media_type="application/json")


def error_body(error: TriptychError) -> wire.ErrorBody:
    """`error` in OpenAI's shape."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return wire.ErrorBody(wire.WireError(str(error), kind, getattr(error, "param", None), error.code))


def refusal(error: TriptychError, scope: Scope, retry_after: int) -> Response:
    """`error` as a response of its status, in the shape of the API that was called; 429, 503 say when to come back."""
    body: object = error_body(error)
    if scope["path"].startswith("/v1/messages"):
        body = wire.AnthropicError.of(str(error), error.status, scope["state"]["record"].request_id)
    headers = {}
    if error.status in (429, 503):
        headers["retry-after"] = str(getattr(error, "retry_after", retry_after))
    if error.status in (408, 413):
        headers["connection"] = "close"
        return _LastWords(wire.encode(body), error.status, headers)
    return json_response(body, error.status, headers)


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


@dataclass(frozen=True, slots=True)
class StreamStyle:
    """How an API spells events, their end, and silence that must not look like death."""

    event: Callable[[object], bytes] = wire.event
    done: bytes = wire.DONE
    idle: bytes = wire.COMMENT


class EventStream(Response):
    """Server-sent events from a generator of encoded events.

    The status line waits for the first event, so an error before it is an ordinary error response; after `keep_alive`
    seconds of silence it goes out with a comment, and such an error becomes what `error` makes of it. When the client
    leaves, the generator is closed; when it reads slowly, only this generator waits, `write_timeout` seconds at most.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        options: ServerOptions,
        error: Callable[[TriptychError], bytes],
        idle: bytes = wire.COMMENT,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._options = options
        self._error = error
        self._comment = idle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_left(receive, self._answer(send))

    async def _answer(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            first = asyncio.ensure_future(anext(events, None))
            try:
                await asyncio.wait({first}, timeout=self._options.keep_alive)
                if first.done():
                    first.result()  # raises what becomes an ordinary error response
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await self._tell(first, events, send)
            finally:
                await _cancelled(first)

    async def _tell(self, first: asyncio.Future[Any], events: AsyncGenerator[bytes, None], send: Send) -> None:
        keeper = _Keeper(send, self._options, self._comment)
        try:
            event = await first
            while event is not None:
                await keeper.send(event)
                event = await anext(events, None)
        except TriptychError as error:
            await keeper.send(self._error(error))
        except ClientLeft:
            raise
        except Exception:
            logger.exception("a stream failed")
            await keeper.send(self._error(TriptychError("An internal error ended this answer.")))
        finally:
            await keeper.close()
        await send({"type": "http.response.body", "body": b""})


class _Keeper:
    """Sends events, a comment after a silence of `keep_alive` seconds, and gives up a reader that takes nothing."""

    def __init__(self, send: Send, options: ServerOptions, comment: bytes) -> None:
        self._send = send
        self._idle = options.keep_alive
        self._patience = options.write_timeout
        self._comment = comment
        self._sent = False
        self._sending_since: float | None = None
        self._sender: asyncio.Task[Any] | None = None
        self._gave_up = False
        self._task = asyncio.create_task(self._keep())

    async def send(self, data: bytes) -> None:
        self._sent = True
        self._sending_since = time.monotonic()
        self._sender = asyncio.current_task()
        try:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
        except asyncio.CancelledError:
            if self._gave_up:
                raise ClientLeft from None
            raise
        self._sending_since = None

    async def close(self) -> None:
        await _cancelled(self._task)

    async def _keep(self) -> None:
        while True:
            since = self._sending_since
            if since is not None:
                if time.monotonic() - since > self._patience and self._sender is not None:
                    self._gave_up = True
                    self._sender.cancel()
                    return
            elif not self._sent:
                await self._send({"type": "http.response.body", "body": self._comment, "more_body": True})
            self._sent = False
            await asyncio.sleep(min(self._idle, self._patience))
