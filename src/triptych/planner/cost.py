"""Money: USD per million tokens and per task, and what is worth keeping on which tier."""

from __future__ import annotations

from dataclasses import dataclass

from triptych.config import PAGE
from triptych.planner.hardware import Node
from triptych.planner.layout import Layout
from triptych.planner.mixes import Mix
from triptych.planner.models import PlannedModel
from triptych.planner.roofline import REACHED, decode_step, prefill

DRAM_MONTH, DISK_MONTH = 0.40, 0.008
"""USD per GB and month that host memory and raw local NVMe cost. Assumptions, to be replaced by one's own bill."""

DISK_BANDWIDTH = 7e9
"""Bytes per second of one NVMe drive: a PCIe 4.0 x4 drive's data sheet."""

_MONTH, _KEPT = 30 * 24 * 3600.0, 72 * 3600.0


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens per second of the whole node: at the floor, and by the share of it that measured engines reach. `usd`: per
    million tokens, None without a price.
    """

    bound: str
    floor_tokens: float
    tokens: float
    usd: float | None


@dataclass(frozen=True, slots=True)
class Cost:
    """A mix on a node. `per_user`: decode tokens per second of one user. `task_seconds`: of the whole node.

    `task_usd` is None without a price; `task_usd_uncached` is what the task would cost without any cache.
    """

    price: float | None
    price_kind: str
    batch: int
    prefill: Rate
    decode: Rate
    per_user: float
    task_seconds: float
    task_usd: float | None
    task_usd_uncached: float | None


@dataclass(frozen=True, slots=True)
class Priced:
    """What costs are computed from: model, node, layout, traffic, requests that decode at once in a group, tokens of a
    prefill step, USD per device and hour (None: the catalogue's).
    """

    model: PlannedModel
    node: Node
    layout: Layout
    mix: Mix
    batch: int
    step: int
    price: float | None = None

    def prefill_rate(self, start: int, end: int) -> tuple[str, float]:
        """What bounds the prefill of tokens [start, end), and tokens per second of the node at the floor."""
        done = prefill(self.model, self.node.device, self.layout, start, end, self.step)
        return done.bound, done.tokens_per_second


def cost_of(given: Priced) -> Cost:
    """What a task costs. Prefill and decode each have the node to themselves for the time that they take."""
    mix, price, kind = given.mix, given.price, "as given"
    if price is None and given.node.device.price is not None:
        price, kind = given.node.device.price
    per_second = None if price is None else price * given.node.count / 3600
    step = decode_step(given.model, given.node.device, given.layout, given.batch, mix.session)
    fresh = _rate(*given.prefill_rate(mix.cached, mix.cached + mix.append), "prefill", per_second)
    whole = _rate(*given.prefill_rate(0, mix.cached + mix.append), "prefill", per_second)
    decode = _rate(step.bound, step.tokens / step.seconds, "decode", per_second)
    seconds = mix.steps * (mix.append / fresh.tokens + mix.output / decode.tokens)
    uncached = mix.steps * ((mix.cached + mix.append) / whole.tokens + mix.output / decode.tokens)
    return Cost(
        price=price,
        price_kind=kind if price is not None else "not known: give --price",
        batch=given.batch,
        prefill=fresh,
        decode=decode,
        per_user=REACHED["decode"] / step.seconds,
        task_seconds=seconds,
        task_usd=None if per_second is None else seconds * per_second,
        task_usd_uncached=None if per_second is None else uncached * per_second,
    )


def _rate(bound: str, floor: float, kind: str, per_second: float | None) -> Rate:
    tokens = floor * REACHED[kind]
    return Rate(bound, floor, tokens, None if per_second is None else 1e6 / tokens * per_second)


@dataclass(frozen=True, slots=True)
class Tier:
    """Keeping a paused session of the mix, with its newest snapshot, on one tier for `ttl` seconds.

    `recompute_seconds`: of the whole node. `break_even`: probability of return above which keeping costs less than
    computing it again, None without a price. `needed_bytes`: the tier's size if everything new is kept for `ttl`.
    """

    name: str
    ttl: float
    session_bytes: float
    fetch_seconds: float
    recompute_seconds: float
    needed_bytes: float
    break_even: float | None


def tiers_of(given: Priced, cost: Cost) -> tuple[Tier, ...]:
    """Host memory for the mix's time to live, and disk for 72 hours, as long as DeepSeek's API keeps prefixes."""
    attention, mix = given.model.attention, given.mix
    token = attention.page_bytes / PAGE
    size = mix.session * token + attention.snapshot_bytes
    again = mix.session / (given.prefill_rate(0, mix.session)[1] * REACHED["prefill"])
    task = mix.steps * (mix.append + mix.output)
    growth = task / cost.task_seconds * token
    found = []
    for name, bandwidth, month, ttl in (
        ("host", given.node.device.host_link, DRAM_MONTH, mix.ttl),
        ("disk", DISK_BANDWIDTH, DISK_MONTH, _KEPT),
    ):
        if not ttl:
            continue
        keeping = size / 1e9 * month * ttl / _MONTH
        value = None if cost.price is None else again * cost.price * given.node.count / 3600
        chance = None if value is None else keeping / value
        found.append(Tier(name, ttl, size, size / bandwidth, again, growth * ttl, chance))
    return tuple(found)
