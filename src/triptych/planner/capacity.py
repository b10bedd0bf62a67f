"""What fits: the memory of one device by use, tokens by snapshot policy, sessions by length. Pure arithmetic.

|<- kept free ->|<- weights ->|<- activations, index scores, graphs ->|<- window slots ->|<- pages and snapshots ->|
  driver, NCCL                  of one step                              of running         one budget, equal frames
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from triptych.config import CSA_RATIO, PAGE
from triptych.errors import ConfigError
from triptych.planner.hardware import Node
from triptych.planner.layout import Layout, weights_by_part
from triptych.planner.models import PlannedModel

UTILISATION = 0.92
"""Share of the memory that is planned with. The rest is for what no arithmetic knows: the driver's context (0.65 GB on
an H100, measured with torch 2.11 and CUDA 13), communication buffers and fragmentation. vLLM's default is the same."""

SCORES_AT_ONCE = 512 * 2**20
"""Bytes of index scores that exist at a time; the rows of a step are scored in pieces of that. vLLM's default."""

LAUNCHES_PER_LAYER = 42
"""Kernels of one decode step and layer: counted in vLLM 0.26 on V4-Flash, one H200."""

GRAPH_FIXED, GRAPH_NODE = 75e6, 4.2e3
"""Bytes that the first CUDA graph takes, and each further kernel in one: measured on an H100, torch 2.11, CUDA 13."""

GRAPHS = 20
"""Batch sizes with a graph of their own: 1, 2, 4, 8 and then every 8 to 128."""


@dataclass(frozen=True, slots=True)
class Usage:
    """How a device is used. `running`: requests that run at once in one group; `step`: tokens of one step;
    `context`: the longest one, in tokens.
    """

    running: int = 32
    step: int = 8192
    context: int = 1048576
    utilisation: float = UTILISATION


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one device by use; `cache` is what is left for pages and snapshots."""

    total: float
    kept_free: float
    weights: dict[str, float]
    activations: float
    scores: float
    graphs: float
    slots: float
    cache: float

    @property
    def weight_bytes(self) -> float:
        """All parts."""
        return sum(self.weights.values())


def memory_of(model: PlannedModel, node: Node, layout: Layout, usage: Usage) -> Memory:
    """The memory of one device. `cache` may come out negative: see `refuse_if_it_does_not_fit`."""
    total = node.device.memory
    weights = weights_by_part(model, layout)
    activations = activation_bytes(model, layout, usage)
    scores = score_bytes(model, usage)
    graphs = graph_bytes(model) if node.device.reported else 0.0
    slots = float(usage.running * model.attention.slot_bytes)
    usable = total * usage.utilisation
    cache = usable - sum(weights.values()) - activations - scores - graphs - slots
    return Memory(total, total - usable, weights, activations, scores, graphs, slots, cache)


def activation_bytes(model: PlannedModel, layout: Layout, usage: Usage) -> float:
    """The largest set of tensors that live at once in a step: streams, and either the queries or the expert rows.

    All in BF16 except the experts' inputs in FP8 and the logits of the running requests in FP32.
    """
    streams = 2 * usage.step * model.streams * model.hidden * 2  # before and after a sub-layer
    attention = 2 * usage.step * model.query_width / layout.tp * 2  # queries, and what comes out per head
    rows = usage.step * layout.dp * model.experts_per_token / layout.ep if model.experts else usage.step
    inner = model.expert_inner * 3 / (1 if model.experts else layout.tp)  # gate, up and their product
    moe = rows * (model.hidden * (1 + 2) + inner * 2)
    logits = usage.running * model.vocabulary / layout.tp * 4
    return streams + max(attention, moe) + logits


def score_bytes(model: PlannedModel, usage: Usage) -> float:
    """FP32 scores of the indexer for the rows that are scored at a time, of one layer."""
    indexer = [work for work in model.attention.work(float(usage.context)) if work.name == "indexer"]
    if not indexer or not indexer[0].flops:
        return 0.0
    ratio = CSA_RATIO if model.shape is not None else 1
    return float(min(SCORES_AT_ONCE, usage.step * usage.context // ratio * 4))


def graph_bytes(model: PlannedModel) -> float:
    """Captured decode steps; their tensors are those of a step."""
    return GRAPH_FIXED + GRAPHS * model.layers * LAUNCHES_PER_LAYER * GRAPH_NODE


def refuse_if_it_does_not_fit(model: PlannedModel, node: Node, layout: Layout, usage: Usage) -> Memory:
    """The memory of one device. ConfigError with the reason and the nearest number of devices that works."""
    memory = memory_of(model, node, layout, usage)
    frames = 2 + model.attention.snapshot_frames
    if memory.cache >= frames * model.attention.page_bytes:
        return memory
    usable = memory.total - memory.kept_free
    if memory.weight_bytes > usable:
        reason = (
            f"the weights take {memory.weight_bytes / 1e9:.1f} GB of each device, "
            f"of which {usable / 1e9:.1f} of {memory.total / 1e9:.0f} GB can be used"
        )
    else:
        reason = (
            f"weights ({memory.weight_bytes / 1e9:.1f} GB), a step of {usage.step:,} tokens "
            f"({(memory.activations + memory.scores + memory.graphs) / 1e9:.1f} GB) and {usage.running} window slots "
            f"({memory.slots / 1e9:.1f} GB) leave no room for pages in {usable / 1e9:.1f} GB"
        )
    message = f"{model.name} does not fit on {node.describe()} with {layout.describe()}: {reason}."
    raise ConfigError(message, _nearest_that_fits(model, node, layout, usage))


def _nearest_that_fits(model: PlannedModel, node: Node, layout: Layout, usage: Usage) -> str:
    """A sentence with the nearest setting that works: less at once, another division of these devices, or more."""
    per_page = model.attention.page_bytes * (2 + model.attention.snapshot_frames)

    def fits(other: Layout, used: Usage = usage) -> bool:
        return memory_of(model, node, other, used).cache >= per_page

    most = _largest(usage.running, lambda n: fits(layout, replace(usage, running=n)))
    if most:
        return f"The nearest setting that fits: --running {most}."
    most = _largest(usage.step, lambda n: fits(layout, replace(usage, step=n)))
    if most:
        return f"The nearest setting that fits: --step-tokens {most}."
    wider = [n for n in range(layout.tp, layout.devices + 1) if layout.devices % n == 0 and model.heads_limit % n == 0]
    for tp in wider:
        for ep in (layout.ep, layout.devices if model.experts else 1):
            if fits(Layout(layout.devices, tp, ep, layout.latent)):
                return f"The nearest setting that fits: --tp {tp}" + (f" --ep {ep}." if ep != layout.ep else ".")
    for devices in (1, 2, 4, 8, 16, 32, 64, 72):
        if devices > layout.devices:
            tp = max(n for n in range(1, devices + 1) if devices % n == 0 and model.heads_limit % n == 0)
            if fits(Layout(devices, tp, devices if model.experts else 1, layout.latent)):
                return f"The nearest setting that fits: --gpus {devices}."
    return "Choose devices with more memory, or a smaller weight format."


def _largest(below: int, fits: Callable[[int], bool]) -> int:
    """The largest number under `below` that `fits`, where all smaller ones do as well; 0 if not even 1 does."""
    low, high = 0, below
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass(frozen=True, slots=True)
class Snapshots:
    """How many snapshots a session keeps: one every `period` tokens, or `kept` of them whatever its length."""

    name: str
    period: int | None = None
    kept: float = 0.0

    def of(self, tokens: float) -> float:
        """Snapshots of a session of `tokens` tokens."""
        return tokens / self.period if self.period else min(self.kept, tokens / PAGE)


def snapshots_named(policy: str, kept: float) -> Snapshots:
    """What a cache policy keeps per session; "adaptive" and "bounded" keep `kept`. The caller has checked the name."""
    kind, _, period = policy.partition(":")
    if kind == "full":
        return Snapshots(policy, PAGE)
    if kind == "periodic":
        return Snapshots(policy, int(period))
    return Snapshots(policy, None, 0.0 if kind == "none" else kept)


@dataclass(frozen=True, slots=True)
class Fit:
    """What a policy fits into a node, in sessions of `session` tokens.

    `token_bytes`: bytes that a token costs, its share of snapshots included. `tokens`: by bytes alone. `in_frames`:
    with snapshots rounded up to this engine's frames, which is what the allocator grants.
    """

    policy: str
    session: int
    token_bytes: float
    tokens: float
    in_frames: float


def fit(model: PlannedModel, layout: Layout, cache: float, snapshots: Snapshots, session: int) -> Fit:
    """Tokens of all sessions together that the caches of a node hold."""
    attention = model.attention
    per_token = snapshots.of(session) / session
    token_bytes = attention.page_bytes / PAGE + per_token * attention.snapshot_bytes
    frames_per_token = 1 / PAGE + per_token * attention.snapshot_frames
    frames = cache // attention.page_bytes
    groups = layout.dp * layout.latent_share
    return Fit(
        snapshots.name, session, token_bytes, groups * cache / token_bytes, groups * int(frames / frames_per_token)
    )


def sessions_of(model: PlannedModel, layout: Layout, cache: float, snapshots: Snapshots, tokens: int) -> int:
    """How many sessions of `tokens` tokens a node holds, in whole frames."""
    attention = model.attention
    pages = -(-tokens // PAGE)
    each = pages + -(-snapshots.of(tokens) // 1) * attention.snapshot_frames
    per_group = int(cache * layout.latent_share // attention.page_bytes // each)
    return layout.dp * per_group


def snapshot_slots(model: PlannedModel, layout: Layout, cache: float, share: float) -> int:
    """Snapshots that `share` of the cache memory holds, over all groups; 0 if the model needs none."""
    if not model.attention.snapshot_bytes:
        return 0
    return layout.dp * layout.latent_share * int(share * cache // model.attention.snapshot_bytes)
