"""What a policy costs on one piece of traffic: the real cache manager replays it, the planner's rates price the work.

    a returning prompt waits for     fetching what lies below the device, at the tier's latency and bandwidth
                                     computing what is in no cache, and again what rebuilds windows
    everybody waits for              copies to the host, which are made between two steps

Rates of computing are those of `planner.prefill_rates`, the share that measured engines reach included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.prefix_policy.traffic import ANSWER, QUESTION, Cell, Traffic
from triptych.cache.geometry import CacheGeometry
from triptych.cache.jobs import Done, Jobs
from triptych.cache.rates import TierRate
from triptych.cache.resume import ResumePlan
from triptych.config import PAGE
from triptych.workload.replay import Replay, ReplaySettings
from triptych.workload.traces import TraceRequest

IN_FLIGHT = 2
TIERS = {
    "device": None,
    "host": TierRate(20e-6, 50e9),
    "nvme": TierRate(200e-6, 7e9),
    "network": TierRate(1e-3, 1.25e9),
    "objects": TierRate(30e-3, 0.1e9),
}
"""Where what is cached lies: pinned host memory as measured beside an H200, one NVMe drive by its data sheet (the
planner's figure), a machine over 10 Gbit/s, a bucket of an object store (an assumption)."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Means of a returning prompt: seconds of computing, of fetching, of copies down, tokens not run over all tokens.

    `written`: bytes that a request sends below the device, over the bytes of the pages it made.
    """

    compute: float
    fetch: float
    down: float
    hit: float
    written: float

    @property
    def seconds(self) -> float:
        """What a returning prompt waits for before its first token, if nothing else runs."""
        return self.compute + self.fetch + self.down


class PricedReplay(Replay):
    """A replay that keeps the account of each request."""

    def __init__(self, settings: ReplaySettings, rates: tuple[float, float], tier: TierRate | None) -> None:
        super().__init__(settings)
        self.manager.rates.token, self.manager.rates.context = rates
        self._tier = tier
        if tier is not None:
            self.manager.rates.tiers = dict.fromkeys(self.manager.rates.tiers, tier)
        self.seconds: list[float] = []
        self.cached: list[tuple[int, int]] = []
        self.fetched: list[float] = []
        self.down = 0.0

    def _serve(self, name: str, request: TraceRequest) -> None:
        self.fetched.append(0.0)
        super()._serve(name, request)

    def _count(self, name: str, plan: ResumePlan) -> None:
        super()._count(name, plan)
        self.seconds.append(plan.seconds)
        self.cached.append((plan.cached_tokens, plan.length))

    def _carry_out(self, jobs: Jobs) -> Iterator[Done]:
        assert self._tier is not None
        size = self.manager.tiers.size
        for fetch in jobs.fetches:
            self.fetched[-1] += self._tier.seconds(sum(size(part.key) for part in fetch.parts))
        self.down += sum(size(one.key) for one in jobs.demotions) / self._tier.bandwidth
        yield from super()._carry_out(jobs)


def settings_of(geometry: CacheGeometry, cell: Cell, policy: str, tier: str, pressure: float) -> ReplaySettings:
    """Memory in which the cell's texts press so much, at `tier`, beside what two running requests need.

    Above a lower tier lies a device that holds all snapshots of four prompts even under "full", so that no policy is
    hindered, and a quarter of the texts' pages.
    """
    pages = -(-cell.length // PAGE)
    memory = int(cell.live * pages * geometry.page_bytes / pressure)
    longest = pages * 5 // 4 + -(-int(cell.uses * 10 * (QUESTION + ANSWER)) // PAGE) + 2
    device = IN_FLIGHT * (geometry.slot_bytes + longest * geometry.page_bytes)
    device += memory if tier == "device" else 4 * pages * (1 + geometry.snapshot_frames) * geometry.page_bytes
    host = memory if tier == "host" else 0
    disk = memory if tier not in ("device", "host") else 0
    return ReplaySettings(geometry, device, policy, host_memory=host, disk=disk, in_flight=IN_FLIGHT)


def priced(settings: ReplaySettings, cell: Cell, tier: str, rates: tuple[float, float]) -> Costs:
    """Replay `cell`; the first quarter of the requests only warms up."""
    geometry, traffic = settings.geometry, Traffic(cell)
    replayed = PricedReplay(settings, rates, TIERS[tier])
    result = replayed.run(traffic)
    assert not result.unservable, "the cache for running requests is too small"
    counted = [i for i, again in enumerate(traffic.again) if again and i >= cell.requests // 4]
    cached = [replayed.cached[i] for i in counted]
    moved = replayed.manager.tiers.moved
    made = replayed.manager.stats().pages_sealed * geometry.page_bytes
    return Costs(
        compute=sum(replayed.seconds[i] for i in counted) / len(counted),
        fetch=sum(replayed.fetched[i] for i in counted) / len(counted),
        down=replayed.down / cell.requests if tier == "host" else 0.0,
        hit=sum(one for one, _ in cached) / sum(length for _, length in cached),
        written=sum(moved.bytes_in.values()) / made,
    )
