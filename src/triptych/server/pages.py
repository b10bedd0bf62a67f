"""The endpoints that generate nothing, and what errors look like."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from triptych.errors import NotFound, RequestError, TriptychError, Unsupported, nearest
from triptych.server import wire
from triptych.server.http import json_response, refusal
from triptych.server.openapi import document
from triptych.server.record import ENDPOINTS
from triptych.server.state import ServerState


class _WrongMethod(RequestError):
    status = 405
    code = "method_not_allowed"


class Pages:
    """Models, health, metrics, refusals."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def _model(self, name: str) -> wire.Model:
        return wire.Model(name, self._state.born, self._state.engine.max_context)

    async def models(self, request: Request) -> Response:
        """The names that this server answers to."""
        return json_response(wire.ModelList([self._model(name) for name in self._state.names]))

    async def model(self, request: Request) -> Response:
        """One of them."""
        return json_response(self._model(self._state.model_name(request.path_params["name"])))

    async def health(self, request: Request) -> Response:
        """Readiness: 200 while requests are welcome and run; 503 from the first signal on, and while the engine is
        paused or its weights are replaced, when they would only wait."""
        if self._state.draining:
            headers = {"retry-after": str(self._state.options.retry_after)}
            return json_response({"status": "draining"}, 503, headers)
        if (state := self._state.engine.stats().state) != "running":
            return json_response({"status": state}, 503, {"retry-after": str(self._state.options.retry_after)})
        return json_response({"status": "ok", "model": self._state.names[0]})

    async def live(self, request: Request) -> Response:
        """Liveness: 200 as long as the process answers, also while it drains."""
        return json_response({"status": "alive"})

    async def metrics(self, request: Request) -> Response:
        """All figures in Prometheus' text format."""
        return Response(self._state.metrics.text(), media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        """This API as an OpenAPI document."""
        try:
            ours = version("triptych")
        except PackageNotFoundError:  # run from its source tree
            ours = "0"
        return json_response(document(ours, admin=self._state.options.weights_root is not None))

    async def no_embeddings(self, request: Request) -> Response:
        """DeepSeek-V4 is no embedding model; silence or vectors of noise would be worse than a sentence."""
        raise Unsupported("DeepSeek-V4 generates text and makes no embeddings.", "Serve an embedding model for them.")

    async def response(self, request: Request) -> Response:
        """A stored response of this tenant; DELETE forgets it."""
        salt, name = request.state.record.caller.salt, request.path_params["name"]
        if request.method == "DELETE":
            self._state.responses.delete(salt, name)
            return json_response({"id": name, "object": "response", "deleted": True})
        stored = self._state.responses.get(salt, name)
        return Response(stored.response, media_type="application/json")

    async def input_items(self, request: Request) -> Response:
        """What the client sent for a stored response, as it came."""
        stored = self._state.responses.get(request.state.record.caller.salt, request.path_params["name"])
        items = msgspec.json.decode(stored.items)
        if isinstance(items, str):
            items = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": items}]}]
        data = [{"id": f"item_{i}", "type": "message"} | item for i, item in enumerate(items)]
        first, last = data[0]["id"], data[-1]["id"]
        page = {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": False}
        return json_response(page)

    async def refuse(self, request: Request, error: Exception) -> Response:
        """An error of ours as a response."""
        assert isinstance(error, TriptychError)
        return refusal(error, request.scope, self._state.options.retry_after)

    async def refuse_http(self, request: Request, error: Exception) -> Response:
        """Starlette's own refusals: an unknown path, a wrong method."""
        assert isinstance(error, HTTPException)
        path = request.url.path[:80]
        fault: TriptychError = RequestError(error.detail)
        if error.status_code == 404:
            fault = NotFound(f"There is nothing at {path!r}.", nearest(path, ENDPOINTS))
        elif error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            fault = _WrongMethod(f"{path!r} does not take {request.method[:20]}.", allowed and f"Use {allowed}.")
        response = refusal(fault, request.scope, self._state.options.retry_after)
        response.headers.update(error.headers or {})
        return response
