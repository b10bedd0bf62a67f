"""The first and last to see each request: names it, counts it, refuses it while draining, logs how it ended."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from triptych.errors import TriptychError, Unavailable
from triptych.server.http import ClientLeft, error_response
from triptych.server.record import CLIENT_LEFT, Record
from triptych.server.state import ServerState

logger = logging.getLogger(__name__)

_SANE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


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
                await self._pass(scope, receive, noting_send)
            except ClientLeft:
                record.status = CLIENT_LEFT
            except Exception:
                logger.exception("request %s failed", record.request_id)
                record.status = 500
                if not started:
                    error = TriptychError("An internal error occurred.", "The server's log has the details.")
                    await error_response(error, self._state.options.retry_after)(scope, receive, noting_send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._state.draining and scope["method"] == "POST":
            error = Unavailable("The server is shutting down and takes no new requests.", "Retry elsewhere or later.")
            response = error_response(error, self._state.options.retry_after)
            response.headers["connection"] = "close"
            return await response(scope, receive, send)
        await self._app(scope, receive, send)

    def _record(self, request: Request) -> Record:
        wanted = request.headers.get("x-request-id", "")
        request_id = wanted if _SANE_ID.fullmatch(wanted) else f"req-{uuid.uuid4().hex}"
        return Record(request_id, request.method, request.scope["path"], self._state.metrics)
