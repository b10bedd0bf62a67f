"""What a prefill chunk adds to memory exists for one layer at a time."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from small_engine import SHAPE, SmallEngine, text


def test_window_rows_of_a_chunk_live_for_one_layer() -> None:
    """The rows of the layer before are gone when the next layer makes its own."""
    engine = SmallEngine(step_tokens=1000)
    model, alive, most, made = engine.loop.model, [], 0, []
    make = model.kernels.window_rows

    def watched(*args: Any) -> torch.Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        rows = make(*args)
        alive.append(weakref.ref(rows))
        made.append(len(rows))
        return rows

    model.use_kernels(replace(model.kernels, window_rows=watched))
    engine.ask(text(1, 900), 1)
    assert made[: SHAPE.num_layers] == [900] * SHAPE.num_layers
    assert most == 0, "window rows of a layer outlive it"


def test_no_pool_depends_on_the_chunk() -> None:
    sizes = {steps: SmallEngine(step_tokens=steps).loop._runner.pools.nbytes for steps in (64, 4096)}
    assert len(set(sizes.values())) == 1
