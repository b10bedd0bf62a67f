"""A plan as text of at most 100 columns."""

from __future__ import annotations

from collections.abc import Iterator

from triptych.planner.plan import LengthRow, Plan
from triptych.planner.roofline import REACHED


def report(plan: Plan) -> str:
    """The whole plan for a terminal."""
    return "\n".join(
        line.rstrip()
        for part in (_head, _memory, _bytes, _tokens, _lengths, _cost, _tiers, _ratios)
        for line in (*part(plan), "")
    ).rstrip()


def _head(plan: Plan) -> Iterator[str]:
    wanted = plan.wanted
    yield f"{wanted.model.name} on {wanted.node.describe()}: {wanted.layout.describe()}"
    yield (
        f"weights {_bytes_of(wanted.model.weight_bytes)}, "
        f"{wanted.model.active_parameters / 1e9:.3g} billion parameters per token"
    )


def _memory(plan: Plan) -> Iterator[str]:
    memory, usage, attention = plan.memory, plan.wanted.usage, plan.wanted.model.attention
    yield "Memory of one device, GB (10^9 bytes)"
    yield f"  {memory.total / 1e9:9.2f}  data sheet"
    yield f"  {-memory.kept_free / 1e9:9.2f}  kept free, {1 - usage.utilisation:.0%}: driver, communication, rest"
    largest = sorted(memory.weights.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in largest[:4])
    yield f"  {-memory.weight_bytes / 1e9:9.2f}  weights: {shown}, ..."
    yield f"  {-memory.activations / 1e9:9.2f}  activations of a step of {usage.step:,} tokens"
    if memory.scores:
        yield f"  {-memory.scores / 1e9:9.2f}  index scores of the rows that are scored at a time (transient)"
    if memory.graphs:
        yield f"  {-memory.graphs / 1e9:9.2f}  CUDA graphs"
    if memory.slots:
        yield f"  {-memory.slots / 1e9:9.2f}  {usage.running} window slots of {attention.slot_bytes / 1e6:.1f} MB"
    yield f"  {memory.cache / 1e9:9.2f}  left for pages and snapshots"


def _bytes(plan: Plan) -> Iterator[str]:
    attention = plan.wanted.model.attention
    parts = " + ".join(f"{name} {size:,.0f}" for name, size in plan.token_bytes.items())
    yield f"Bytes per token: {parts} = {sum(plan.token_bytes.values()):,.0f}"
    if attention.snapshot_bytes:
        yield (
            f"  a page of 128 tokens {attention.page_bytes:,}; a snapshot {attention.snapshot_bytes:,}, in "
            f"{attention.snapshot_frames} frames of page size"
        )
        yield f"  keeping every window would add {plan.windows_bytes:,.0f} per token"


def _tokens(plan: Plan) -> Iterator[str]:
    layout, cache = plan.wanted.layout, plan.memory.cache
    times = layout.dp * layout.latent_share
    per = f"{times} x " if times > 1 else ""
    yield f"Tokens that fit, whole node, in sessions of {plan.chosen.session:,} (--mix {plan.wanted.mix.name})"
    yield f"  {'policy':<16}{'bytes/token':>12}{'tokens':>10}{'in frames':>11}   arithmetic"
    for one in plan.fits:
        mark = "*" if one.policy == plan.wanted.policy else " "
        yield (
            f"{mark} {one.policy:<16}{one.token_bytes:>12,.0f}{_millions(one.tokens):>10}"
            f"{_millions(one.in_frames):>11}   {per}{cache / 1e9:.2f} GB / {one.token_bytes:,.0f}"
        )
    yield f"  The ceiling, when snapshots cost nothing: {_millions(plan.ceiling)} tokens."
    if plan.state_slots:
        yield f"  A tenth of this memory holds {plan.state_slots:,} snapshots, so many positions to resume at."
    if layout.tp > 1 and layout.latent == "replicated":
        yield f"  Each of {layout.tp} devices holds the same pages; --latent sharded would hold {layout.tp} times that."


def _lengths(plan: Plan) -> Iterator[str]:
    yield "Sessions that fit, and floors: the least a step can take (bound by memory, compute or link)"
    yield (
        f"  {'tokens':>9}{'sessions':>10}{'prefill':>11}  {'':<8}{'1 user':>9}  {'':<8}"
        f"{'batch':>6}{'step':>10}  {'':<8}{'tok/s':>9}"
    )
    for row in plan.rows:
        yield _length_line(row, plan.wanted.layout.dp)
    yield (
        f"  Measured engines reach about {REACHED['prefill']:.0%} of the prefill and {REACHED['decode']:.0%} of the "
        "decode floor's rate."
    )


def _length_line(row: LengthRow, groups: int) -> str:
    speed = row.batched.tokens / row.batched.seconds
    fits = "" if row.sessions >= groups else "  does not fit"
    return (
        f"  {row.tokens:>9,}{row.sessions:>10,}{_seconds(row.prefill_seconds):>11}  {row.prefill_bound:<8}"
        f"{_seconds(row.alone.seconds):>9}  {row.alone.bound:<8}{row.batch * groups:>6}"
        f"{_seconds(row.batched.seconds):>10}  {row.batched.bound:<8}{speed:>9,.0f}{fits}"
    )


def _cost(plan: Plan) -> Iterator[str]:
    cost, mix = plan.cost, plan.wanted.mix
    price = "no price" if cost.price is None else f"{cost.price:.2f} USD per device and hour"
    traffic = f"{mix.cached:,} cached + {mix.append:,} new + {mix.output:,} out, {mix.steps:g} steps a task"
    yield f"Traffic {mix.name}: {traffic}"
    yield f"  {price} ({cost.price_kind}); {cost.batch * plan.wanted.layout.dp} requests decode at once"
    for name, rate in (("prefill", cost.prefill), ("decode", cost.decode)):
        usd = "" if rate.usd is None else f", {rate.usd:.3g} USD per million"
        yield f"  {name:<8} {rate.tokens:>9,.0f} tok/s of {rate.floor_tokens:,.0f} at the floor ({rate.bound}){usd}"
    yield f"  one user sees {cost.per_user:,.0f} tok/s; a task takes {_seconds(cost.task_seconds)} of the node"
    if cost.task_usd is not None and cost.task_usd_uncached is not None:
        yield f"  a task costs {cost.task_usd:.3g} USD; without a cache {cost.task_usd_uncached:.3g}"


def _tiers(plan: Plan) -> Iterator[str]:
    if not plan.tiers:
        return
    yield "Tiers below the device, for paused sessions of this traffic"
    head = f"  {'tier':<6}{'kept for':>10}{'session':>10}{'fetch':>10}{'recompute':>11}"
    yield f"{head}{'size needed':>13}{'worth it above':>16}"
    for tier in plan.tiers:
        chance = "-" if tier.break_even is None else f"P = {tier.break_even:.1%}"
        yield (
            f"  {tier.name:<6}{_seconds(tier.ttl):>10}{_bytes_of(tier.session_bytes):>10}"
            f"{_seconds(tier.fetch_seconds):>10}{_seconds(tier.recompute_seconds):>11}"
            f"{_bytes_of(tier.needed_bytes):>13}{chance:>16}"
        )


def _ratios(plan: Plan) -> Iterator[str]:
    yield f"Bytes per token are {_shares(plan.compared)}, at a million tokens."
    if plan.as_published is not None:
        yield f"With MXFP4 index keys, which published figures assume: {_shares(plan.as_published)}."


def _shares(compared: dict[str, dict[str, float]]) -> str:
    return ", ".join(
        f"{share['bytes']:.1%} of {name}'s"
        + (f" and {share['flops']:.1%} of its operations" if "flops" in share else "")
        for name, share in compared.items()
    )


def _millions(tokens: float) -> str:
    return f"{tokens / 1e6:,.2f}M" if tokens >= 1e5 else f"{tokens:,.0f}"


def _bytes_of(size: float) -> str:
    """A size in decimal units, as data sheets have it."""
    unit, factor = next((one for one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if size >= one[1]), ("B", 1.0))
    return f"{size / factor:,.{1 if size < 1e3 * factor else 0}f} {unit}"


def _seconds(value: float) -> str:
    """A duration with three digits and its unit."""
    units = (("us", 1e-6, 1e-3), ("ms", 1e-3, 1.0), ("s", 1.0, 120.0), ("min", 60.0, 7200.0))
    unit, factor = next(((unit, factor) for unit, factor, limit in units if value < limit), ("h", 3600.0))
    return f"{value / factor:.3g} {unit}"
