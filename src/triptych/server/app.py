"""The routes of the server and the ASGI application made of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from triptych.errors import TriptychError, nearest
from triptych.server import wire
from triptych.server.answer import collect, events
from triptych.server.ask import Ask, Shape
from triptych.server.chat import ChatShape, read_chat
from triptych.server.completions import TextShape, read_completion
from triptych.server.dashboard import Dashboard
from triptych.server.fields import parse_object
from triptych.server.gate import Gate
from triptych.server.http import EventStream, error_response, json_response, read_body, unless_left
from triptych.server.options import ServerOptions
from triptych.server.protocol import ServingEngine
from triptych.server.record import ENDPOINTS, Record
from triptych.server.state import ServerState
from triptych.text.tokenizer import Tokenizer

_Read = Callable[[dict[str, object], ServingEngine, str], Ask]
_Form = Callable[[Ask, Tokenizer], Shape]


def build_app(engine: ServingEngine, options: ServerOptions | None = None) -> Starlette:
    """The ASGI application over `engine`. Its lifespan starts and stops the engine; `app.state.server` is its state."""
    state = ServerState(engine, options or ServerOptions())
    dashboard = Dashboard(state)
    pages = _Pages(state, dashboard)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", _generation(state, read_chat, ChatShape), methods=["POST"]),
            Route("/v1/completions", _generation(state, read_completion, TextShape), methods=["POST"]),
            Route("/v1/models", pages.models, methods=["GET"]),
            Route("/v1/models/{name:path}", pages.model, methods=["GET"]),
            Route("/health", pages.health, methods=["GET"]),
            Route("/health/live", pages.live, methods=["GET"]),
            Route("/metrics", pages.metrics, methods=["GET"]),
            *dashboard.routes(),
        ],
        middleware=[Middleware(Gate, state=state)],
        exception_handlers={TriptychError: pages.refuse, HTTPException: pages.refuse_http},
        lifespan=pages.lifespan,
    )
    app.router.redirect_slashes = False
    app.state.server = state
    return app


def _generation(state: ServerState, read: _Read, form: _Form) -> Callable[[Request], object]:
    """An endpoint that reads an Ask from the body and answers it in the form of its API."""

    def prepare(body: bytes) -> Ask:
        raw = parse_object(body)
        name = state.model_name(raw.get("model"))
        return read(raw, state.engine, name)

    async def endpoint(request: Request) -> Response:
        record: Record = request.state.record
        body = await read_body(request, state.options.max_body)
        ask = await unless_left(request.receive, state.in_thread(lambda: prepare(body)))
        shape = form(ask, state.engine.tokenizer)
        if ask.stream:
            return EventStream(events(state.engine, ask, shape, record), state.options.keep_alive)
        answers, usage = await unless_left(request.receive, collect(state.engine, ask, record))
        if ask.params.logprobs is None:
            return json_response(shape.whole(answers, usage))
        # logprobs of a long answer are millions of objects: not on the event loop
        return await state.in_thread(lambda: json_response(shape.whole(answers, usage)))

    return endpoint


class _Pages:
    """The endpoints that generate nothing, and what errors look like."""

    def __init__(self, state: ServerState, dashboard: Dashboard) -> None:
        self._state = state
        self._dashboard = dashboard

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        await self._state.engine.start()
        try:
            async with self._dashboard.recording():
                yield
        finally:
            await self._state.engine.stop()
            self._state.close()

    def _model(self, name: str) -> wire.Model:
        return wire.Model(name, self._state.born, self._state.engine.max_context)

    async def models(self, request: Request) -> Response:
        return json_response(wire.ModelList([self._model(name) for name in self._state.names]))

    async def model(self, request: Request) -> Response:
        return json_response(self._model(self._state.model_name(request.path_params["name"])))

    async def health(self, request: Request) -> Response:
        if self._state.draining:
            headers = {"retry-after": str(self._state.options.retry_after)}
            return json_response({"status": "draining"}, 503, headers)
        return json_response({"status": "ok", "model": self._state.names[0]})

    async def live(self, request: Request) -> Response:
        return json_response({"status": "alive"})

    async def metrics(self, request: Request) -> Response:
        return Response(self._state.metrics.text(), media_type="text/plain; version=0.0.4")

    async def refuse(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, TriptychError)
        return error_response(error, self._state.options.retry_after)

    async def refuse_http(self, request: Request, error: Exception) -> Response:
        """Starlette's own refusals: an unknown path, a wrong method."""
        assert isinstance(error, HTTPException)
        path = request.url.path[:80]
        sentences = {
            404: f"There is nothing at {path!r}. {nearest(path, ENDPOINTS)}",
            405: f"{path!r} does not take {request.method[:20]}.",
        }
        refusal = wire.WireError(sentences.get(error.status_code, error.detail), "invalid_request_error")
        return json_response(wire.ErrorBody(refusal), error.status_code, error.headers)
