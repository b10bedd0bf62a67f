"""The first and last to see each request: names it, asks whose it is, refuses it, counts it, logs how it ended."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from contextlib import ExitStack

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from triptych.errors import Forbidden, QueueFull, TriptychError, Unavailable
from triptych.server.control import PATHS, PREFIX
from triptych.server.dashboard import DATA, STATIC
from triptych.server.http import ClientLeft, refusal
from triptych.server.record import CLIENT_LEFT, Record
from triptych.server.state import ServerState

logger = logging.getLogger(__name__)

_SANE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
# for load balancers, which have no key, and for browsers, which cannot send one with the address of a page
_OPEN = STATIC | {"/health", "/health/live"}
_ADMIN = ("/metrics", DATA, PREFIX)


class Gate:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        record = self._record(Request(scope))
        scope.setdefault("state", {})["record"] = record
        started = False

        async def noting_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                record.status = record.status or message["status"]
                headers = [*message.get("headers", []), (b"x-request-id", record.request_id.encode("ascii"))]
                message = {**message, "headers": headers}
            await send(message)

        with self._state.counting(record):
            try:
                async with asyncio.timeout(self._state.options.request_timeout) as limit:
                    await self._pass(scope, receive, noting_send)
            except ClientLeft:
                record.status = CLIENT_LEFT
            except asyncio.CancelledError:
                if not self._state.draining:
                    raise
                record.status = CLIENT_LEFT  # it read nothing while the server stopped; nobody else cancels requests
            except Exception as error:
                fault = self._fault(error, record, limit.expired())
                record.status = fault.status
                if not started:
                    await self._refuse(fault, scope, receive, noting_send)

    def _fault(self, error: Exception, record: Record, late: bool) -> TriptychError:
        """What the client is told about `error`."""
        if isinstance(error, TimeoutError) and late:
            logger.warning("request %s took too long and was ended", record.request_id)
            return Unavailable("The answer took longer than this server allows.", "Ask for less.")
        if isinstance(error, TriptychError):
            return error
        logger.error("request %s failed", record.request_id, exc_info=error)
        return TriptychError("An internal error occurred.", "The server's log has the details.")

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        state, path, record = self._state, scope["path"], scope["state"]["record"]
        with ExitStack() as held:
            if path not in _OPEN:
                caller = record.caller = state.keys.caller(Request(scope).headers)
                if not caller.admin and path.startswith(_ADMIN):
                    raise Forbidden(f"{path} needs a key with admin rights.", "Ask the operator for one.")
                if scope["method"] == "POST" and path not in PATHS:
                    self._check_room()
                    held.enter_context(caller.limits.admitted())
            await self._app(scope, receive, send)

    def _check_room(self) -> None:
        state = self._state
        if state.draining:
            raise Unavailable("The server is shutting down and takes no new requests.", "Retry elsewhere or later.")
        if state.in_flight > state.most_in_flight:
            raise QueueFull(
                f"{state.most_in_flight} requests are being answered, the most that may be.", "Retry later."
            )

    async def _refuse(self, error: TriptychError, scope: Scope, receive: Receive, send: Send) -> None:
        response = refusal(error, scope, self._state.options.retry_after)
        if self._state.draining:
            response.headers["connection"] = "close"
        if error.status == 401:
            response.headers["www-authenticate"] = "Bearer"
        await response(scope, receive, send)

    def _record(self, request: Request) -> Record:
        wanted = request.headers.get("x-request-id", "")
        request_id = wanted if _SANE_ID.fullmatch(wanted) else f"req-{uuid.uuid4().hex}"
        return Record(request_id, request.method, request.scope["path"], self._state.metrics)
