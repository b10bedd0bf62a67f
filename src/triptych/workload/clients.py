"""Who answers the load driver: an engine of this process, or any server with OpenAI's completions API."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from zlib import crc32

import numpy as np

from triptych.errors import TriptychError, reason_of
from triptych.words import CacheHints, SamplingParams, TokenIds
from triptych.workload.address import address_of

if TYPE_CHECKING:
    from triptych.engine.async_engine import AsyncEngine


_TIMEOUT = 3600.0  # seconds that one answer may take


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens of one request as the answering side counts them. `known`: whether it tells what was cached."""

    prompt: int = 0
    cached: int = 0
    recomputed: int = 0
    output: int = 0
    by_tier: Mapping[str, int] = field(default_factory=dict)
    known: bool = True


@dataclass(frozen=True, slots=True)
class Piece:
    """Something arrived: `content` in the client's own form, of `tokens` tokens if known; counts come last."""

    content: Any = None
    tokens: int = 0
    counts: Counts | None = None


class AnswerError(TriptychError):
    """One request was not answered; the message says why."""


class Client(Protocol):
    """Takes prompts as lists of contents, one for each part, and gives contents that later prompts can repeat."""

    name: str

    def content(self, ids: TokenIds) -> Any:
        """A part in the client's own form."""

    def ask(self, contents: Sequence[Any], output: int, session: str) -> AsyncIterator[Piece]:
        """Ask for `output` tokens. Raises AnswerError."""


class InProcess:
    """An engine of this process; prompts are token ids, so lengths are exact.

    `temperature` 0 is greedy; with another one each session draws by a seed of its own.
    """

    def __init__(self, engine: AsyncEngine, temperature: float = 0.0) -> None:
        self._engine = engine
        self._temperature = temperature
        self.name = engine.model_name
        self._serial = 0

    def content(self, ids: TokenIds) -> Any:
        """The ids."""
        return ids

    async def ask(self, contents: Sequence[Any], output: int, session: str) -> AsyncIterator[Piece]:
        """To the length that the trace says. The ends of parts are told to the cache."""
        self._serial += 1
        prompt = np.concatenate(contents).astype(np.int32)
        marks = tuple(int(end) for end in np.cumsum([len(part) for part in contents]))
        seed = crc32(session.encode())
        params = SamplingParams(max_tokens=output, temperature=self._temperature, seed=seed, ignore_eos=True)
        hints = CacheHints(marks=marks, session=session)
        try:
            async for delta in self._engine.stream(prompt, params, request_id=f"bench-{self._serial}", hints=hints):
                counts = None
                if delta.usage is not None:
                    use = delta.usage
                    counts = Counts(
                        use.prompt_tokens,
                        use.cached_tokens,
                        use.recomputed_tokens,
                        use.completion_tokens,
                        dict(use.cached_by_tier),
                    )
                if delta.error:
                    raise AnswerError(delta.error)
                ids = np.asarray(delta.token_ids, np.int32)
                yield Piece(ids if len(ids) else None, len(ids), counts)
        except TriptychError as error:
            raise AnswerError(str(error)) from None


class OverHttp:
    """A server of the OpenAI completions API; prompts are text. Needs nothing beyond Python."""

    def __init__(self, url: str, model: str, decode: Any, key: str | None = None, *, temperature: float = 0.0) -> None:
        at = address_of(url)
        self._secure, self._host = at.secure, at.host
        self._port = at.port or (443 if at.secure else 80)
        self._path = f"{at.path}/v1/completions"
        self._key, self._decode, self._temperature = key, decode, temperature
        self.name = model

    def content(self, ids: TokenIds) -> Any:
        """The text of the ids."""
        return self._decode(ids)

    async def ask(self, contents: Sequence[Any], output: int, session: str) -> AsyncIterator[Piece]:
        """One streamed request on a connection of its own."""
        body = {
            "model": self.name,
            "prompt": "".join(contents),
            "max_tokens": output,
            "temperature": self._temperature,
            "seed": crc32(session.encode()),
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with asyncio.timeout(_TIMEOUT):
                async for event in self._events(json.dumps(body).encode()):
                    if event.get("error"):
                        raise AnswerError(str(event["error"]))
                    for choice in event.get("choices", ()):
                        if choice.get("text"):
                            yield Piece(choice["text"], 1)  # servers send a chunk per token, give or take one
                    if event.get("usage"):
                        yield Piece(counts=_counts(event["usage"]))
        except (OSError, EOFError, ValueError, LookupError) as error:
            raise AnswerError(f"{self._host}:{self._port} did not answer: {_why(error)}.") from None

    async def _events(self, body: bytes) -> AsyncIterator[dict[str, Any]]:
        context = ssl.create_default_context() if self._secure else None
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=context, limit=1 << 24)
        try:
            head = [f"POST {self._path} HTTP/1.1", f"Host: {self._host}", "Content-Type: application/json"]
            head += [f"Content-Length: {len(body)}", "Connection: close", "Accept: text/event-stream"]
            head += [f"Authorization: Bearer {self._key}"] if self._key else []
            writer.write("\r\n".join([*head, "", ""]).encode() + body)
            await writer.drain()
            status, headers = await _head(reader)
            if status != 200:
                text = b"".join([piece async for piece in _body(reader, headers)])
                raise AnswerError(f"The server answered {status}: {text[:300].decode(errors='replace')}")
            async for event in _server_sent(_body(reader, headers)):
                yield event
        finally:
            writer.close()


def _why(error: Exception) -> str:
    if isinstance(error, EOFError):
        return "it closed the connection"
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, ConnectionError) and error.errno:  # asyncio's own text names the address once more
        return os.strerror(error.errno)
    return reason_of(error) if isinstance(error, OSError) else "what it sent is no HTTP"


async def _line(reader: asyncio.StreamReader) -> bytes:
    """The next line. EOFError if the connection ends before it does."""
    return await reader.readuntil(b"\n")


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    status = int((await _line(reader)).split()[1])
    headers: dict[str, str] = {}
    while (line := (await _line(reader)).decode("latin-1").strip()) != "":
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return status, headers


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    """What arrives, as it arrives."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await _line(reader)).split(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
        return
    while piece := await reader.read(1 << 16):
        yield piece


async def _server_sent(pieces: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream. EOFError if it ends without its last one: the server went away."""
    rest, done = b"", False
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            data = line.strip().removeprefix(b"data:").strip()
            if data == b"[DONE]":
                done = True
            elif line.startswith(b"data:"):
                yield json.loads(data)
    if not done:
        raise EOFError


def _counts(usage: dict[str, Any]) -> Counts:
    details = usage.get("prompt_tokens_details") or {}
    return Counts(
        usage.get("prompt_tokens", 0),
        details.get("cached_tokens") or 0,
        details.get("recomputed_tokens") or 0,
        usage.get("completion_tokens", 0),
        details.get("cached_by_tier") or {},
        "cached_tokens" in details,
    )
