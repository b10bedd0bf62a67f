"""What steps cost here: a few batches of every kind, and a fit through the times of their steps."""

from __future__ import annotations

import time
from typing import Literal

import numpy as np

from triptych.engine.api import Engine
from triptych.words import SamplingParams
from triptych.workload.simulate import StepCosts, amounts, fitted

# step budget, prompts, shortest, longest, tokens out
_BATCHES = (
    (512, 1, 100, 200, 8),
    (512, 16, 40, 120, 8),
    (512, 48, 20, 40, 6),
    (128, 4, 100, 700, 6),
    (64, 2, 100, 400, 4),
    (1024, 6, 300, 1200, 4),
    (256, 2, 5000, 6000, 2),
    (2048, 3, 2000, 3000, 3),
)


def measure_steps(
    model: str, clock: Literal["wall", "cpu"], device: Literal["auto", "cpu", "cuda"], *, deterministic: bool = False
) -> StepCosts:
    """Run the batches, one engine for each step budget, on random tokens. Raises what loading raises."""
    ticks = time.process_time if clock == "cpu" else time.perf_counter
    rng = np.random.default_rng(0)
    found = []
    for budget in sorted({batch[0] for batch in _BATCHES}):
        engine = Engine.load(model, step_tokens=budget, max_running=48, device=device, deterministic=deterministic)
        limit = engine.shape.vocab_size
        with engine.timed_steps(ticks) as steps:
            for _, prompts, low, high, output in (batch for batch in _BATCHES if batch[0] == budget):
                texts = [rng.integers(0, limit, int(rng.integers(low, high))).astype(np.int32) for _ in range(prompts)]
                engine.generate(texts, SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True))
        found += [(amounts(one.plan), one.seconds) for one in steps]
        engine.close()
    return fitted(found)
