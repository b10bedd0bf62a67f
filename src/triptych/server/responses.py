"""OpenAI's /v1/responses: how it answers, whole and as numbered events."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET, Struct, UnsetType

from triptych.errors import TriptychError
from triptych.server import wire
from triptych.server.ask import Ask
from triptych.server.generation import Api
from triptych.server.http import StreamStyle
from triptych.server.logprobs import chat_logprobs
from triptych.server.messages import named_event
from triptych.server.pieces import Answer, Call, CallBegin, CallText, Content, Piece, Reasoning, Step
from triptych.server.responses_read import Plan, read_responses
from triptych.text.tokenizer import Tokenizer
from triptych.words import TokenLogprob, Usage

_Item = dict[str, object]


class ResponseEvent(Struct, omit_defaults=True):
    """Any event of a streamed response; which fields there are depends on `type`."""

    type: str
    sequence_number: int
    response: object = UNSET
    output_index: int | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    item: object = UNSET
    part: object = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    logprobs: object = UNSET
    code: str | UnsetType | None = UNSET
    message: str | UnsetType = UNSET
    param: str | UnsetType | None = UNSET


class ResponsesShape:
    """Spells steps as items that are added, grow and are done one after the other."""

    def __init__(self, ask: Ask, tokenizer: Tokenizer) -> None:
        assert isinstance(ask.plan, Plan) and ask.desk is not None
        self._ask = ask
        self._plan = ask.plan
        self._store = ask.desk.responses
        self._tokenizer = tokenizer
        self._number = -1
        self._items: list[_Item] = []
        self._kind: type | None = None  # of the piece that the open item consists of
        self._parts: list[str] = []

    def opening(self, choice: int) -> list[object]:
        """The response without output, twice, as clients expect it."""
        empty = self._response([], "in_progress", None)
        return [self._event("response.created", response=empty), self._event("response.in_progress", response=empty)]

    def chunks(self, choice: int, step: Step) -> list[object]:
        """Events for the pieces; a piece of another kind closes the open item and adds the next."""
        out: list[object] = []
        logprobs = self._logprobs(step.logprobs)
        for piece in step.pieces:
            if isinstance(piece, CallBegin) or not self._continues(piece):
                out += self._close("completed")
                out += self._begin(piece)
            out += self._grow(piece, logprobs)
            logprobs = []
        if step.finish is not None:
            out += self._close("incomplete" if step.finish == "length" else "completed")
        return out

    def closing(self, usage: Usage, answers: Sequence[Answer]) -> list[object]:
        """The whole response, which is stored if it may be."""
        [answer] = answers
        status = _status(answer)
        response = self._keep(self._response(self._items, status, answer, usage), answer)
        return [self._event(f"response.{status}", response=response)]

    def error(self, error: TriptychError) -> object:
        """The event that ends a stream that went wrong."""
        param = getattr(error, "param", None)
        return self._event("error", code=error.code or "server_error", message=str(error), param=param)

    def whole(self, answers: Sequence[Answer], usage: Usage) -> object:
        """The response that is not streamed."""
        [answer] = answers
        status = _status(answer)
        items: list[_Item] = []
        if answer.thoughts:
            items.append(self._reasoning(answer.reasoning, 0))
        if answer.texts or not answer.calls:
            items.append(self._message(answer.text, status, self._logprobs(answer.logprobs), len(items)))
        items += [self._call(call, status, i) for i, call in enumerate(answer.calls, len(items))]
        return self._keep(self._response(items, status, answer, usage), answer)

    # -- items

    def _continues(self, piece: Piece) -> bool:
        return self._kind is type(piece) or (self._kind is CallBegin and isinstance(piece, CallText))

    def _begin(self, piece: Piece) -> list[object]:
        self._kind = type(piece)
        self._parts = []
        at = len(self._items)
        if isinstance(piece, Reasoning):
            item = self._reasoning("", at) | {"status": "in_progress", "content": []}
        elif isinstance(piece, CallBegin):
            item = self._call(Call(piece.id, piece.name), "in_progress", at)
        else:
            item = self._message("", "in_progress", [], at) | {"content": []}
        self._items.append(item)
        out: list[object] = [self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)]
        if isinstance(piece, Content):
            out.append(self._on_item("response.content_part.added", content_index=0, part=_text_part("", [])))
        return out

    def _grow(self, piece: Piece, logprobs: list[object]) -> list[object]:
        if isinstance(piece, CallBegin):
            return []
        self._parts.append(piece.text)
        if isinstance(piece, Content):
            kind = "response.output_text.delta"
            return [self._on_item(kind, content_index=0, delta=piece.text, logprobs=logprobs)]
        if isinstance(piece, Reasoning):
            return [self._on_item("response.reasoning_text.delta", content_index=0, delta=piece.text)]
        return [self._on_item("response.function_call_arguments.delta", delta=piece.text)]

    def _close(self, status: str) -> list[object]:
        if self._kind is None:
            return []
        text, item = "".join(self._parts), self._items[-1]
        out: list[object] = []
        if self._kind is Content:
            item = item | {"status": status, "content": [_text_part(text, [])]}
            out.append(self._on_item("response.output_text.done", content_index=0, text=text, logprobs=[]))
            out.append(self._on_item("response.content_part.done", content_index=0, part=_text_part(text, [])))
        elif self._kind is Reasoning:
            item = item | {"status": status, "content": [{"type": "reasoning_text", "text": text}]}
            out.append(self._on_item("response.reasoning_text.done", content_index=0, text=text))
        else:
            item = item | {"status": status, "arguments": text}
            name = str(item["name"])
            out.append(self._on_item("response.function_call_arguments.done", arguments=text, name=name))
        self._items[-1] = item
        self._kind = None
        return [*out, self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)]

    def _reasoning(self, text: str, at: int) -> _Item:
        content = [{"type": "reasoning_text", "text": text}]
        return {"id": self._id("rs", at), "type": "reasoning", "summary": [], "content": content, "status": "completed"}

    def _message(self, text: str, status: str, logprobs: list[object], at: int) -> _Item:
        part = _text_part(text, logprobs)
        return {"id": self._id("msg", at), "type": "message", "role": "assistant", "status": status, "content": [part]}

    def _call(self, call: Call, status: str, at: int) -> _Item:
        out: _Item = {"id": self._id("fc", at), "type": "function_call", "call_id": call.id, "name": call.name}
        return out | {"arguments": call.arguments, "status": status}

    def _id(self, prefix: str, at: int) -> str:
        return f"{prefix}_{self._ask.head.id.removeprefix('resp_')}_{at}"

    # -- events and responses

    def _event(self, kind: str, **fields: object) -> ResponseEvent:
        self._number += 1
        return ResponseEvent(kind, self._number, **fields)  # type: ignore[arg-type]

    def _on_item(self, kind: str, **fields: object) -> ResponseEvent:
        at = len(self._items) - 1
        return self._event(kind, item_id=str(self._items[at]["id"]), output_index=at, **fields)

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> list[object]:
        if self._ask.params.logprobs is None:
            return []
        return list(chat_logprobs(tuple(tokens), self._tokenizer).content)

    def _response(
        self, items: Sequence[_Item], status: str, answer: Answer | None, usage: Usage | None = None
    ) -> dict[str, object]:
        head = self._ask.head
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            **{"id": head.id, "object": "response", "created_at": head.created, "model": head.model},
            **{"status": status, "error": None, "incomplete_details": reason, "output": list(items)},
            **{"usage": None if usage is None or answer is None else _usage(usage, answer.reasoning_tokens)},
            **self._plan.echo,
        }

    def _keep(self, response: dict[str, object], answer: Answer) -> dict[str, object]:
        if self._plan.store:
            said: dict[str, object] = {"role": "assistant", "content": answer.text}
            if answer.thoughts:
                said["reasoning_content"] = answer.reasoning
            if answer.calls:
                said["tool_calls"] = [
                    {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                    for c in answer.calls
                ]
            self._store.put(
                self._ask.salt,
                self._ask.head.id,
                response=wire.encode(response),
                items=wire.encode(self._plan.items),
                before=self._plan.before,
                new=[*self._plan.new, said],
            )
        return response


def _status(answer: Answer) -> str:
    return "incomplete" if answer.finish == "length" else "completed"


def _text_part(text: str, logprobs: list[object]) -> dict[str, object]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _usage(usage: Usage, reasoning_tokens: int) -> dict[str, object]:
    details: dict[str, object] = {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0}
    details["recomputed_tokens"] = usage.recomputed_tokens
    if usage.cached_by_tier:
        details["cached_by_tier"] = dict(usage.cached_by_tier)
    return {
        **{"input_tokens": usage.prompt_tokens, "input_tokens_details": details},
        **{"output_tokens": usage.completion_tokens, "output_tokens_details": {"reasoning_tokens": reasoning_tokens}},
        "total_tokens": usage.total_tokens,
    }


RESPONSES = Api(read_responses, ResponsesShape, StreamStyle(named_event, b""))
