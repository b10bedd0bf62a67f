"""Mooncake's traces: timestamp (ms), input_length, output_length and hash_ids by line.

Ids are chained, one per 512 prompt tokens, so that equal ids mean an equal prefix up to there. The text is not
published; tokens are made from the ids:

    literal   each id owns 512 fixed tokens, the last one is cut to input_length; outputs are seen nowhere else
    session   as literal, but the first new blocks of what looks like a next turn take over the last partial block of
              the turn before and then its output, as a client would send them (an inference that nobody validated)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from triptych.errors import ConfigError
from triptych.workload.traces import MAX_TOKENS, TraceRequest, synthetic_tokens

BLOCK = 512
TokenMode = Literal["literal", "session"]
_MOST_CHILDREN = 4  # a block with more different successors is a shared prefix and no conversation
_OUTPUT = 1 << 40  # seeds of outputs, apart from all hash ids
_MAX_MS = 1e15


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
            prompt = synthetic_tokens(ids, BLOCK)
            for at, block in enumerate(ids):
                if block in carried:
                    prompt[at * BLOCK : (at + 1) * BLOCK] = carried[block]
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


def checked(row: dict[str, Any], where: str) -> dict[str, Any]:
    """`row`, a line of such a trace, its lengths as whole numbers. ConfigError naming `where` and what is wrong."""
    row["timestamp"] = _number(row, "timestamp", 0, _MAX_MS, where)
    for key, low in (("input_length", 1), ("output_length", 0)):
        value = _number(row, key, low, MAX_TOKENS, where)
        if value != int(value):
            raise ConfigError(f"{where}: {key} must be a whole number, not {value!r}.")
        row[key] = int(value)
    ids = row.get("hash_ids")
    if not isinstance(ids, list) or any(type(block) is not int or not 0 <= block < _OUTPUT for block in ids):
        raise ConfigError(f"{where}: hash_ids must be a list of block numbers.")
    needed = -(-row["input_length"] // BLOCK)
    if len(ids) < needed:
        raise ConfigError(
            f"{where}: {len(ids)} hash_ids for {row['input_length']} tokens; there must be {needed}, one per {BLOCK}."
        )
    return row


def _number(row: dict[str, Any], key: str, low: float, high: float, where: str) -> float:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{where}: {key} must be a number from {low:.0f} to {high:.0f}, not {value!r}.")
    return value
