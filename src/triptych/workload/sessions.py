"""Our own trace format: whole conversations with exact token boundaries, but without their text.

JSON Lines. The first line names the format; each further one is a request whose prompt is a list of parts:

    {"format": "triptych-sessions", "version": 1}
    {"time": 0.0, "session": "s1", "tenant": "",
     "prompt": [["tools", 12400, "tools"], ["system-3", 3600, "system"], ["s1-u1", 210, "user"]],
     "output": ["s1-o1", 523]}

A part is [id, tokens, kind]: the same id always stands for the same tokens, so a later turn that repeats earlier parts
in the same order shares their prefix to the token. The end of each part is a semantic boundary. Kinds: KINDS.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from triptych.errors import ConfigError, nearest
from triptych.workload.mooncake import BLOCK, MooncakeTrace
from triptych.workload.traces import MAX_TOKENS, Trace, TraceRequest, synthetic_tokens

FORMAT = "triptych-sessions"
KINDS = ("system", "tools", "user", "tool", "output")
_KEYS = ("time", "session", "tenant", "prompt", "output")
_MAX_TIME = 1e12


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a prompt, or an output: `tokens` tokens that `id` stands for."""

    id: str
    tokens: int
    kind: str = "output"


@dataclass(frozen=True, slots=True)
class SessionRequest:
    """One request of a session; `time` in seconds."""

    time: float
    session: str
    tenant: str
    prompt: tuple[Part, ...]
    output: Part

    def to_dict(self) -> dict[str, Any]:
        """The line that stands for it."""
        return {
            "time": round(self.time, 3),
            "session": self.session,
            "tenant": self.tenant,
            "prompt": [[part.id, part.tokens, part.kind] for part in self.prompt],
            "output": [self.output.id, self.output.tokens],
        }

    def to_trace(self) -> TraceRequest:
        """The request with its tokens."""
        prompt = np.concatenate([_tokens_of(part.id, part.tokens) for part in self.prompt])
        marks = tuple(accumulate(part.tokens for part in self.prompt))
        return TraceRequest(
            self.time, prompt, _tokens_of(self.output.id, self.output.tokens), marks, self.session, self.tenant
        )


@lru_cache(maxsize=4096)
def _tokens_of(name: str, length: int) -> npt.NDArray[np.int32]:
    seed = int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
    return synthetic_tokens(seed, length)


class SessionTrace:
    """A list of session requests as a trace."""

    def __init__(self, name: str, requests: list[SessionRequest]) -> None:
        self.name = name
        self.requests = requests

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[TraceRequest]:
        return (request.to_trace() for request in self.requests)

    @classmethod
    def from_lines(cls, path: Path, head: dict[str, Any], lines: Iterable[tuple[int, dict[str, Any]]]) -> SessionTrace:
        """A file of this format: its first object, which names the format, then (line number, object) by request.

        ConfigError naming line and key.
        """
        if head.get("format") != FORMAT:
            raise ConfigError(
                f"{path} is no trace: its first line has neither hash_ids (Mooncake) nor format {FORMAT!r}."
            )
        if head.get("version") != 1:
            raise ConfigError(f"{path} has version {head.get('version')!r} of {FORMAT}; version 1 is read here.")
        requests = [_request(row, f"{path}, line {number}") for number, row in lines]
        if not requests:
            raise ConfigError(f"{path} holds no requests.")
        return cls(path.name, requests)

    def write(self, path: Path) -> None:
        """Store it as JSON Lines."""
        write_sessions(path, self.requests)


def as_sessions(trace: Trace) -> list[SessionRequest]:
    """The requests of any trace as parts: of a Mooncake trace each block of its prompts is one."""
    if isinstance(trace, SessionTrace):
        return list(trace.requests)
    assert isinstance(trace, MooncakeTrace)
    found = []
    for number, row in enumerate(trace.rows):
        left, parts = row["input_length"], []
        for block in row["hash_ids"][: -(-left // BLOCK)]:
            # a block that is cut short is not the one that others share whole
            parts.append(Part(f"b{block}" if left >= BLOCK else f"b{block}.{left}", min(left, BLOCK), "user"))
            left -= BLOCK
        output = Part(f"o{number}", row["output_length"])
        found.append(SessionRequest(row["timestamp"] / 1000, f"m{number}", "", tuple(parts), output))
    return found


def write_sessions(path: Path, requests: Iterable[SessionRequest]) -> None:
    """Write `requests` in this format to `path`. ConfigError if that is impossible."""
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"format": FORMAT, "version": 1}) + "\n")
            file.writelines(json.dumps(request.to_dict(), separators=(",", ":")) + "\n" for request in requests)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from None


def _request(row: dict[str, Any], where: str) -> SessionRequest:
    for key in sorted(set(row) - set(_KEYS)):
        raise ConfigError(f"{where}: unknown key {key!r}.", nearest(key, _KEYS))
    time, output = row.get("time"), row.get("output")
    if isinstance(time, bool) or not isinstance(time, int | float) or not 0 <= time <= _MAX_TIME:
        raise ConfigError(f"{where}: time must be seconds from the start, not {time!r}.")
    for key in ("session", "tenant"):
        if not isinstance(row.get(key, ""), str):
            raise ConfigError(f"{where}: {key} must be a string, not {row[key]!r}.")
    prompt = row.get("prompt")
    if not isinstance(prompt, list) or not prompt:
        raise ConfigError(f"{where}: prompt must be a list of parts [id, tokens, kind].")
    parts = tuple(_part(part, where) for part in prompt)
    if not isinstance(output, list) or len(output) != 2:
        raise ConfigError(f"{where}: output must be [id, tokens].")
    return SessionRequest(
        float(time),
        row.get("session", ""),
        row.get("tenant", ""),
        parts,
        _part([*output, "output"], where, least=0),
    )


def _part(value: Any, where: str, least: int = 1) -> Part:
    if not isinstance(value, list) or len(value) != 3 or not isinstance(value[0], str):
        raise ConfigError(f"{where}: a part is [id, tokens, kind], not {value!r}.")
    name, tokens, kind = value
    if type(tokens) is not int or not least <= tokens <= MAX_TOKENS:
        raise ConfigError(
            f"{where}: part {name!r} has {tokens!r} tokens; write an integer from {least} to {MAX_TOKENS}."
        )
    if kind not in KINDS:
        raise ConfigError(f"{where}: part {name!r} is of unknown kind {kind!r}.", nearest(str(kind), KINDS))
    return Part(name, tokens, kind)
