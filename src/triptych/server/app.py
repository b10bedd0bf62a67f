"""The routes of the server and the ASGI application made of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from triptych.errors import TriptychError
from triptych.server.chat import CHAT
from triptych.server.completions import COMPLETIONS
from triptych.server.control import Control
from triptych.server.dashboard import Dashboard
from triptych.server.gate import Gate
from triptych.server.generation import generation
from triptych.server.keys import Keys
from triptych.server.messages import MESSAGES
from triptych.server.options import ServerOptions
from triptych.server.pages import Pages
from triptych.server.protocol import ServingEngine
from triptych.server.responses import RESPONSES
from triptych.server.state import ServerState
from triptych.server.tokens import TokenPages


def build_app(engine: ServingEngine, options: ServerOptions | None = None, keys: Keys | None = None) -> Starlette:
    """The ASGI application over `engine`. Its lifespan starts and stops the engine; `app.state.server` is its state."""
    state = ServerState(engine, options or ServerOptions(), keys or Keys({}))
    dashboard = Dashboard(state)
    app = Starlette(
        routes=[*_routes(state), *Control(state).routes(), *dashboard.routes()],
        middleware=[*_cors(state.options), Middleware(Gate, state=state)],
        exception_handlers={TriptychError: Pages(state).refuse, HTTPException: Pages(state).refuse_http},
        lifespan=_lifespan(state, dashboard),
    )
    app.router.redirect_slashes = False
    app.state.server = state
    return app


def _routes(state: ServerState) -> list[Route]:
    pages, tokens = Pages(state), TokenPages(state)
    return [
        Route("/v1/chat/completions", generation(state, CHAT), methods=["POST"]),
        Route("/v1/completions", generation(state, COMPLETIONS), methods=["POST"]),
        Route("/v1/responses", generation(state, RESPONSES), methods=["POST"]),
        Route("/v1/responses/{name}", pages.response, methods=["GET", "DELETE"]),
        Route("/v1/responses/{name}/input_items", pages.input_items, methods=["GET"]),
        Route("/v1/messages", generation(state, MESSAGES), methods=["POST"]),
        Route("/v1/messages/count_tokens", tokens.count, methods=["POST"]),
        Route("/v1/embeddings", pages.no_embeddings, methods=["POST"]),
        Route("/v1/models", pages.models, methods=["GET"]),
        Route("/v1/models/{name:path}", pages.model, methods=["GET"]),
        Route("/tokenize", tokens.tokenize, methods=["POST"]),
        Route("/detokenize", tokens.detokenize, methods=["POST"]),
        Route("/openapi.json", pages.openapi, methods=["GET"]),
        Route("/health", pages.health, methods=["GET"]),
        Route("/health/live", pages.live, methods=["GET"]),
        Route("/metrics", pages.metrics, methods=["GET"]),
    ]


def _cors(options: ServerOptions) -> list[Middleware]:
    """Nothing unless origins are named: a page that someone visits must not use their server."""
    if not options.cors_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    ]


def _lifespan(state: ServerState, dashboard: Dashboard):  # type: ignore[no-untyped-def]
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await state.engine.start()
        try:
            async with dashboard.recording():
                yield
        finally:
            await state.engine.stop()
            state.close()

    return lifespan
