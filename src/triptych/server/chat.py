"""/v1/chat/completions: what it reads and how it answers."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET

from triptych.errors import RequestError, TriptychError
from triptych.server.ask import HARMLESS, STREAM_FIELDS, Ask, Counting, Desk, Head, stream_fields
from triptych.server.fields import Fields, FieldTable, wrong
from triptych.server.generation import Api
from triptych.server.hints import HINT_FIELDS, cache_hints
from triptych.server.http import error_body
from triptych.server.logprobs import chat_logprobs, ranked
from triptych.server.pieces import Answer, CallBegin, Content, Piece, Reasoning, Step
from triptych.server.sampling import SAMPLING_FIELDS, check_room, check_scores, sampling_params
from triptych.server.talk import Talk, prepare
from triptych.server.wire import (
    ChatCall,
    ChatCallDelta,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatFunction,
    ChatMessage,
    WireUsage,
)
from triptych.text.tokenizer import Tokenizer
from triptych.words import Usage

_READ = {
    *("messages", "max_completion_tokens", "logprobs", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls"),
    *("response_format", "reasoning_effort", "thinking", "prompt_logprobs"),
}
FIELDS = FieldTable(
    read=SAMPLING_FIELDS | STREAM_FIELDS | HINT_FIELDS | _READ,
    harmless=HARMLESS - _READ,
    refused={
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "verbosity": ("medium",),
        "web_search_options": (),
        "moderation": (),
    },
)
_MOST_TOOLS = 1024


def read_chat(raw: dict[str, object], desk: Desk) -> Ask:
    """The Ask in a request body. Tokenises: not for the event loop. Raises RequestError."""
    FIELDS.check(raw)
    engine = desk.engine
    fields = Fields(raw)
    stream, include_usage, continuous_usage = stream_fields(fields)
    params = sampling_params(
        fields,
        engine.shape.vocab_size,
        max_tokens=_max_tokens(fields),
        logprobs=_logprobs(fields),
        prompt_logprobs=fields.integer("prompt_logprobs"),
    )
    ready = prepare(read_talk(fields), desk, params)
    check_room(len(ready.ids), params.max_tokens, engine.max_context, "messages")
    check_scores(params, len(ready.ids), stream)
    return Ask(
        Head.new("chatcmpl", desk.model),
        (ready.ids,),
        ready.params,
        stream,
        include_usage,
        continuous_usage,
        hints=cache_hints(fields, desk.salt, ready.marks),
        salt=desk.salt,
        reader=ready.reader,
        ended=ready.ended,
    )


def read_talk(fields: Fields) -> Talk:
    """The conversation in a body's fields."""
    thinking, effort = _thinking(fields)
    return Talk(
        messages=fields.value("messages"),
        tools=fields.items("tools", _MOST_TOOLS),
        tool_choice=fields.value("tool_choice"),
        parallel_tool_calls=fields.flag("parallel_tool_calls", True),
        response_format=fields.value("response_format"),
        thinking=thinking,
        effort=effort,
    )


def _thinking(fields: Fields) -> tuple[bool | None, str | None]:
    """DeepSeek's `thinking` switch and OpenAI's `reasoning_effort`, which must not contradict each other."""
    effort = fields.text("reasoning_effort")
    kind = fields.inside("thinking", ("type",)).text("type")
    if kind not in (None, "enabled", "adaptive", "disabled"):
        raise wrong("thinking.type", "enabled or disabled", kind)
    if kind == "disabled" and effort not in (None, "none"):
        raise RequestError(
            "thinking is disabled, but reasoning_effort asks for it.", "Send one of them.", param="thinking"
        )
    return None if kind is None else kind != "disabled", effort


def _max_tokens(fields: Fields) -> int | None:
    old, new = fields.integer("max_tokens"), fields.integer("max_completion_tokens")
    if old is not None and new is not None and old != new:
        raise RequestError("max_tokens and max_completion_tokens differ.", "Send one of them.", param="max_tokens")
    return old if new is None else new


def _logprobs(fields: Fields) -> int | None:
    top = fields.integer("top_logprobs")
    if not fields.flag("logprobs"):
        if top:
            raise RequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
        return None
    if top is not None and not 0 <= top <= 20:
        raise RequestError(f"top_logprobs must be from 0 to 20, not {top}.", param="top_logprobs")
    return top or 0


class ChatShape:
    """Spells steps as chat chunks, and answers as a chat completion."""

    def __init__(self, ask: Ask, tokenizer: Tokenizer) -> None:
        self._head = ask.head
        self._tokenizer = tokenizer
        self._wants_logprobs = ask.params.logprobs is not None
        self._listed = ask.params.prompt_logprobs or 0
        self._include_usage = ask.include_usage
        self._counting = Counting(ask)

    def opening(self, choice: int) -> list[object]:
        """The chunk that names the role."""
        return [self._chunk(ChatChunkChoice(choice, ChatDelta(role="assistant", content="")))]

    def chunks(self, choice: int, step: Step) -> list[object]:
        """A chunk for each piece, the first with the logprobs, and one with the finish reason at the end."""
        self._counting.add(choice, step)
        logprobs = chat_logprobs(step.logprobs, self._tokenizer) if self._wants_logprobs else None
        gains = [_gain(piece) for piece in step.pieces]
        if not gains and step.logprobs:
            gains.append(ChatDelta(content=""))
        out: list[object] = []
        for gain in gains:
            out.append(self._chunk(ChatChunkChoice(choice, gain, logprobs)))
            logprobs = None
        if step.finish is not None:
            out.append(self._chunk(ChatChunkChoice(choice, ChatDelta(), None, step.finish)))
        return out

    def closing(self, usage: Usage, answers: Sequence[Answer]) -> list[object]:
        """The chunk without choices that carries the usage, if it was asked for."""
        if not self._include_usage:
            return []
        return [ChatChunk(self._head.id, self._head.created, self._head.model, [], _usage(usage, answers))]

    def error(self, error: TriptychError) -> object:
        """OpenAI's error object."""
        return error_body(error)

    def whole(self, answers: Sequence[Answer], usage: Usage) -> object:
        """The chat completion."""
        choices = []
        for i, answer in enumerate(answers):
            logprobs = chat_logprobs(tuple(answer.logprobs), self._tokenizer) if self._wants_logprobs else None
            choices.append(ChatChoice(i, _message(answer), answer.finish, logprobs))
        head, prompt = self._head, answers[0].prompt
        scores = UNSET if prompt is None else ranked(prompt, self._listed, self._tokenizer)
        return ChatCompletion(head.id, head.created, head.model, choices, _usage(usage, answers), scores)

    def _chunk(self, choice: ChatChunkChoice) -> ChatChunk:
        usage = self._counting.of(choice.index)
        return ChatChunk(self._head.id, self._head.created, self._head.model, [choice], usage)


def _gain(piece: Piece) -> ChatDelta:
    if isinstance(piece, Content):
        return ChatDelta(content=piece.text)
    if isinstance(piece, Reasoning):
        return ChatDelta(reasoning_content=piece.text)
    if isinstance(piece, CallBegin):
        call = ChatCallDelta(piece.index, ChatFunction("", piece.name), piece.id, "function")
        return ChatDelta(tool_calls=[call])
    return ChatDelta(tool_calls=[ChatCallDelta(piece.index, ChatFunction(piece.text))])


def _message(answer: Answer) -> ChatMessage:
    message = ChatMessage(answer.text if answer.text or not answer.calls else None)
    if answer.thoughts:
        message.reasoning_content = answer.reasoning
    if answer.calls:
        message.tool_calls = [ChatCall(call.id, ChatFunction(call.arguments, call.name)) for call in answer.calls]
    return message


def _usage(usage: Usage, answers: Sequence[Answer]) -> WireUsage:
    return WireUsage.of(usage, sum(answer.reasoning_tokens for answer in answers))


CHAT = Api(read_chat, ChatShape)
