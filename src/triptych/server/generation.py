"""The way of a request that generates: body, Ask, engine, answer; the same for every API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response

from triptych.server.answer import collect, events
from triptych.server.ask import Ask, Desk, Shape
from triptych.server.fields import parse_object
from triptych.server.http import EventStream, StreamStyle, json_response, unless_left
from triptych.server.logs import prompts
from triptych.server.record import Record
from triptych.server.state import ServerState
from triptych.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Api:
    """One API: how it reads a body (in a thread of the encoders), how it spells an answer."""

    read: Callable[[dict[str, object], Desk], Ask]
    form: Callable[[Ask, Tokenizer], Shape]
    style: StreamStyle = field(default_factory=StreamStyle)


def generation(state: ServerState, api: Api) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint of `api`."""

    def prepare(body: bytes, record: Record) -> Ask:
        raw = parse_object(body)
        name = state.model_name(raw.get("model"))
        return api.read(raw, state.desk(name, record.caller.salt))

    async def endpoint(request: Request) -> Response:
        record: Record = request.state.record
        async with state.bodies.read(request) as body:
            if state.options.log_prompts:
                prompts.info("id=%s request %s", record.request_id, body.decode("utf-8", "replace"))
            ask = await unless_left(request.receive, state.in_thread(lambda: prepare(body, record)))
        shape = api.form(ask, state.engine.tokenizer)
        if ask.stream:
            style = api.style
            stream = events(state.engine, ask, shape, record, style)
            return EventStream(stream, state.options, lambda error: style.event(shape.error(error)), style.idle)
        answers, usage = await unless_left(request.receive, collect(state.engine, ask, record))
        if ask.params.logprobs is None and ask.params.prompt_logprobs is None:
            return json_response(shape.whole(answers, usage))
        # logprobs of a long answer are millions of objects: not on the event loop
        return await state.in_thread(lambda: json_response(shape.whole(answers, usage)))

    return endpoint
