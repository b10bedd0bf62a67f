"""A whole engine around a very small model, with logits observed: the ground of the invariant tests.

Four layers, all kinds, an indexer that selects from position 67 on. Every pool starts as NaN. The truth is one forward
pass over a whole text, from fresh caches and without company: what each of its positions gives alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch import Tensor

from triptych.cache.geometry import CacheCapacity, CacheGeometry
from triptych.cache.manager import CacheManager
from triptych.cache.places import snapshot_policy_named
from triptych.cache.policies import Below, Policies
from triptych.cache.store.protocol import Store
from triptych.checkpoint import random_tensors
from triptych.config import CSA_LAYER, HCA_LAYER, SWA_LAYER, CacheConfig, EngineConfig, ModelShape
from triptych.engine.canary import Canary
from triptych.engine.device_sampler import Draw
from triptych.engine.loop import EngineLoop, TokenEvent
from triptych.engine.mover import Mover
from triptych.engine.pools import Pools
from triptych.engine.runner import DeviceRunner, Flight, Runner
from triptych.model.weights import ModelWeights, WeightStore
from triptych.schedule.scheduler import Scheduler
from triptych.words import Chunk, FinishReason, Request, SamplingParams, StepPlan, Usage

SHAPE = ModelShape(
    vocab_size=97,
    hidden_size=32,
    ratios=(SWA_LAYER, CSA_LAYER, HCA_LAYER, CSA_LAYER),
    num_heads=2,
    head_dim=16,
    rope_dim=8,
    q_lora_rank=16,
    o_groups=2,
    o_lora_rank=8,
    index_heads=8,
    index_head_dim=8,
    index_topk=16,
    num_experts=4,
    experts_per_token=2,
    moe_intermediate_size=16,
    num_hash_layers=1,
    routed_scaling=1.5,
    num_mtp_layers=0,
    max_position=16384,
)


def random_weights(seed: int) -> WeightStore:
    """Random weights of SHAPE."""
    torch.set_num_threads(1)
    store = WeightStore(SHAPE, torch.float32, mtp=False)
    for name, tensor in random_tensors(SHAPE, seed):
        store.place(name, tensor)
    return store


@cache
def shared_weights() -> ModelWeights:
    """Those that all engines share that do not bring their own."""
    return random_weights(0).weights


class _Watched(Runner):
    """A runner that keeps the logits of every row it samples, by request and position."""

    def __init__(self, weights: ModelWeights, config: EngineConfig, pools: Pools) -> None:
        super().__init__(weights, config, pools)
        self.seen: dict[str, dict[int, Tensor]] = {}

    def start(self, plan: StepPlan, draws: Sequence[Draw], ready: Callable[[], None] = lambda: None) -> Flight:
        flight = super().start(plan, draws, ready)
        assert flight.logits is not None
        sampling = [chunk for chunk in plan.chunks if chunk.samples]
        for chunk, row in zip(sampling, flight.logits, strict=True):
            self.seen.setdefault(chunk.request_id, {})[chunk.end - 1] = row.clone()
        return flight


@dataclass
class Answer:
    """What became of one request. logits[i] preceded tokens[i]."""

    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    reason: FinishReason | None = None
    usage: Usage | None = None


class SmallEngine:
    """An EngineLoop with capacities of one's choice. All requests are greedy and end after `max_tokens`.

    `overlap`: with the runner of a GPU, without graphs; then nobody sees logits.
    """

    def __init__(
        self,
        *,
        pages: int = 160,
        slots: int = 4,
        policy: str = "adaptive",
        step_tokens: int = 512,
        prefix_cache: bool = True,
        deterministic: bool = True,
        spare: int = 4,
        host_pages: int = 0,
        stores: Sequence[Store] = (),
        canary: Canary | None = None,
        overlap: bool = False,
        weights: ModelWeights | None = None,
    ) -> None:
        config = EngineConfig(
            max_running=slots,
            step_tokens=step_tokens,
            deterministic=deterministic,
            cache=CacheConfig(prefix_cache=prefix_cache, policy=policy),
        )
        geometry = CacheGeometry.of(SHAPE, "float32")
        capacity = CacheCapacity(frames=pages + spare * geometry.snapshot_frames, slots=slots)
        policies = Policies(snapshot_policy_named(policy), prefix_cache=prefix_cache)
        below = Below(host_pages, tuple(stores))
        self.cache = CacheManager(geometry, capacity, SHAPE.num_layers, policies=policies, below=below)
        pools = Pools(SHAPE, geometry, capacity, spare=int(overlap))
        for value in vars(pools).values():
            if isinstance(value, Tensor):
                value.fill_(float("nan"))
        self._overlap = overlap
        given = weights or shared_weights()
        self._runner = _Watched(given, config, pools)
        runner: Runner = DeviceRunner(given, config, pools, capture=False) if overlap else self._runner
        mover = Mover(pools, geometry, host_pages, tuple(stores))
        scheduler = Scheduler(self.cache, config, SHAPE.max_position, runner.depth)
        self.loop = EngineLoop(SHAPE, self.cache, scheduler, runner, mover, canary)
        self.live: dict[str, Answer] = {}
        self._count = 0

    def add(self, prompt: tuple[int, ...], max_tokens: int, *, salt: str = "") -> str:
        """Queue a greedy request and return its id. Raises what the engine raises."""
        request_id = f"q{self._count}"
        self._count += 1
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        self.loop.add(Request(request_id, np.asarray(prompt, np.int32), params, salt))
        self.live[request_id] = Answer(prompt)
        return request_id

    def step(self) -> list[Answer]:
        """One engine step; the answers that it completed."""
        return self.take(self.loop.step())

    def take(self, events: Sequence[TokenEvent]) -> list[Answer]:
        """The answers that these events complete."""
        done = []
        for event in events:
            done += self._take(event)
        return done

    def drop_snapshots(self) -> None:
        """As if all of them had been evicted."""
        for snapshot in tuple(self.cache.memory.snapshots.values()):
            self.cache.memory.drop_snapshot(snapshot)

    def spoil_device(self) -> None:
        """Everything on the device goes to the tiers below, by an eviction of all of it."""
        memory = self.cache.memory
        while memory.evictable:
            memory.evict(next(iter(memory.candidates())))
        self.loop.settle(10.0)

    def abort(self, request_id: str) -> None:
        """End a live request now."""
        self.loop.finish(request_id, FinishReason.ABORT)
        del self.live[request_id]
        self._runner.seen.pop(request_id, None)

    def drain(self) -> list[Answer]:
        """Step until nothing is left."""
        done = []
        while self.loop.busy:
            done += self.step()
        return done

    def ask(self, prompt: tuple[int, ...], max_tokens: int, *, salt: str = "") -> Answer:
        """One request from start to end."""
        self.add(prompt, max_tokens, salt=salt)
        [answer] = self.drain()
        return answer

    def _take(self, event: TokenEvent) -> list[Answer]:
        assert event.error is None, event.error
        answer = self.live[event.request_id]
        if event.token_id is not None:
            answer.tokens.append(event.token_id)
            position = len(answer.prompt) + len(answer.tokens) - 2
            if not self._overlap:
                answer.logits.append(self._runner.seen[event.request_id].pop(position))
        if event.reason is None:
            return []
        answer.reason, answer.usage = event.reason, event.usage
        del self.live[event.request_id]
        self._runner.seen.pop(event.request_id, None)
        return [answer]


def events_of(
    engine: SmallEngine, prompts: Sequence[tuple[int, ...]], params: SamplingParams
) -> list[list[TokenEvent]]:
    """Run prompts together, r0 and on; the events of each. None may fail."""
    for i, prompt in enumerate(prompts):
        engine.loop.add(Request(f"r{i}", np.asarray(prompt, np.int32), params))
    events: list[list[TokenEvent]] = [[] for _ in prompts]
    while engine.loop.busy:
        for event in engine.loop.step():
            assert event.error is None, event.error
            events[int(event.request_id[1:])].append(event)
        engine.cache.check_integrity()
    return events


def alone(tokens: tuple[int, ...], weights: ModelWeights | None = None) -> Tensor:
    """The truth: logits [n, V] of all positions of a text, run in one step, nothing cached."""
    geometry = CacheGeometry.of(SHAPE, "float32")
    # one page to spare: kernels are compiled for strided pools, and a pool of one page is not strided
    pages = -(-len(tokens) // 128) + 1
    pools = Pools(SHAPE, geometry, CacheCapacity(frames=pages, slots=1))
    chunk = Chunk(
        request_id="alone",
        slot=0,
        start=0,
        end=len(tokens),
        tokens=np.asarray(tokens, np.int32),
        pages=np.arange(pages, dtype=np.int32),
        write_from=0,
    )
    given = weights or shared_weights()
    return Runner(given, EngineConfig(deterministic=True), pools).all_logits(StepPlan(0, (chunk,)))


def agree(answer: Answer, *, bitwise: bool = True) -> None:
    """Each token is the best one after the text before it, and its logits are those of that text alone, bit for bit."""
    want = alone((*answer.prompt, *answer.tokens[:-1]))[len(answer.prompt) - 1 :]
    assert answer.tokens == want.argmax(dim=1).tolist()
    for index, (got, row) in enumerate(zip(answer.logits, want, strict=True)):
        difference = float((got - row).abs().max())
        assert torch.equal(got, row) or not bitwise, f"token {index}: logits differ by {difference:.3g}"
        assert difference < 1e-4, f"token {index}: logits differ by {difference:.3g}"


def accounted(answer: Answer) -> Usage:
    """The usage of a finished answer, checked against what is known about it."""
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens == len(answer.prompt)
    assert usage.completion_tokens == len(answer.tokens)
    assert usage.cached_tokens >= 0 and usage.recomputed_tokens >= 0
    assert usage.computed_tokens >= 0
    assert usage.cached_tokens < usage.prompt_tokens, "the last prompt token always runs"
    return usage


def text(seed: int, length: int) -> tuple[int, ...]:
    """`length` random tokens; a longer text of the same seed begins with a shorter one."""
    return tuple(np.random.default_rng(seed).integers(2, SHAPE.vocab_size, 20000)[:length].tolist())
