"""Requests with times: what a replay, a load and a simulation are made of.

mooncake.py and sessions.py make them from two formats, trace_files.py reads files of either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from triptych.words import TokenIds

_VOCAB = 120_000
MAX_TOKENS = 1 << 22
"""The longest stretch of tokens that a line of a trace may ask for: four times the model's context."""


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
