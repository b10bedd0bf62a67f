"""How a model is laid over the devices of a node, and what each device then holds of the weights.

    tp   devices that share the heads of one batch        dp   groups with batches and caches of their own
    ep   devices over which the experts are divided       tp * dp = devices; the experts are copied devices / ep times

The latent (pages, snapshots, slots) is one head: tensor parallelism cannot divide it, so each device of a group holds
all of its group's, unless it is sharded by sequence over the group. Source: DeepSeek-V4 reference section 2.11.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from triptych.errors import ConfigError
from triptych.planner.models import PlannedModel
from triptych.planner.parts import Part

Latent = Literal["replicated", "sharded"]


@dataclass(frozen=True, slots=True)
class Layout:
    """See the top of the file."""

    devices: int
    tp: int
    ep: int
    latent: Latent = "replicated"

    @property
    def dp(self) -> int:
        """Groups, each with a cache of its own."""
        return self.devices // self.tp

    @property
    def latent_share(self) -> int:
        """Over how many devices one session's pages are divided."""
        return self.tp if self.latent == "sharded" else 1

    def describe(self) -> str:
        """For the head of a plan."""
        held = "divided over each group" if self.latent == "sharded" else "whole on each device"
        experts = f", EP {self.ep}" if self.ep > 1 else ""
        return f"TP {self.tp}, DP {self.dp}{experts}, pages {held}"


def layout_for(
    model: PlannedModel, devices: int, tp: int | None = None, ep: int | None = None, latent: Latent = "replicated"
) -> Layout:
    """The layout asked for; without `tp` the widest possible, without `ep` over all devices.

    ConfigError says why a layout is impossible and names the nearest one that is possible.
    """
    possible = [n for n in range(1, devices + 1) if devices % n == 0 and model.heads_limit % n == 0]
    if tp is None:
        tp = possible[-1]
    elif tp not in possible:
        close = min(possible, key=lambda n: (abs(n - tp), n))
        if tp < 1:
            reason = "a group has one device or more"
        elif devices % tp:
            reason = f"{devices} devices are no multiple of it"
        else:
            reason = f"the {model.heads_limit} groups of {model.name}'s heads are no multiple of it"
        raise ConfigError(f"--tp {tp} is impossible: {reason}.", f"The nearest that works is --tp {close}.")
    if ep is None or not model.experts:
        ep = devices if model.experts else 1
    elif ep < 1 or devices % ep:
        close = min((n for n in range(1, devices + 1) if devices % n == 0), key=lambda n: (abs(n - ep), n))
        raise ConfigError(f"--ep {ep} does not divide {devices} devices.", f"The nearest that works is --ep {close}.")
    return Layout(devices, tp, ep, "sharded" if model.divides else latent)


def held_bytes(part: Part, model: PlannedModel, layout: Layout) -> float:
    """Bytes of `part` on the device that holds most of it: experts are whole, everything else divides evenly."""
    if part.division == "experts":
        return part.bytes * -(-model.experts // layout.ep) / model.experts
    return part.bytes / layout.tp if part.division == "heads" else float(part.bytes)


def weights_by_part(model: PlannedModel, layout: Layout) -> dict[str, float]:
    """Bytes on one device by name of the part, MTP blocks as one."""
    sums: dict[str, float] = {}
    for part in model.parts:
        name = "MTP block" if part.mtp else part.name
        sums[name] = sums.get(name, 0.0) + held_bytes(part, model, layout)
    return sums
