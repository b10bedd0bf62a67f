"""How fast this machine prefills and fetches: starting values from the hardware, then what is measured."""

from __future__ import annotations

from dataclasses import dataclass, field

_WEIGHT = 0.1  # of one new measurement in the running mean


@dataclass(slots=True)
class TierRate:
    """One tier: `latency` seconds per fetch and `bandwidth` bytes per second."""

    latency: float
    bandwidth: float

    def seconds(self, size: int) -> float:
        """Time to fetch `size` bytes."""
        return self.latency + size / self.bandwidth

    def observe(self, size: int, seconds: float) -> None:
        """A fetch of `size` bytes took `seconds`; small ones say little about bandwidth and are left out."""
        if size >= 1 << 20 and seconds > self.latency:
            self.bandwidth += _WEIGHT * (size / (seconds - self.latency) - self.bandwidth)


@dataclass(slots=True)
class Rates:
    """Costs in seconds. Prefill of one token at context p takes `token + context * p` seconds."""

    token: float = 1 / 2000
    context: float = 1 / 2000 / 100_000
    tiers: dict[str, TierRate] = field(default_factory=dict)

    def prefill_seconds(self, start: int, end: int) -> float:
        """Time to prefill tokens [start, end)."""
        return (end - start) * (self.token + self.context * (start + end) / 2)

    def observe_prefill(self, start: int, end: int, seconds: float) -> None:
        """Tokens [start, end) took `seconds`. Moves both terms by the same factor: their ratio is the model's."""
        expected = self.prefill_seconds(start, end)
        if expected > 0 and seconds > 0:
            factor = 1 + _WEIGHT * (min(max(seconds / expected, 0.1), 10.0) - 1)
            self.token *= factor
            self.context *= factor

    def fetch_seconds(self, tier: str, size: int) -> float:
        """Time to fetch `size` bytes from `tier`."""
        return self.tiers[tier].seconds(size) if size else 0.0
