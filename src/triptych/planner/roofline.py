"""Floors: the least time that a step can take, from the bytes it must read, the operations it must do and the bytes it
must send. Nothing reaches a floor; how near measured engines come is in `REACHED`.

Assumed: reading, computing and sending overlap perfectly; experts are hit evenly; latencies cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from triptych.config import CSA_RATIO
from triptych.planner.hardware import Device, Numeric
from triptych.planner.layout import Layout, held_bytes
from triptych.planner.models import PlannedModel

REACHED = {"prefill": 0.19, "decode": 0.48}
"""Which share of these floors vLLM 0.26 reached on one H200 with 20 layers of V4-Flash at 64K: 23,400 prompt tokens a
second; 11.94 ms a step for 16 requests and 24.76 ms for 64 (measured). A test computes the shares from these figures.
"""


@dataclass(frozen=True, slots=True)
class Step:
    """One step on the device that works most. Bytes read, FLOP by what they are for, bytes sent, seconds.

    `tokens`: of the whole node.
    """

    tokens: float
    weight_bytes: float
    cache_bytes: float
    flops: float
    sent_bytes: float
    memory_seconds: float
    compute_seconds: float
    link_seconds: float

    @property
    def seconds(self) -> float:
        """The floor: the longest of the three."""
        return max(self.memory_seconds, self.compute_seconds, self.link_seconds)

    @property
    def bound(self) -> str:
        """Which of the three it is."""
        times = {"memory": self.memory_seconds, "compute": self.compute_seconds, "link": self.link_seconds}
        return max(times, key=lambda name: times[name])


def decode_step(model: PlannedModel, device: Device, layout: Layout, batch: int, context: int) -> Step:
    """One token for each of `batch` requests per group, all behind `context` tokens."""
    reads = sum(model.attention.reads(context).values()) * batch / layout.latent_share
    return _step(model, device, layout, batch, [float(context)], batch, reads)


def prefill_step(model: PlannedModel, device: Device, layout: Layout, start: int, end: int, prompts: int = 1) -> Step:
    """Tokens [start, end) of `prompts` prompts in every group, in one step, for which what is cached is read once."""
    rows = end - start
    reads = dict(model.attention.reads(end))
    if model.shape is not None:  # the rows choose different CSA entries: together nearly all of them
        chosen = min(model.shape.index_topk, end / CSA_RATIO)
        reads["CSA entries"] *= max(1.0, min(end / CSA_RATIO, rows * chosen) / max(chosen, 1.0))
    read = prompts * sum(reads.values()) / layout.latent_share
    return _step(model, device, layout, prompts * rows, _points(start, end), prompts, read)


@dataclass(frozen=True, slots=True)
class Prefill:
    """Prompts in steps: seconds at the floor, what bounds most of them, tokens per second of the whole node."""

    seconds: float
    bound: str
    tokens_per_second: float


def prefill(model: PlannedModel, device: Device, layout: Layout, start: int, end: int, chunk: int) -> Prefill:
    """Floor of tokens [start, end) of a prompt in steps of `chunk`, in every group as many prompts as fill a step."""
    by_bound: dict[str, float] = {}
    prompts = max(1, chunk // (end - start))
    for at in range(start, end, chunk):
        step = prefill_step(model, device, layout, at, min(end, at + chunk), prompts)
        by_bound[step.bound] = by_bound.get(step.bound, 0.0) + step.seconds
    seconds = sum(by_bound.values())
    tokens = layout.dp * prompts * (end - start)
    return Prefill(seconds, max(by_bound, key=lambda name: by_bound[name]), tokens / seconds)


def _points(start: int, end: int) -> list[float]:
    """Contexts whose mean work is that of [start, end): the work is piecewise linear in the context."""
    pieces = 16
    return [start + (end - start) * (i + 0.5) / pieces for i in range(pieces)]


def _step(
    model: PlannedModel,
    device: Device,
    layout: Layout,
    rows: int,
    contexts: Iterable[float],
    heads_rows: int,
    cache_bytes: float,
) -> Step:
    """`rows` tokens per group behind `contexts` on average, of which `heads_rows` need logits."""
    everywhere = rows * layout.dp
    weights = _weights_read(model, layout, everywhere)
    flops = _flops(model, layout, rows, list(contexts), heads_rows)
    sent = _sent(model, layout, rows)
    return Step(
        tokens=everywhere,
        weight_bytes=weights,
        cache_bytes=cache_bytes,
        flops=sum(flops.values()),
        sent_bytes=sent,
        memory_seconds=(weights + cache_bytes) / device.bandwidth,
        compute_seconds=sum(amount / device.rate(numeric) for numeric, amount in flops.items()),
        link_seconds=sent / device.link,
    )


def _weights_read(model: PlannedModel, layout: Layout, tokens: float) -> float:
    """Each part once; of the experts those that `tokens` tokens of the whole node hit, on average."""
    total = 0.0
    for part in model.parts:
        if part.mtp or part.name == "embedding":
            continue
        held = held_bytes(part, model, layout)
        if part.division == "experts":
            held *= 1.0 - (1.0 - model.experts_per_token / model.experts) ** tokens
        total += held
    return total


def _flops(
    model: PlannedModel, layout: Layout, rows: int, contexts: list[float], heads_rows: int
) -> dict[Numeric, float]:
    """FLOP of one device by format. Experts of all groups' tokens are divided over the devices of EP."""
    sums: dict[Numeric, float] = {}
    for part in model.parts:
        if part.mtp or not part.active:
            continue
        numeric: Numeric = "bf16" if part.name == "mhc" else part.numeric  # TF32 at best; BF16 keeps it a floor
        tokens = heads_rows if part.name == "head" else rows
        share = 1.0 / layout.tp if part.division == "heads" else 1.0
        if part.division == "experts":
            share = layout.dp / layout.ep
        sums[numeric] = sums.get(numeric, 0.0) + 2.0 * part.active * tokens * share
    for context in contexts:
        for work in model.attention.work(context):
            share = 1.0 / layout.tp if work.split or layout.latent == "sharded" else 1.0
            amount = work.flops * rows * share / len(contexts)
            sums[work.numeric] = sums.get(work.numeric, 0.0) + amount
    return sums


def _sent(model: PlannedModel, layout: Layout, rows: int) -> float:
    """Bytes that one device sends: two all-reduces a layer in BF16 inside a group; experts' inputs in FP8 and outputs
    in BF16 to and from other devices, each token to its chosen experts.
    """
    reduced = 2 * 2 * (layout.tp - 1) / layout.tp * rows * model.hidden * 2 if layout.tp > 1 else 0.0
    if not model.experts or layout.ep == 1:
        return model.layers * reduced
    # inside a group the rows are divided over its devices before they are dispatched
    mine = rows / layout.tp
    exchanged = mine * model.experts_per_token * (1 + 2) * model.hidden * (layout.ep - 1) / layout.ep
    return model.layers * (reduced + exchanged)
