"""Runs the engine's Runner on hand-made plans: any chunking, any mix of sequences, pages in no particular order.

Every pool starts as NaN, so that whoever reads a row or an entry that was never written spoils its logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from v4_choices import Arbiter
from v4_reference import Reference, as_numpy

from triptych.cache.geometry import CacheCapacity, CacheGeometry
from triptych.checkpoint import CheckpointReader
from triptych.config import PAGE, EngineConfig
from triptych.engine.pools import Pools
from triptych.engine.runner import Runner
from triptych.kernels.registry import select
from triptych.model.transformer import Transformer
from triptych.model.weights import ModelWeights, WeightStore
from triptych.words import Chunk, StepPlan

Span = tuple[int, int, int]
"""(sequence, start, end): the rows that a sequence runs in one step."""


def load(directory: Path) -> ModelWeights:
    """The weights of a checkpoint in float32."""
    reader = CheckpointReader(directory)
    store = WeightStore(reader.shape, torch.float32, mtp=False)
    for name, tensor in reader.tensors():
        store.place(name, tensor)
    assert store.missing() == []
    return store.weights


class Driver:
    """One Runner and a trivial allocator. Sequence i runs `texts[i]`, or what `feed` says.

    With a `reference`, every choice of a kernel is held against it; texts[i] is then its text `rows[i]` (or i).
    """

    def __init__(
        self,
        weights: ModelWeights,
        texts: Sequence[Tensor],
        *,
        config: EngineConfig | None = None,
        reference: Reference | None = None,
        rows: Sequence[int] | None = None,
    ) -> None:
        config = config or EngineConfig()
        self.texts = [as_numpy(text) for text in texts]
        self._rows = rows or range(len(texts))
        pages = sum(len(text) // PAGE + 2 for text in texts)  # one to spare for tokens fed later
        capacity = CacheCapacity(frames=pages, slots=len(texts) + 1)
        geometry = CacheGeometry.of(weights.shape, "float32")
        pools = Pools(weights.shape, geometry, capacity)
        _poison(pools)
        self.runner = Runner(weights, config, pools)
        rng = np.random.default_rng(5)
        self._free = rng.permutation(capacity.frames).tolist()
        self._slots = rng.permutation(capacity.slots).tolist()
        self._pages: list[list[int]] = [[] for _ in texts]
        self._arbiter = Arbiter(reference) if reference is not None else None
        if self._arbiter is not None:
            kernels = select(config.kernel_backend, deterministic=config.deterministic)
            self.runner.model = Transformer(weights, self._arbiter.watch(kernels), config.numerics)
        self._step = 0

    def feed(self, sequence: int, token: int) -> None:
        """Append a token to a sequence's text."""
        self.texts[sequence] = np.append(self.texts[sequence], np.int32(token))

    def step(self, *spans: Span) -> list[Tensor]:
        """Run the spans in one step; logits [rows, V] of each."""
        plan = StepPlan(self._step, tuple(self._chunk(*span) for span in spans))
        self._begin(*spans)
        logits = self.runner.all_logits(plan)
        return list(logits.split([end - start for _, start, end in spans]))

    def _begin(self, *spans: Span) -> None:
        self._step += 1
        if self._arbiter is not None:
            seq = torch.cat([torch.full((end - start,), self._rows[s]) for s, start, end in spans])
            self._arbiter.begin(seq, torch.cat([torch.arange(start, end) for _, start, end in spans]))

    def sampled(self, *spans: Span) -> Tensor:
        """As `step`, but only the last row's logits of each span [len(spans), V], the way the engine asks for them."""
        plan = StepPlan(self._step, tuple(self._chunk(*span) for span in spans))
        self._step += 1
        return self.runner.logits(plan)

    def scored(self, sequence: int, start: int, end: int) -> Tensor:
        """As `step`, but only log-probabilities and ranks [rows, 2] of the tokens that follow the rows."""
        targets = self.texts[sequence][start + 1 : end + 1]
        chunk = replace(self._chunk(sequence, start, end), samples=False, targets=targets)
        self._begin((sequence, start, end))
        flight = self.runner.start(StepPlan(self._step, (chunk,)), [])
        assert flight.finish()[0] == [] and flight.scores is not None
        return torch.from_numpy(flight.scores.by_request()[chunk.request_id])

    def _chunk(self, sequence: int, start: int, end: int) -> Chunk:
        pages = self._pages[sequence]
        while len(pages) * PAGE < end:
            pages.append(self._free.pop())
        return Chunk(
            request_id=f"sequence {sequence}",
            slot=self._slots[sequence],
            start=start,
            end=end,
            tokens=self.texts[sequence][start:end],
            pages=np.asarray(pages, np.int32),
            write_from=start,
            samples=True,
        )


def _poison(pools: Pools) -> None:
    for value in vars(pools).values():
        if isinstance(value, Tensor):
            value.fill_(float("nan"))
