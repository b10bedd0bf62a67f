"""/admin: pausing the engine and giving it new weights, for a trainer. Off unless a directory for them is named."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from triptych.errors import ConfigError, Forbidden, RequestError, TooSlow, nearest
from triptych.server.fields import Fields, FieldTable, parse_object
from triptych.server.http import json_response, parts, unless_left
from triptych.server.state import ServerState
from triptych.words import RUNNING, Running, WeightsUpdate

logger = logging.getLogger(__name__)

PREFIX = "/admin/"
PATHS = frozenset(PREFIX + name for name in ("state", "pause", "resume", "update_weights"))
FIELDS = FieldTable(read=frozenset({"path", "running", "timeout"}), harmless=frozenset(), refused={})
BYTES = "application/octet-stream"
"""The content type of an update whose body is a safetensors file."""


class Control:
    """The routes and what they answer. Whether a caller may use them is the gate's business."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def routes(self) -> list[Route]:
        """None where no directory of weights is named."""
        if self._state.options.weights_root is None:
            return []
        return [
            Route(PREFIX + "state", self.state, methods=["GET"]),
            Route(PREFIX + "pause", self.pause, methods=["POST"]),
            Route(PREFIX + "resume", self.resume, methods=["POST"]),
            Route(PREFIX + "update_weights", self.update_weights, methods=["POST"]),
        ]

    async def state(self, request: Request) -> Response:
        """Whether it runs, is paused or updating, the version of the weights, and requests."""
        return self._told()

    async def pause(self, request: Request) -> Response:
        """No step begins any more when this is answered."""
        await self._state.engine.pause()
        logger.info("paused by %s", self._who(request))
        return self._told(state="paused")

    async def resume(self, request: Request) -> Response:
        """Go on."""
        await self._state.engine.resume()
        logger.info("resumed by %s", self._who(request))
        return self._told(state="running")

    async def update_weights(self, request: Request) -> Response:
        """New weights from a directory, or from a body that is a safetensors file. A client that leaves while requests
        are waited for takes its update back."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() == BYTES:
            done = await self._upload(request)
        else:
            async with self._state.bodies.read(request) as body:
                raw = parse_object(body)
            FIELDS.check(raw)
            path = self._inside(Fields(raw).text("path"))
            running, timeout = _how(Fields(raw))
            work = self._state.engine.update_weights(path, running=running, timeout=timeout)
            with _blaming():
                done = await unless_left(request.receive, work)
        logger.info("weights version %d, %s, put in place by %s", done.version, done.identity[:16], self._who(request))
        return json_response(done)

    async def _upload(self, request: Request) -> WeightsUpdate:
        raw: dict[str, Any] = dict(request.query_params)
        FieldTable(FIELDS.read - {"path"}, frozenset(), {}).check(raw)
        if "timeout" in raw:
            try:
                raw["timeout"] = float(raw["timeout"])
            except ValueError:
                raise RequestError("timeout must be a number of seconds.", param="timeout") from None
        running, timeout = _how(Fields(raw))
        pieces = _pulled(self._pieces(request), asyncio.get_running_loop())
        with _blaming():
            return await self._state.engine.upload_weights(pieces, running=running, timeout=timeout)

    async def _pieces(self, request: Request) -> AsyncIterator[bytes]:
        """The body as it comes. It may be large, but it must come."""
        patience, pieces = self._state.options.body_timeout, parts(request)
        while True:
            try:
                async with asyncio.timeout(patience):
                    piece = await anext(pieces, None)
            except TimeoutError:
                raise TooSlow(f"Nothing of the body came for {patience:g} s.", "Retry.") from None
            if piece is None:
                return
            yield piece

    def _inside(self, path: str | None) -> Path:
        """The directory that a caller names, which must lie in the one that the operator named."""
        if not path:
            raise RequestError("path is missing.", "Name a directory below --weights-root.", param="path")
        root = Path(str(self._state.options.weights_root)).expanduser().resolve()
        try:
            found = (root / path).resolve()
        except (OSError, ValueError):
            raise RequestError("path is no path.", param="path") from None
        if not found.is_relative_to(root):
            raise Forbidden("path leaves the directory of --weights-root.", "Put the checkpoint into it.", param="path")
        if not (found / "config.json").is_file():
            raise RequestError(f"There is no checkpoint in {path[:200]!r}.", "Write all of it first.", param="path")
        return found

    def _told(self, **known: str) -> Response:
        stats = self._state.engine.stats()
        told = {"state": stats.state, "weights": stats.weights, "running": stats.running, "waiting": stats.waiting}
        return json_response(told | known)

    @staticmethod
    def _who(request: Request) -> str:
        return request.state.record.caller.name or "a caller without a key"


@contextmanager
def _blaming() -> Iterator[None]:
    """Weights that cannot be used are the sender's fault, not the server's."""
    try:
        yield
    except ConfigError as error:
        raise RequestError(error.message, error.remedy) from None


def _how(fields: Fields) -> tuple[Running, float | None]:
    """What becomes of running requests, and how many seconds their end is waited for."""
    given, timeout = fields.text("running"), fields.number("timeout")
    found = next((one for one in RUNNING if one == (given or "drain")), None)
    if found is None:
        raise RequestError(
            f"running must be one of {', '.join(RUNNING)}.", nearest(str(given)[:40], RUNNING), param="running"
        )
    if timeout is not None and not timeout > 0:
        raise RequestError(
            "timeout must be above 0 seconds.", "Leave it out to wait as long as it takes.", param="timeout"
        )
    return found, timeout


def _pulled(pieces: AsyncIterator[bytes], events: asyncio.AbstractEventLoop) -> Iterator[bytes]:
    """What arrives on the event loop, for a thread beside it."""

    async def one() -> bytes | None:
        return await anext(pieces, None)

    while (piece := asyncio.run_coroutine_threadsafe(one(), events).result()) is not None:
        yield piece
