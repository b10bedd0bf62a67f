"""Who answers in a conversation: an engine in this process, or a server at a URL. Both give the same pieces."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import ssl
import threading
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from triptych.errors import ConfigError, RequestError, TriptychError
from triptych.workload.address import address_of

if TYPE_CHECKING:
    from triptych.engine.api import AsyncEngine
    from triptych.text.turns import Turn
    from triptych.words import SamplingParams, TokenIds, Usage


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer. `thinking`: what the model says to itself first. `usage` comes with the last one."""

    text: str = ""
    thinking: bool = False
    usage: Usage | None = None


class Talker(Protocol):
    """Answers conversations. `thinking`, one of THINKING, may be changed between answers; None: as a server likes."""

    thinking: str | None

    def describe(self) -> str:
        """A few lines on who answers."""

    async def start(self) -> None:
        """Become ready. TriptychError if that is impossible."""

    async def stop(self) -> None:
        """Let go."""

    def answer(self, turns: Sequence[Turn], params: SamplingParams) -> AsyncGenerator[Piece, None]:
        """The answer to the last turn, piece by piece. Closing the generator ends it. TriptychError if it fails."""


THINKING = ("off", "low", "high", "max")
"""How hard a model may think before it answers."""


class LocalTalker:
    """An engine in this process."""

    def __init__(self, engine: AsyncEngine, thinking: str | None = "off") -> None:
        from triptych.text.history import History

        self._engine = engine
        self.thinking = thinking
        self._history = History()
        self._answers = 0
        self._session = f"chat-{uuid.uuid4().hex}"

    def describe(self) -> str:
        """What was loaded."""
        return self._engine.describe()

    async def start(self) -> None:
        """Start the engine's thread."""
        await self._engine.start()

    async def stop(self) -> None:
        """Stop it."""
        await self._engine.stop()

    async def answer(self, turns: Sequence[Turn], params: SamplingParams) -> AsyncGenerator[Piece, None]:
        """See Talker."""
        from triptych.text.dsml import OutputParser
        from triptych.text.render import render_turns
        from triptych.text.spell import Style
        from triptych.words import CacheHints

        effort = self.thinking or "off"
        style = Style(thinking=effort != "off", effort="low" if effort == "off" else effort)
        prompt = await asyncio.to_thread(
            lambda: render_turns(
                turns, self._engine.tokenizer, style, limit=self._engine.max_context - 1, history=self._history
            )
        )
        self._answers += 1
        hints = CacheHints(marks=prompt.boundaries, session=self._session)
        stream = self._engine.stream(prompt.ids, params, request_id=f"chat-{self._answers}", hints=hints)
        parser, sampled, said = OutputParser(thinking=style.thinking), list[int](), list[Piece]()
        async with aclosing(stream) as deltas:
            async for delta in deltas:
                sampled += delta.token_ids
                ended = delta.finish_reason is not None
                parts = [*parser.push(delta.text), *(parser.finish() if ended else ())]
                for piece in _heard(parts):
                    said.append(piece)
                    yield piece
                if delta.error is not None:
                    raise RequestError(delta.error)
                if ended:
                    self._remember(prompt.ids, said, sampled if delta.stop is None else [])
                    yield Piece(usage=delta.usage)

    def _remember(self, prompt: TokenIds, said: Sequence[Piece], sampled: Sequence[int]) -> None:
        """Keep the ids of an answer, so that its turn is the same tokens when the next prompt is rendered."""
        from triptych.text.turns import Assistant

        text = "".join(piece.text for piece in said if not piece.thinking)
        thought = "".join(piece.text for piece in said if piece.thinking)
        if text and sampled:
            self._history.remember("", prompt, Assistant(text, thought or None), sampled)


def _heard(parts: Sequence[object]) -> Iterator[Piece]:
    """What a parser made of an answer; without tools it makes no calls."""
    from triptych.text.pieces import Content, Reasoning

    for part in parts:
        if isinstance(part, Content | Reasoning) and part.text:
            yield Piece(part.text, thinking=isinstance(part, Reasoning))


def messages_of(turns: Sequence[Turn], *, thoughts: bool = True) -> list[dict[str, str]]:
    """Turns as OpenAI's messages."""
    from triptych.text.turns import Assistant, System, User

    out: list[dict[str, str]] = []
    for turn in turns:
        if isinstance(turn, System):
            out.append({"role": "system", "content": turn.text})
        elif isinstance(turn, User):
            out.append({"role": "user", "content": "\n\n".join(turn.texts)})
        elif isinstance(turn, Assistant):
            reasoning = {"reasoning_content": turn.reasoning} if thoughts and turn.reasoning else {}
            out.append({"role": "assistant", "content": turn.text, **reasoning})
    return out


class RemoteTalker:
    """A server that speaks OpenAI's chat completions, ours above all: its usage says what the cache found."""

    def __init__(
        self, url: str, api_key: str | None = None, model: str | None = None, thinking: str | None = None
    ) -> None:
        self._url, self._address = url, address_of(url)
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._model = model
        self.thinking = thinking
        self._session = f"chat-{uuid.uuid4().hex}"

    def describe(self) -> str:
        """Where it is and what it serves."""
        return f"Model    {self._model} at {self._url}"

    async def start(self) -> None:
        """Ask what is served; without a name the first model is taken."""
        listed = await asyncio.to_thread(self._models)
        if self._model is None:
            if not listed:
                raise ConfigError(f"The server at {self._url} serves no model.")
            self._model = listed[0]

    async def stop(self) -> None:
        """Nothing is held between answers."""

    async def answer(self, turns: Sequence[Turn], params: SamplingParams) -> AsyncGenerator[Piece, None]:
        """See Talker. The connection is read in a thread of its own; leaving closes it, which ends the answer there."""
        events = asyncio.get_running_loop()
        queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
        connection = self._connection()

        def put(item: Piece | Exception | None) -> None:
            with suppress(RuntimeError):  # the loop may be gone when somebody left in mid-answer
                events.call_soon_threadsafe(queue.put_nowait, item)

        def read() -> None:
            try:
                for piece in self._pieces(connection, self._body(turns, params)):
                    put(piece)
                put(None)
            except Exception as error:
                put(error)

        threading.Thread(target=read, daemon=True).start()
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item if isinstance(item, TriptychError) else TriptychError(f"The answer broke off: {item}.")
                yield item
        finally:
            _hang_up(connection)

    def _body(self, turns: Sequence[Turn], params: SamplingParams) -> dict[str, Any]:
        from triptych.words import SamplingParams

        usual = SamplingParams()
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")
        given = {
            name: getattr(params, name)
            for name in (*names, "frequency_penalty", "seed", "max_tokens")
            if getattr(params, name) != getattr(usual, name)
        }
        return {
            "model": self._model,
            "messages": messages_of(turns),
            "stream": True,
            "stream_options": {"include_usage": True},
            "prompt_cache_key": self._session,
            **({"stop": list(params.stop)} if params.stop else {}),
            **({"reasoning_effort": {"off": "none"}.get(self.thinking, self.thinking)} if self.thinking else {}),
            **given,
        }

    def _pieces(self, connection: http.client.HTTPConnection, body: dict[str, Any]) -> Iterator[Piece]:
        with self._asking(connection, "POST", "/v1/chat/completions", json.dumps(body)) as response:
            for line in response:
                data = line.decode("utf-8").strip()
                if not data.startswith("data: {"):
                    if data == "data: [DONE]":
                        return
                    continue
                event = json.loads(data.removeprefix("data: "))
                if "error" in event:
                    raise RequestError(str(event["error"].get("message", "The server could not go on.")))
                yield from _pieces_of(event)
        raise TriptychError("The server closed the connection before the answer was complete.")

    def _models(self) -> list[str]:
        connection = self._connection()
        try:
            with self._asking(connection, "GET", "/v1/models", None) as response:
                return [str(entry["id"]) for entry in json.loads(response.read())["data"]]
        except (ValueError, KeyError, TypeError, http.client.HTTPException):
            raise ConfigError(f"What is at {self._url} is no such server.", "Is the address right?") from None
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._address.host, self._address.port
        if self._address.secure:
            return http.client.HTTPSConnection(host, port, context=ssl.create_default_context())
        return http.client.HTTPConnection(host, port)

    @contextlib.contextmanager
    def _asking(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: str | None
    ) -> Iterator[http.client.HTTPResponse]:
        try:
            connection.request(method, self._address.path + path, body, self._headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or "no answer"
            raise ConfigError(f"No server answers at {self._url}: {reason}.", "Is it running?") from None
        if response.status != 200:
            raise _refusal(response, self._url)
        yield response


def _refusal(response: http.client.HTTPResponse, url: str) -> TriptychError:
    """What a server says when it refuses."""
    try:
        sentence = str(json.loads(response.read(1 << 20))["error"]["message"])
    except (ValueError, KeyError, TypeError):
        sentence = f"{url} answered with status {response.status}."
    return RequestError(sentence, "Give one with --api-key." if response.status == 401 else "")


def _hang_up(connection: http.client.HTTPConnection) -> None:
    """Close a connection that another thread may be reading: only a shutdown wakes it."""
    if connection.sock is not None:
        with suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()


def _pieces_of(event: dict[str, Any]) -> Iterator[Piece]:
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        if thought:
            yield Piece(str(thought), thinking=True)
        if delta.get("content"):
            yield Piece(str(delta["content"]))
    if event.get("usage"):
        yield Piece(usage=_usage(event["usage"]))


def _usage(raw: dict[str, Any]) -> Usage:
    from triptych.words import Usage

    details = raw.get("prompt_tokens_details") or {}
    return Usage(
        prompt_tokens=int(raw.get("prompt_tokens") or 0),
        cached_tokens=int(details.get("cached_tokens") or 0),
        recomputed_tokens=int(details.get("recomputed_tokens") or 0),
        completion_tokens=int(raw.get("completion_tokens") or 0),
        cached_by_tier={str(tier): int(count) for tier, count in (details.get("cached_by_tier") or {}).items()},
        approximate=bool(details.get("approximate")),
    )
