"""How a prompt continues from what is cached: the cheapest exact plan.

A prompt of n tokens whose longest cached chain of pages ends at g, with a snapshot at boundary c <= g:

    0              c-132        c-4  c          g                n
    |  pages, read  |  restored   |==|==========|================|
                    read_from     start         write_from
                                   run, entries    run, entries
                                   only read       written

Without a snapshot the window is rebuilt by replay: layer l's rows are exact from R + 127 l on, so
K = 127 L tokens before g suffice (reference section 3.3, R4); K is rounded up so that R stays on a page
boundary and every compressor group that closes after g begins inside the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from triptych.cache.geometry import LOOKBACK
from triptych.config import PAGE, WINDOW

RESTORED = WINDOW + LOOKBACK
"""A snapshot at boundary c holds the window rows [c - RESTORED, c - LOOKBACK), clipped at 0."""


@dataclass(frozen=True, slots=True)
class ResumePlan:
    """Where to start and from which token on to write; see the drawing above. Positions in tokens.

    `exact_from` is the first position whose window rows are exact in every layer: no snapshot may hold
    rows before it. cached + recomputed + computed tokens = length.
    """

    kind: Literal["cold", "snapshot", "replay"]
    length: int
    start: int
    read_from: int
    write_from: int
    snapshot: int | None = None
    exact_from: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.read_from <= self.start < self.length, self
        assert 0 <= self.write_from <= self.length, self
        assert self.write_from % PAGE == 0, self

    @property
    def cost(self) -> int:
        """Tokens to run."""
        return self.length - self.start

    @property
    def cached_tokens(self) -> int:
        """Tokens that are not run at all."""
        return self.start

    @property
    def recomputed_tokens(self) -> int:
        """Tokens that are run although their entries were cached."""
        return self.write_from - self.start

    @property
    def computed_tokens(self) -> int:
        """Tokens that were in no cache."""
        return self.length - self.write_from


def replay_tokens(layers: int) -> int:
    """Tokens to run before a boundary so that every window row of the next 127 positions is exact."""
    return -(-layers * (WINDOW - 1) // PAGE) * PAGE


def cheapest(length: int, chain_end: int, layers: int, snapshot: tuple[int, int] | None) -> ResumePlan:
    """The plan that runs the fewest tokens; with equal cost, snapshot before replay before cold.

    `chain_end` is g; `snapshot` is (c, id) of the deepest snapshot on the chain, or None.
    """
    plans = []
    if snapshot is not None:
        c, snapshot_id = snapshot
        assert 0 < c <= chain_end and c % PAGE == 0, (c, chain_end)
        first = max(0, c - RESTORED)
        plans.append(ResumePlan("snapshot", length, c - LOOKBACK, first, chain_end, snapshot_id, first))
    start = chain_end - replay_tokens(layers)
    if start > 0:
        exact = start + (layers - 1) * (WINDOW - 1)
        plans.append(ResumePlan("replay", length, start, start, chain_end, None, exact))
    plans.append(ResumePlan("cold", length, 0, 0, chain_end))
    return min(plans, key=lambda plan: plan.cost)


def snapshot_is_exact(boundary: int, exact_from: int) -> bool:
    """Whether the rows a snapshot at `boundary` needs are all exact in a run whose rows are so from `exact_from`."""
    return max(0, boundary - RESTORED) >= exact_from
