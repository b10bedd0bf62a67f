"""Anthropic's /v1/messages: how it answers, whole and as the events that its clients put together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from triptych.errors import TriptychError
from triptych.server import wire
from triptych.server.ask import Ask
from triptych.server.generation import Api
from triptych.server.http import StreamStyle
from triptych.server.messages_read import read_messages
from triptych.server.pieces import Answer, CallBegin, CallText, Content, Piece, Reasoning, Step
from triptych.text.tokenizer import Tokenizer
from triptych.words import Usage

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class OutputDetails(Struct):
    """How many of the output tokens were thought and not said."""

    thinking_tokens: int


class MessageUsage(Struct):
    """Anthropic counts what came from the cache beside `input_tokens`, not in it.

    The rest is ours: `recomputed_tokens` were cached but ran again to rebuild windows, `cached_by_tier` came from below
    the device.
    """

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0
    output_tokens_details: OutputDetails | UnsetType = UNSET
    recomputed_tokens: int | UnsetType = UNSET
    cached_by_tier: dict[str, int] | UnsetType = UNSET

    @classmethod
    def of(cls, usage: Usage, reasoning_tokens: int = 0) -> MessageUsage:
        """The wire form of the engine's count."""
        return cls(
            usage.prompt_tokens - usage.cached_tokens,
            usage.completion_tokens,
            usage.cached_tokens,
            0,
            OutputDetails(reasoning_tokens) if reasoning_tokens else UNSET,
            usage.recomputed_tokens,
            dict(usage.cached_by_tier) or UNSET,
        )


class Block(Struct, omit_defaults=True):
    """A content block: text, thinking or tool_use, by `type`."""

    type: str
    text: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    signature: str | UnsetType = UNSET
    id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    input: object = UNSET


class AnthropicMessage(Struct):
    """A whole answer."""

    id: str
    model: str
    content: list[Block]
    usage: MessageUsage
    stop_reason: str | None = None
    stop_sequence: str | None = None
    role: Literal["assistant"] = "assistant"
    type: Literal["message"] = "message"


class MessageStart(Struct):
    """The first event."""

    message: AnthropicMessage
    type: str = "message_start"


class BlockStart(Struct):
    """A block begins, empty."""

    index: int
    content_block: Block
    type: str = "content_block_start"


class BlockGain(Struct, omit_defaults=True):
    """What a block gains, by `type`."""

    type: str
    text: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    signature: str | UnsetType = UNSET
    partial_json: str | UnsetType = UNSET


class BlockDelta(Struct):
    """A block gains something."""

    index: int
    delta: BlockGain
    type: str = "content_block_delta"


class BlockStop(Struct):
    """A block is complete."""

    index: int
    type: str = "content_block_stop"


class MessageEnd(Struct):
    """Why the message ended."""

    stop_reason: str
    stop_sequence: str | None


class MessageDelta(Struct):
    """The message is complete; its usage, counted in all."""

    delta: MessageEnd
    usage: MessageUsage
    type: str = "message_delta"


class MessageStop(Struct):
    """The last event."""

    type: str = "message_stop"


def named_event(value: object) -> bytes:
    """A server-sent event that carries the type of its data as its name, as Anthropic and Responses send them."""
    return b"event: %b\ndata: %b\n\n" % (value.type.encode(), wire.encode(value))  # type: ignore[attr-defined]


class MessagesShape:
    """Spells steps as content blocks that open, grow and close one after the other."""

    def __init__(self, ask: Ask, tokenizer: Tokenizer) -> None:
        self._head = ask.head
        self._prompt = sum(len(prompt) for prompt in ask.prompts)
        self._index = -1
        self._open: Block | None = None
        self._thought: list[str] = []

    def opening(self, choice: int) -> list[object]:
        """The message without content. What of the prompt was cached is known only at the end."""
        empty = AnthropicMessage(self._head.id, self._head.model, [], MessageUsage(self._prompt, 0))
        return [MessageStart(empty)]

    def chunks(self, choice: int, step: Step) -> list[object]:
        """Events for the pieces; a piece of another kind closes the open block and opens the next."""
        out: list[object] = []
        for piece in step.pieces:
            if self._open is None or isinstance(piece, CallBegin) or _kind(piece) != self._open.type:
                out += self._close()
                out.append(self._begin(piece))
            gain = _gain(piece)
            if gain is not None:
                out.append(BlockDelta(self._index, gain))
            if isinstance(piece, Reasoning):
                self._thought.append(piece.text)
        if step.finish is not None:
            out += self._close()
        return out

    def closing(self, usage: Usage, answers: Sequence[Answer]) -> list[object]:
        """Why it ended and what it cost."""
        [answer] = answers
        reason, stop = _reason(answer)
        counted = MessageUsage.of(usage, answer.reasoning_tokens)
        return [MessageDelta(MessageEnd(reason, stop), counted), MessageStop()]

    def error(self, error: TriptychError) -> object:
        """Anthropic's error event."""
        return wire.AnthropicError.of(str(error), error.status)

    def whole(self, answers: Sequence[Answer], usage: Usage) -> object:
        """The whole message."""
        [answer] = answers
        reason, stop = _reason(answer)
        return AnthropicMessage(
            self._head.id,
            self._head.model,
            _blocks(answer),
            MessageUsage.of(usage, answer.reasoning_tokens),
            reason,
            stop,
        )

    def _begin(self, piece: Piece) -> BlockStart:
        self._index += 1
        if isinstance(piece, CallBegin):
            self._open = Block("tool_use", id=piece.id, name=piece.name, input={})
        elif isinstance(piece, Reasoning):
            self._open = Block("thinking", thinking="", signature="")
        else:
            self._open = Block("text", text="")
        return BlockStart(self._index, self._open)

    def _close(self) -> list[object]:
        if self._open is None:
            return []
        out: list[object] = []
        if self._open.type == "thinking":
            out.append(BlockDelta(self._index, BlockGain("signature_delta", signature=signature(self._thought))))
        self._open = None
        self._thought.clear()
        return [*out, BlockStop(self._index)]


def signature(parts: Sequence[str]) -> str:
    """What clients must echo beside a thinking block; a hash of it, so that it is stable and says nothing new."""
    return hashlib.sha256("".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _kind(piece: Piece) -> str:
    kinds = {Content: "text", Reasoning: "thinking", CallText: "tool_use", CallBegin: "tool_use"}
    return kinds[type(piece)]


def _gain(piece: Piece) -> BlockGain | None:
    if isinstance(piece, Content):
        return BlockGain("text_delta", text=piece.text)
    if isinstance(piece, Reasoning):
        return BlockGain("thinking_delta", thinking=piece.text)
    return BlockGain("input_json_delta", partial_json=piece.text) if isinstance(piece, CallText) else None


def _reason(answer: Answer) -> tuple[str, str | None]:
    if answer.finish == "stop" and answer.stop is not None:
        return "stop_sequence", answer.stop
    return _REASONS.get(answer.finish, "end_turn"), None


def _blocks(answer: Answer) -> list[Block]:
    out = []
    if answer.thoughts:
        out.append(Block("thinking", thinking=answer.reasoning, signature=signature(answer.thoughts)))
    if answer.texts:
        out.append(Block("text", text=answer.text))
    out += [Block("tool_use", id=call.id, name=call.name, input=_input(call.arguments)) for call in answer.calls]
    return out


def _input(arguments: str) -> object:
    """The arguments as an object; where max_tokens cut them off, what there is of them as text."""
    try:
        value = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"_incomplete": arguments} if arguments else {}


_STYLE = StreamStyle(named_event, b"", b'event: ping\ndata: {"type": "ping"}\n\n')
MESSAGES = Api(read_messages, MessagesShape, _STYLE)
