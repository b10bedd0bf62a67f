"""How a prompt continues from what is cached: the cheapest plan.

A prompt of n tokens whose longest cached chain of pages ends at g, with a snapshot at boundary c <= g:

    0              c-132        c-4  c          g                n
    |  pages, read  |  restored   |==|==========|================|
                    read_from     start         write_from
                                   run, entries    run, entries
                                   only read       written

Without a snapshot the window is rebuilt by a trapezoid (reference section 3.3, R4): an output is exact when the 127
window rows before it are, so layer l has to start 127 positions later than layer l - 1, and runs only those rows:

    layer 0      |=====================================|=======
    layer 1           |================================|=======
    ...                    |===========================|=======
    layer L-1                               |==========|=======
                 start                      g-132      g

About half of the rectangle. "Bounded" runs only the rows of the last layer in all layers: approximate.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from triptych.cache.geometry import LOOKBACK, RESTORED, trapezoid_start
from triptych.cache.rates import Rates
from triptych.config import PAGE, WINDOW

Kind = Literal["cold", "snapshot", "trapezoid", "bounded"]


@dataclass(frozen=True, slots=True)
class ResumePlan:
    """Where to start and from which token on to write; see the drawing above. Positions in tokens.

    `exact_from` is the first position whose window rows are exact in every layer: no snapshot may hold rows before
    it. `equivalents` = recomputed tokens weighted by the share of layers that run them. `restore` = frames of the
    snapshot. `by_tier` = how many of the cached tokens were fetched, by tier. cached + recomputed + computed = length.
    """

    kind: Kind
    length: int
    start: int
    read_from: int
    write_from: int
    restore: tuple[int, ...] | None = None
    exact_from: int = 0
    equivalents: float = 0.0
    seconds: float = 0.0
    by_tier: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert 0 <= self.read_from <= self.start < self.length, self
        assert 0 <= self.write_from <= self.length, self
        assert self.write_from % PAGE == 0, self

    @property
    def cached_tokens(self) -> int:
        """Tokens that are not run at all."""
        return self.start

    @property
    def recomputed_tokens(self) -> int:
        """Tokens that are run, in some layers at least, although their entries were cached."""
        return self.write_from - self.start

    @property
    def computed_tokens(self) -> int:
        """Tokens that were in no cache."""
        return self.length - self.write_from

    def after(self, restore: tuple[int, ...] | None, by_tier: dict[str, int]) -> ResumePlan:
        """This plan with the frames it restores and where its cached tokens came from."""
        return replace(self, restore=restore, by_tier=by_tier)

    @property
    def replay_to(self) -> int:
        """The boundary of a trapezoid, 0 for other plans; see Chunk.replay_to."""
        return self.write_from if self.kind == "trapezoid" else 0


def trapezoid_equivalents(boundary: int, layers: int) -> float:
    """Layer-tokens of the trapezoid before `boundary`, divided by the number of layers."""
    return sum(boundary - trapezoid_start(boundary, layers, layer) for layer in range(layers)) / layers


class Planner:
    """Costs the candidates for one model by measured rates; a plan takes microseconds."""

    def __init__(self, layers: int, rates: Rates, replay: str = "trapezoid") -> None:
        self.layers = layers
        self.rates = rates
        self._replay = replay
        self._reach = RESTORED + (layers - 1) * (WINDOW - 1)
        self._whole = trapezoid_equivalents(self._reach, layers)

    def cheapest(self, length: int, chain_end: int, snapshot: int) -> ResumePlan:
        """The plan that takes the least time. `chain_end` is g, `snapshot` the deepest boundary with one, or 0.

        With equal cost, snapshot before replay before cold.
        """
        plans = []
        if snapshot:
            assert snapshot <= chain_end and snapshot % PAGE == 0, (snapshot, chain_end)
            plans.append(self._snapshot(length, chain_end, snapshot))
        if chain_end > RESTORED:  # before that every layer would run every row, as a cold start does
            rebuild = self._bounded if self._replay == "bounded" else self._trapezoid
            plans.append(rebuild(length, chain_end))
        plans.append(self._cold(length, chain_end))
        return min(plans, key=lambda plan: plan.seconds)

    def whole(self, length: int, chain_end: int) -> ResumePlan:
        """The plan that runs every row in every layer: what comes out of each is wanted."""
        return self._cold(length, chain_end)

    def rebuild_tokens(self, boundary: int) -> float:
        """Full-token equivalents to run at `boundary` where no snapshot is usable."""
        return min(self._whole, float(boundary))

    def _snapshot(self, length: int, chain_end: int, boundary: int) -> ResumePlan:
        first, start = max(0, boundary - RESTORED), boundary - LOOKBACK
        seconds = self.rates.prefill_seconds(start, length)
        again = chain_end - start
        return ResumePlan("snapshot", length, start, first, chain_end, None, first, again, seconds)

    def _trapezoid(self, length: int, chain_end: int) -> ResumePlan:
        start = trapezoid_start(chain_end, self.layers)
        whole = chain_end >= self._reach
        equivalents = self._whole if whole else trapezoid_equivalents(chain_end, self.layers)
        share = equivalents / (chain_end - start)
        seconds = share * self.rates.prefill_seconds(start, chain_end) + self.rates.prefill_seconds(chain_end, length)
        exact = max(0, chain_end - RESTORED)
        return ResumePlan("trapezoid", length, start, start, chain_end, None, exact, equivalents, seconds)

    def _bounded(self, length: int, chain_end: int) -> ResumePlan:
        start = max(0, chain_end - RESTORED)
        seconds = self.rates.prefill_seconds(start, length)
        return ResumePlan("bounded", length, start, start, chain_end, None, start, chain_end - start, seconds)

    def _cold(self, length: int, chain_end: int) -> ResumePlan:
        seconds = self.rates.prefill_seconds(0, length)
        return ResumePlan("cold", length, 0, 0, chain_end, None, 0, chain_end, seconds)


def snapshot_is_exact(boundary: int, exact_from: int) -> bool:
    """Whether the rows a snapshot at `boundary` needs are all exact in a run whose rows are so from `exact_from`."""
    return max(0, boundary - RESTORED) >= exact_from
