"""Executes a StepPlan: restore snapshots, build the Batch, run the model, sample.

`Runner` does it at once, on any device. `DeviceRunner` only enqueues: nothing in `start` waits for the GPU, so the
host plans step n + 1 while step n runs. Decode rows go through CUDA graphs, prefill chunks of the same step follow
them; sampling stays on the device, and one small copy with an event brings back what the host has to know.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.cache.geometry import LOOKBACK
from triptych.config import PAGE, EngineConfig
from triptych.engine.batching import build_batch, is_decode
from triptych.engine.chunk_graphs import MOST_ROWS, ChunkGraphs, padded
from triptych.engine.device import capability_of, kind_of, on_device
from triptych.engine.device_sampler import DeviceSampler, Draw, Drawn
from triptych.engine.graphs import DecodeSteps, bucket_of
from triptych.engine.pools import Pools
from triptych.engine.sampler import sample
from triptych.engine.scores import Scores, lines_on_device, lines_on_host, scores
from triptych.kernels.registry import select
from triptych.model.batch import Batch
from triptych.model.transformer import Last, Transformer
from triptych.model.weights import ModelWeights
from triptych.words import Chunk, SampledToken, SlotSave, StepPlan


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was started. `logits` [S, V] are there if the caller asked for them; `scores`, of chunks with
    targets, have arrived when `finish` has returned."""

    plan: StepPlan
    draws: Sequence[Draw]
    finish: Callable[[], tuple[list[SampledToken | str], float]]
    logits: Tensor | None = None
    scores: Scores | None = None


class Runner:
    """One device's worth of model and caches. Holds no request state: plans carry all of it."""

    depth = 0
    """Steps that may be under way when the next is planned."""

    def __init__(self, weights: ModelWeights, config: EngineConfig, pools: Pools) -> None:
        kernels = select(
            config.kernel_backend,
            deterministic=config.deterministic,
            device=kind_of(pools.device),
            capability=capability_of(pools.device),
        )
        self.model = Transformer(weights, kernels, config.numerics)
        self.pools = pools

    def start(self, plan: StepPlan, draws: Sequence[Draw], ready: Callable[[], None] = lambda: None) -> Flight:
        """Run the step and sample: draws[i] is for the i-th chunk that samples.

        `ready` is called when the model runs, and completes what the draws need.
        """
        started = time.perf_counter()
        last = self._run(plan)
        logits = self.model.head(last, last.batch.sampled)
        seconds = time.perf_counter() - started
        scored = scores(self.model, last, plan.chunks, lines_on_host)
        ready()
        return Flight(plan, draws, lambda: (sample(logits, [draw.state for draw in draws]), seconds), logits, scored)

    def logits(self, plan: StepPlan) -> Tensor:
        """Logits [S, V] float32 of the chunks that sample, in plan order."""
        last = self._run(plan)
        return self.model.head(last, last.batch.sampled)

    def all_logits(self, plan: StepPlan) -> Tensor:
        """Logits [R, V] of every row of the plan, for tests."""
        last = self._run(plan, all_logits=True)
        return self.model.head(last, last.batch.sampled)

    def save(self, saves: Sequence[SlotSave]) -> None:
        """Copy window rows out of slots."""
        with torch.inference_mode():
            for save in saves:
                self.pools.save(save.slot, save.position, save.frames)

    def _run(self, plan: StepPlan, *, all_logits: bool = False) -> Last:
        with torch.inference_mode():
            self._prepare(plan)
            batch = on_device(build_batch(plan.chunks, self.pools, all_logits=all_logits), self.pools.device)
            return self.model.run(batch, self.pools.layers)

    def _prepare(self, plan: StepPlan) -> None:
        """What comes before the rows: slots are saved, then restored."""
        self.save(plan.saves)
        for chunk in plan.chunks:
            if chunk.restore is not None:
                self.pools.restore(chunk.slot, chunk.start + LOOKBACK, chunk.restore)


class DeviceRunner(Runner):
    """A runner that enqueues steps. `capture`: decode by CUDA graphs; without them it runs on a processor, for tests.

    `pools` have a spare slot and frame. `most_pages` of a request, if not what context and frames allow. `depth` is 1,
    unless somebody has to see every step's logits. In deterministic mode the host samples, and the next step waits for
    it.
    """

    def __init__(
        self, weights: ModelWeights, config: EngineConfig, pools: Pools, *, capture: bool, most_pages: int = 0
    ) -> None:
        super().__init__(weights, config, pools)
        self.depth = 0 if config.cache.canary or config.deterministic else 1
        context = min(config.max_context or weights.shape.max_position, weights.shape.max_position)
        pages = most_pages or min(-(-context // PAGE), pools.capacity.frames)
        self.steps = DecodeSteps(
            self.model, pools, config.max_running, pages, capture=capture, chunked=config.deterministic
        )
        self._sampler: DeviceSampler | None = None
        if not config.deterministic:  # torch's sums over a row depend on the number of rows, some on the run
            self._sampler = DeviceSampler(self.steps.tokens, weights.shape.vocab_size, self.model.kernels.likeliest)
        self._cuda = pools.device.type == "cuda"
        self._graphs: ChunkGraphs | None = None
        if capture and self._cuda and config.numerics == "native":
            self._graphs = ChunkGraphs(self._forward_there, pools.device, self.steps.memory)

    @torch.inference_mode()
    def start(self, plan: StepPlan, draws: Sequence[Draw], ready: Callable[[], None] = lambda: None) -> Flight:
        """Enqueue the step; `Flight.finish` waits for it."""
        begun = self._mark()
        self._prepare(plan)
        if self._sampler is not None:
            self._sampler.begin(draws)
        by_slot = {draw.slot: draw for draw in draws}
        decodes = [chunk for chunk in plan.chunks if is_decode(chunk)]
        rest = [chunk for chunk in plan.chunks if not is_decode(chunk)]
        arriving: list[tuple[list[Draw], Drawn]] = []
        rows: dict[int, Tensor] = {}

        def take(logits: Tensor, chosen: Tensor | None, chunks: Sequence[Chunk]) -> None:
            some = [by_slot[chunk.slot] for chunk in chunks if chunk.samples]
            if some and self._sampler is not None:
                arriving.append((some, self._sampler.draw(logits, chosen, some).to_host()))
            if not self.depth:  # somebody looks at logits, whose buffer the next step overwrites
                rows.update(zip([draw.slot for draw in some], logits.clone(), strict=True))

        decoded = self.steps.run(decodes) if decodes else None
        prefilled, scored = self._chunks(rest) if rest else (None, None)
        ready()
        if decoded is not None:
            take(*decoded, decodes)
        if prefilled is not None:
            take(prefilled, None, rest)
        ended = self._mark()
        logits = torch.stack([rows[draw.slot] for draw in draws]) if rows else None

        def finish() -> tuple[list[SampledToken | str], float]:
            seconds = _seconds(begun, ended)
            if self._sampler is None:
                return [] if logits is None else sample(logits, [draw.state for draw in draws]), seconds
            found = {d.slot: r for some, one in arriving for d, r in zip(some, one.results(some), strict=True)}
            return [found[draw.slot] for draw in draws], seconds

        return Flight(plan, draws, finish, logits, scored)

    def _chunks(self, chunks: Sequence[Chunk]) -> tuple[Tensor, Scores | None]:
        """Logits of chunks, and their scores where any are wanted: those chunks do without graphs."""
        if all(chunk.targets is None for chunk in chunks):
            return self.chunks(chunks), None
        last = self.model.run(on_device(build_batch(chunks, self.pools), self.pools.device), self.pools.layers)
        scored = scores(self.model, last, chunks, lines_on_device)
        return self.model.head(last, last.batch.sampled), scored.to_host() if scored is not None else None

    @torch.inference_mode()
    def chunks(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits of chunks; small ones run by graphs of their own."""
        batch = build_batch(chunks, self.pools)
        if self._graphs is not None and batch.rows <= MOST_ROWS:
            fixed = padded(batch, bucket_of(batch.page_table.shape[1], self.steps.pages))
            if fixed is not None:
                return self._graphs.run(fixed)
        return self.model.forward(on_device(batch, self.pools.device), self.pools.layers)

    def _forward_there(self, batch: Batch) -> Tensor:
        return self.model.forward(batch, self.pools.layers)

    def _mark(self) -> torch.cuda.Event | float:
        """A point in time on the device."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(begun: torch.cuda.Event | float, ended: torch.cuda.Event | float) -> float:
    """Wait for `ended`; seconds between the two."""
    if isinstance(begun, float) or isinstance(ended, float):
        return float(ended) - float(begun)  # type: ignore[arg-type]
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / 1e3
