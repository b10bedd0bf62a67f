"""Executes a StepPlan: restore snapshots, build the Batch, run the model, sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from triptych.cache.geometry import LOOKBACK
from triptych.config import EngineConfig
from triptych.engine.batching import build_batch
from triptych.engine.device import kind_of, on_device
from triptych.engine.pools import Pools
from triptych.kernels.registry import select
from triptych.model.transformer import Transformer
from triptych.model.weights import ModelWeights
from triptych.words import SlotSave, StepPlan


class Runner:
    """One device's worth of model and caches. Holds no request state: plans carry all of it."""

    def __init__(self, weights: ModelWeights, config: EngineConfig, pools: Pools) -> None:
        kernels = select(config.kernel_backend, deterministic=config.deterministic, device=kind_of(pools.device))
        self.model = Transformer(weights, kernels, config.numerics)
        self.pools = pools

    def logits(self, plan: StepPlan) -> Tensor:
        """Logits [S, V] float32 of the chunks that sample, in plan order."""
        return self._forward(plan, all_logits=False)

    def all_logits(self, plan: StepPlan) -> Tensor:
        """Logits [R, V] of every row of the plan, for tests."""
        return self._forward(plan, all_logits=True)

    def save(self, saves: Sequence[SlotSave]) -> None:
        """Copy window rows out of slots."""
        for save in saves:
            self.pools.save(save.slot, save.position, save.frames)

    def _forward(self, plan: StepPlan, *, all_logits: bool) -> Tensor:
        with torch.inference_mode():
            self.save(plan.saves)
            for chunk in plan.chunks:
                if chunk.restore is not None:
                    self.pools.restore(chunk.slot, chunk.start + LOOKBACK, chunk.restore)
            batch = on_device(build_batch(plan.chunks, self.pools, all_logits=all_logits), self.pools.device)
            return self.model.forward(batch, self.pools.layers)
