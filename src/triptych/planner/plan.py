"""One plan: model x hardware x layout x formats x policy x traffic, as a value that a table, JSON and a plot show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from triptych.cache.places import NAMES, snapshot_policy_named
from triptych.config import SHAPES
from triptych.errors import ConfigError, nearest
from triptych.planner.capacity import (
    Fit,
    Memory,
    Usage,
    fit,
    refuse_if_it_does_not_fit,
    sessions_of,
    snapshot_slots,
    snapshots_named,
)
from triptych.planner.cost import Cost, Priced, Tier, cost_of, tiers_of
from triptych.planner.hardware import Node
from triptych.planner.layout import Layout
from triptych.planner.mixes import Mix
from triptych.planner.models import PlannedModel, fp8_equivalent_flops, model_named, of_shape
from triptych.planner.roofline import REACHED, Step, decode_step, prefill

LENGTHS = (8_192, 65_536, 131_072, 262_144, 524_288, 1_048_576)
COMPARED_AT = 1_000_000
"""Context at which operations are compared with other models: that of the V4 report's figures."""

COMPARED_POLICIES = ("full", "periodic:8192", "adaptive", "none")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is planned: the model as a value, the node, how it is used, the traffic, prices.

    `price`: USD per device and hour, None takes the catalogue's.
    """

    model: PlannedModel
    node: Node
    layout: Layout
    usage: Usage
    mix: Mix
    policy: str = "adaptive"
    lengths: tuple[int, ...] = LENGTHS
    price: float | None = None


@dataclass(frozen=True, slots=True)
class LengthRow:
    """One context length: sessions that fit, floors of a whole prefill and of decode steps, in seconds.

    `alone`: decode of one request in each group; `batch`: of as many as run and fit.
    """

    tokens: int
    sessions: int
    prefill_seconds: float
    prefill_bound: str
    alone: Step
    batch: int
    batched: Step


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that `triptych plan` says. Bytes and seconds; tokens and sessions of the whole node.

    `as_published`: what `compared` would be in the formats that published shares are of; None where those are planned.
    """

    wanted: Wanted
    memory: Memory
    token_bytes: dict[str, float]
    windows_bytes: float
    fits: tuple[Fit, ...]
    chosen: Fit
    ceiling: float
    state_slots: int
    rows: tuple[LengthRow, ...]
    cost: Cost
    tiers: tuple[Tier, ...]
    compared: dict[str, dict[str, float]]
    as_published: dict[str, dict[str, float]] | None

    def to_dict(self) -> dict[str, Any]:
        """JSON data; the names are those of the fields."""
        wanted, model = self.wanted, self.wanted.model
        return {
            "model": model.name,
            "hardware": wanted.node.key,
            "device": asdict(replace(wanted.node.device, flops=dict(wanted.node.device.flops))),
            "devices": wanted.node.count,
            "layout": asdict(wanted.layout) | {"dp": wanted.layout.dp},
            "usage": asdict(wanted.usage),
            "mix": asdict(wanted.mix),
            "policy": wanted.policy,
            "weights_bytes": model.weight_bytes,
            "active_parameters": model.active_parameters,
            "memory": asdict(self.memory) | {"weight_bytes": self.memory.weight_bytes},
            "token_bytes": self.token_bytes | {"sum": sum(self.token_bytes.values())},
            "windows_bytes_per_token": self.windows_bytes,
            "page_bytes": model.attention.page_bytes,
            "snapshot_bytes": model.attention.snapshot_bytes,
            "snapshot_frames": model.attention.snapshot_frames,
            "slot_bytes": model.attention.slot_bytes,
            "fits": [asdict(one) for one in self.fits],
            "chosen": asdict(self.chosen),
            "ceiling_tokens": self.ceiling,
            "state_slots_in_a_tenth": self.state_slots,
            "lengths": [_row(row) for row in self.rows],
            "reached": REACHED,
            "cost": asdict(self.cost),
            "tiers": [asdict(tier) for tier in self.tiers],
            "compared": self.compared,
            "compared_as_published": self.as_published,
        }


def plan(wanted: Wanted) -> Plan:
    """Work it out. Raises ConfigError if it cannot run, with the reason and the nearest setting that can."""
    check_policy(wanted.policy)
    model, layout, mix = wanted.model, wanted.layout, wanted.mix
    memory = refuse_if_it_does_not_fit(model, wanted.node, layout, wanted.usage)
    names = dict.fromkeys((*COMPARED_POLICIES, wanted.policy)) if model.attention.snapshot_bytes else ("none",)
    fits = {name: fit(model, layout, memory.cache, snapshots_named(name, mix.snapshots), mix.session) for name in names}
    chosen = fits.get(wanted.policy, fits["none"])
    if mix.session > chosen.in_frames / layout.dp:
        raise ConfigError(
            f"{model.name} on {wanted.node.describe()} holds {chosen.in_frames / layout.dp:,.0f} tokens in one cache, "
            f"but a session of --mix {mix.name} has {mix.session:,}.",
            "Choose another --kv-policy, --latent sharded, or more devices.",
        )
    batch = max(1, min(wanted.usage.running, int(chosen.in_frames / layout.dp / mix.session)))
    priced = Priced(model, wanted.node, layout, mix, batch, wanted.usage.step, wanted.price)
    cost = cost_of(priced)
    windows = model.attention.snapshot_bytes / 128
    return Plan(
        wanted=wanted,
        memory=memory,
        token_bytes=dict(model.attention.token_bytes),
        windows_bytes=windows,
        fits=tuple(fits.values()),
        chosen=chosen,
        ceiling=fits["none"].tokens,
        state_slots=snapshot_slots(model, layout, memory.cache, 0.1),
        rows=tuple(_length_row(wanted, memory, tokens) for tokens in wanted.lengths),
        cost=cost,
        tiers=tiers_of(priced, cost) if model.shape is not None else (),
        compared=compared_with(model),
        as_published=as_published(model),
    )


def check_policy(name: str) -> None:
    """ConfigError naming the nearest if no snapshot policy is called `name`."""
    try:
        snapshot_policy_named(name)
    except ConfigError as error:
        if name.startswith("periodic"):
            raise
        raise ConfigError(f"--kv-policy {name!r} is not known.", nearest(name, NAMES)) from error


def _length_row(wanted: Wanted, memory: Memory, tokens: int) -> LengthRow:
    model, device, layout = wanted.model, wanted.node.device, wanted.layout
    kept = snapshots_named(wanted.policy, wanted.mix.snapshots)
    sessions = sessions_of(model, layout, memory.cache, kept, tokens)
    batch = max(1, min(wanted.usage.running, sessions // layout.dp))
    whole = prefill(model, device, layout, 0, tokens, min(tokens, wanted.usage.step))  # this prompt alone
    return LengthRow(
        tokens=tokens,
        sessions=sessions,
        prefill_seconds=whole.seconds,
        prefill_bound=whole.bound,
        alone=decode_step(model, device, layout, 1, tokens),
        batch=batch,
        batched=decode_step(model, device, layout, batch, tokens),
    )


def _row(row: LengthRow) -> dict[str, Any]:
    steps = {
        name: asdict(step) | {"seconds": step.seconds, "bound": step.bound}
        for name, step in (("alone", row.alone), ("batched", row.batched))
    }
    return asdict(row) | steps


def compared_with(model: PlannedModel) -> dict[str, dict[str, float]]:
    """Bytes per token and FP8-equivalent operations per token behind a million, as shares of other models'.

    "gqa-8, same depth": BF16, 8 key-value heads of 128, as many layers as `model`.
    """
    mine, context = sum(model.attention.token_bytes.values()), float(COMPARED_AT)
    found = {"gqa-8, same depth": {"bytes": mine / (model.layers * 8 * 128 * 2 * 2)}}
    for name in ("gqa-70b", "deepseek-v3.2"):
        other = model_named(name)
        share = {"bytes": mine / sum(other.attention.token_bytes.values())}
        if name == "deepseek-v3.2":
            share["flops"] = fp8_equivalent_flops(model, context) / fp8_equivalent_flops(other, context)
        found[name] = share
    return found


def as_published(model: PlannedModel) -> dict[str, dict[str, float]] | None:
    """`compared_with` in the formats of the V4 report: FP8 entries, MXFP4 index keys. None if `model` has them, or has
    no published figures.
    """
    if model.name not in SHAPES or model.shape is None:
        return None
    same = of_shape(model.name, model.shape, "fp8", "mxfp4", "released")
    return None if same.attention.token_bytes == model.attention.token_bytes else compared_with(same)


def check_lengths(lengths: Sequence[int], model: PlannedModel) -> tuple[int, ...]:
    """The lengths that `model` can have. ConfigError if none is left."""
    kept = tuple(n for n in lengths if 0 < n <= model.max_position)
    if not kept:
        raise ConfigError(
            f"--lengths {max(lengths):,} is beyond the {model.max_position:,} tokens of {model.name}.",
            f"The nearest possible is --lengths {model.max_position}.",
        )
    return kept
