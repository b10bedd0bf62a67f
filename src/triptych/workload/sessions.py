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
from triptych.workload.traces import TraceRequest, synthetic_tokens

FORMAT = "triptych-sessions"
KINDS = ("system", "tools", "user", "tool", "output")
_MAX_PART = 1 << 22


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
    seed = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")
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
    def from_rows(cls, path: Path, rows: list[dict[str, Any]], limit: int | None = None) -> SessionTrace:
        """The parsed lines of a file, the first of which names the format. ConfigError naming line and key."""
        head = rows[0]
        if head.get("format") != FORMAT:
            raise ConfigError(
                f"{path} is no trace: its first line has neither hash_ids (Mooncake) nor format {FORMAT!r}."
            )
        if head.get("version") != 1:
            raise ConfigError(f"{path} has version {head.get('version')!r} of {FORMAT}; version 1 is read here.")
        wanted = rows[1:] if limit is None else rows[1 : limit + 1]
        return cls(path.name, [_request(row, f"{path}, line {number}") for number, row in enumerate(wanted, start=2)])

    def write(self, path: Path) -> None:
        """Store it as JSON Lines."""
        write_sessions(path, self.requests)


def write_sessions(path: Path, requests: Iterable[SessionRequest]) -> None:
    """Write `requests` in this format to `path`. ConfigError if that is impossible."""
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"format": FORMAT, "version": 1}) + "\n")
            file.writelines(json.dumps(request.to_dict(), separators=(",", ":")) + "\n" for request in requests)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from None


def _request(row: dict[str, Any], where: str) -> SessionRequest:
    unknown = set(row) - {"time", "session", "tenant", "prompt", "output"}
    if unknown:
        key = sorted(unknown)[0]
        raise ConfigError(
            f"{where}: unknown key {key!r}.", nearest(key, ("time", "session", "tenant", "prompt", "output"))
        )
    time, output = row.get("time"), row.get("output")
    if isinstance(time, bool) or not isinstance(time, int | float) or time < 0:
        raise ConfigError(f"{where}: time must be seconds from the start, not {time!r}.")
    prompt = row.get("prompt")
    if not isinstance(prompt, list) or not prompt:
        raise ConfigError(f"{where}: prompt must be a list of parts [id, tokens, kind].")
    parts = tuple(_part(part, where) for part in prompt)
    if not isinstance(output, list) or len(output) != 2:
        raise ConfigError(f"{where}: output must be [id, tokens].")
    return SessionRequest(
        float(time),
        str(row.get("session", "")),
        str(row.get("tenant", "")),
        parts,
        _part([*output, "output"], where, least=0),
    )


def _part(value: Any, where: str, least: int = 1) -> Part:
    if not isinstance(value, list) or len(value) != 3 or not isinstance(value[0], str):
        raise ConfigError(f"{where}: a part is [id, tokens, kind], not {value!r}.")
    name, tokens, kind = value
    if type(tokens) is not int or not least <= tokens <= _MAX_PART:
        raise ConfigError(
            f"{where}: part {name!r} has {tokens!r} tokens; write an integer from {least} to {_MAX_PART}."
        )
    if kind not in KINDS:
        raise ConfigError(f"{where}: part {name!r} is of unknown kind {kind!r}.", nearest(str(kind), KINDS))
    return Part(name, tokens, kind)
