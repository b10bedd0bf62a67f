"""What a cache manager is built from besides its memory: policies, and what lies below the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from triptych.cache.places import SnapshotPolicy, adaptive, snapshot_policy_named
from triptych.cache.rates import Rates
from triptych.cache.retention import NextUse, RetentionPolicy, retention_named
from triptych.cache.store.protocol import Store

ADAPTIVE = SnapshotPolicy("adaptive", adaptive)


def _value() -> RetentionPolicy:
    return retention_named("value")


@dataclass(slots=True)
class Policies:
    """Where snapshots are put, what is given up first, what things cost.

    `quota`: the share of all frames that one tenant's cached objects may take while others want room; `shares` say
    otherwise for tenants by their salt. `prefix_cache` False: nothing is kept for others. `ttl`: seconds to live of
    what a request cached, where its hints do not say.
    """

    places: SnapshotPolicy = ADAPTIVE
    retention: RetentionPolicy = field(default_factory=_value)
    rates: Rates = field(default_factory=Rates)
    quota: float = 1.0
    shares: Mapping[str, float] = field(default_factory=dict)
    prefix_cache: bool = True
    ttl: float | None = None


@dataclass(frozen=True, slots=True)
class Below:
    """The tiers under the device: frames on the host, then stores, fastest first."""

    host_frames: int = 0
    stores: Sequence[Store] = ()


def policies_named(name: str, future: NextUse | None = None) -> Policies:
    """Policies by the one name that `triptych replay` compares them by.

    A name of places.py means these places with retention by value; "lru", "value" and "belady" mean adaptive places
    with that retention. ConfigError for an unknown name.
    """
    if name in ("lru", "value", "belady"):
        return Policies(retention=retention_named(name, future))
    return Policies(places=snapshot_policy_named(name))
