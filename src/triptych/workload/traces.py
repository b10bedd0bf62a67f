"""Requests with times, from files: Mooncake's traces, and our own session format (sessions.py).

A Mooncake line has timestamp (ms), input_length, output_length and hash_ids: one chained id per 512 prompt tokens, so
that equal ids mean an equal prefix up to there. The text is not published; tokens are made from the ids:

    literal   each id owns 512 fixed tokens, the last one is cut to input_length; outputs are seen nowhere else
    session   as literal, but the first new blocks of what looks like a next turn take over the last partial block of
              the turn before and then its output, as a client would send them (an inference that nobody validated)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from triptych.errors import ConfigError
from triptych.words import TokenIds

BLOCK = 512
TokenMode = Literal["literal", "session"]
_VOCAB = 120_000
_MOST_CHILDREN = 4  # a block with more different successors is a shared prefix and no conversation
_OUTPUT, _PADDING = 1 << 40, 1 << 41  # seeds of outputs and of lines with too few ids, apart from all hash ids


@dataclass(frozen=True, slots=True, eq=False)
class TraceRequest:
    """One request: `time` in seconds, `marks` = token positions of semantic boundaries in the prompt."""

    time: float
    prompt: TokenIds
    output: TokenIds
    marks: tuple[int, ...] = ()
    session: str | None = None
    tenant: str = ""


class Trace(Protocol):
    """A sequence of requests in order of arrival that can be gone through again and again."""

    name: str

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[TraceRequest]: ...


def synthetic_tokens(seeds: npt.ArrayLike, length: int) -> npt.NDArray[np.int32]:
    """`length` tokens for each of `seeds` [n], one after the other [n * length]: the same for the same seed."""
    x = np.atleast_1d(np.asarray(seeds, np.uint64))[:, None] * np.uint64(0x9E3779B97F4A7C15)
    x = x + np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95)
    x ^= x >> np.uint64(32)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(29)
    return (x % np.uint64(_VOCAB)).astype(np.int32).reshape(-1)


@dataclass(slots=True)
class MooncakeTrace:
    """Lines of a Mooncake trace; see the top of the file for `mode`."""

    name: str
    rows: list[dict[str, Any]]
    mode: TokenMode = "literal"
    _parents: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._parents = _previous_turns(self.rows) if self.mode == "session" else [-1] * len(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[TraceRequest]:
        carried: dict[int, npt.NDArray[np.int32]] = {}
        seen: set[int] = set()
        for index, row in enumerate(self.rows):
            ids, length = row["hash_ids"], row["input_length"]
            if self._parents[index] >= 0:
                self._carry_on(index, seen, carried)
            if self.mode == "session":
                seen.update(ids)
            prompt = synthetic_tokens(ids, BLOCK) if ids else np.empty(0, np.int32)
            for at, block in enumerate(ids):
                if block in carried:
                    prompt[at * BLOCK : (at + 1) * BLOCK] = carried[block]
            if len(prompt) < length:
                prompt = np.concatenate([prompt, synthetic_tokens(_PADDING + index, length - len(prompt))])
            yield TraceRequest(row["timestamp"] / 1000, prompt[:length], self._output(index))

    def _output(self, index: int) -> npt.NDArray[np.int32]:
        return synthetic_tokens(_OUTPUT + index, self.rows[index]["output_length"])

    def _carry_on(self, index: int, seen: set[int], carried: dict[int, npt.NDArray[np.int32]]) -> None:
        """Blocks that this turn sees first begin with what was left of its parent's prompt, then its output."""
        parent = self.rows[self._parents[index]]
        first = parent["input_length"] // BLOCK
        last = parent["hash_ids"][first]
        begun = carried.get(last, synthetic_tokens(last, BLOCK))[: parent["input_length"] - first * BLOCK]
        tail = np.concatenate([begun, self._output(self._parents[index])])
        for at, block in enumerate(self.rows[index]["hash_ids"][first:]):
            piece = tail[at * BLOCK : (at + 1) * BLOCK]
            if not len(piece) or block in seen:
                return
            tokens = synthetic_tokens(block, BLOCK)
            tokens[: len(piece)] = piece
            carried[block] = tokens


def _previous_turns(rows: Sequence[dict[str, Any]]) -> list[int]:
    """For each request the index of the one it seems to continue, or -1.

    It shares all full blocks of that one, differs exactly from its partial block on, and is long enough to hold its
    prompt and its output; the latest such request with the longest prefix counts.
    """
    children: dict[tuple[int, int], set[int]] = {}
    for row in rows:
        ids = row["hash_ids"]
        for at in range(len(ids) - 1):
            children.setdefault((at, ids[at]), set()).add(ids[at + 1])
    ends: dict[tuple[int, int], list[int]] = {}
    parents = []
    for index, row in enumerate(rows):
        ids, length = row["hash_ids"], row["input_length"]
        parents.append(_previous_turn(rows, row, children, ends))
        full = length // BLOCK
        if full and len(ids) > full and length % BLOCK:
            ends.setdefault((full - 1, ids[full - 1]), []).append(index)
    return parents


def _previous_turn(
    rows: Sequence[dict[str, Any]],
    row: dict[str, Any],
    children: dict[tuple[int, int], set[int]],
    ends: dict[tuple[int, int], list[int]],
) -> int:
    ids, length = row["hash_ids"], row["input_length"]
    for shared in range(min(len(ids) - 1, length // BLOCK), 0, -1):
        key = (shared - 1, ids[shared - 1])
        if len(children.get(key, ())) > _MOST_CHILDREN:
            continue
        for candidate in reversed(ends.get(key, ())):
            other = rows[candidate]
            theirs = other["hash_ids"]
            same = len(theirs) == shared + 1 and theirs[:shared] == ids[:shared] and theirs[shared] != ids[shared]
            if same and length >= other["input_length"] + other["output_length"]:
                return candidate
    return -1


def read_trace(path: Path, mode: TokenMode = "literal", limit: int | None = None) -> Trace:
    """The trace in a file of either format. Raises ConfigError naming file, line and key."""
    rows = list(_json_lines(path, None))
    if not rows:
        raise ConfigError(f"{path} holds no requests.")
    if "hash_ids" in rows[0]:
        rows = rows[:limit]
        for number, row in enumerate(rows, start=1):
            _check_mooncake(row, f"{path}, line {number}")
        return MooncakeTrace(path.name, rows, mode)
    from triptych.workload.sessions import SessionTrace

    return SessionTrace.from_rows(path, rows, limit)


def _json_lines(path: Path, limit: int | None) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if limit is not None and number > limit:
                    return
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ConfigError(f"{path}, line {number} holds no JSON object.")
                yield row
    except OSError as error:
        raise ConfigError(f"Trace {path} cannot be read: {error.strerror}.", "Name a JSONL file.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is no JSON Lines file: {error}.") from None


def _check_mooncake(row: dict[str, Any], where: str) -> None:
    for key, low in (("timestamp", 0), ("input_length", 1), ("output_length", 0)):
        value = row.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < low:
            raise ConfigError(f"{where}: {key} must be a number of at least {low}, not {value!r}.")
    for key in ("input_length", "output_length"):
        row[key] = int(row[key])
    ids = row.get("hash_ids")
    if not isinstance(ids, list) or any(type(block) is not int or not 0 <= block < _OUTPUT for block in ids):
        raise ConfigError(f"{where}: hash_ids must be a list of block numbers.")
