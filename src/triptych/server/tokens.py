"""/tokenize and /detokenize: what a prompt is in token ids, and back."""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response

from triptych.errors import RequestError
from triptych.server import wire
from triptych.server.chat import read_talk
from triptych.server.fields import Fields, FieldTable, as_integer, parse_object
from triptych.server.http import json_response, unless_left
from triptych.server.messages_read import COUNT_FIELDS, read_conversation
from triptych.server.state import ServerState
from triptych.server.talk import Talk, prepare
from triptych.words import SamplingParams, TokenIds, token_ids

_MOST_IDS = 4_000_000
TOKENIZE = FieldTable(
    read=frozenset({"model", "prompt", "messages", "return_token_strs"})
    | {"tools", "tool_choice", "response_format", "reasoning_effort", "thinking"},
    harmless=frozenset(),
    refused={},
)
DETOKENIZE = FieldTable(read=frozenset({"model", "tokens"}), harmless=frozenset(), refused={})


class TokenPages:
    """The two endpoints. The work is done beside the event loop."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def tokenize(self, request: Request) -> Response:
        """The token ids of `prompt`, or of `messages` as a chat would send them to the model."""
        salt = request.state.record.caller.salt
        return await self._answer(request, lambda raw: self._tokenize(raw, salt))

    async def detokenize(self, request: Request) -> Response:
        """The text of `tokens`, control tokens included."""
        return await self._answer(request, self._detokenize)

    async def count(self, request: Request) -> Response:
        """Anthropic's count of the tokens that a message would have as a prompt."""
        caller = request.state.record.caller

        def work(raw: dict[str, object]) -> dict[str, int]:
            COUNT_FIELDS.check(raw)
            talk, _ = read_conversation(Fields(raw))
            return {"input_tokens": len(self._ids(talk, raw, caller.salt))}

        return await self._answer(request, work)

    def _ids(self, talk: Talk, raw: dict[str, object], salt: str) -> TokenIds:
        model = raw.get("model")
        name = self._state.names[0] if model is None else self._state.model_name(model)
        return prepare(talk, self._state.desk(name, salt), SamplingParams()).ids

    async def _answer(self, request: Request, work: Callable[[dict[str, object]], object]) -> Response:
        async with self._state.bodies.read(request) as body:
            run = self._state.in_thread(lambda: json_response(work(parse_object(body))))
            response: Response = await unless_left(request.receive, run)
            return response

    def _tokenize(self, raw: dict[str, object], salt: str) -> wire.Tokens:
        TOKENIZE.check(raw)
        fields = Fields(raw)
        self._check_model(raw)
        engine = self._state.engine
        if fields.given("prompt") == fields.given("messages"):
            raise RequestError("Send either prompt or messages.", param="prompt")
        if fields.given("messages"):
            ids = self._ids(read_talk(fields), raw, salt)
        else:
            ids = engine.tokenizer.encode(fields.text("prompt") or "")
        out = wire.Tokens(ids.tolist(), len(ids), engine.max_context)
        if fields.flag("return_token_strs"):
            out.token_strs = [engine.tokenizer.token_bytes(i).decode("utf-8", "replace") for i in out.tokens]
        return out

    def _detokenize(self, raw: dict[str, object]) -> wire.Text:
        DETOKENIZE.check(raw)
        self._check_model(raw)
        engine = self._state.engine
        fields = Fields(raw)
        if not fields.given("tokens"):
            raise RequestError("tokens is missing.", "Send a list of token ids.", param="tokens")
        ids = [as_integer("tokens", one) for one in fields.items("tokens", _MOST_IDS)]
        known = token_ids(ids, vocab_size=engine.shape.vocab_size, param="tokens")
        return wire.Text(engine.tokenizer.decode(known, hide_special=False))

    def _check_model(self, raw: dict[str, object]) -> None:
        if raw.get("model") is not None:
            self._state.model_name(raw["model"])
