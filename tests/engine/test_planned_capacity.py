"""What the planner promises against what the allocator grants: tokens within 3 %, bytes within 1 %."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from triptych.cache.geometry import CacheGeometry, plan_capacity
from triptych.config import SHAPES, KvFormat, ModelShape
from triptych.engine.load import LoadedEngine
from triptych.engine.pools import Pools
from triptych.model.weights import WeightStore
from triptych.planner.capacity import Usage, fit, refuse_if_it_does_not_fit, snapshots_named
from triptych.planner.hardware import catalogue
from triptych.planner.layout import layout_for
from triptych.planner.models import TINY_CONFIG, of_shape

SESSION = 100_000
# nothing but the geometry of Flash and Pro: their pools are as large as the real ones would be per token
NARROW = {
    name: replace(shape, num_experts=8, moe_intermediate_size=64, vocab_size=512) for name, shape in SHAPES.items()
}


def planned_tokens(shape: ModelShape, kv_format: KvFormat, cache: int, running: int) -> float:
    """Tokens that a plan gives for a card that has `cache` bytes for slots, pages and snapshots."""
    model = of_shape("planned", shape, kv_format, None, "bfloat16")
    usage = Usage(running, 512, 65_536, 1.0)
    layout = layout_for(model, 1)
    card = replace(catalogue().devices["rtx-4090"], memory=1e12)
    memory = refuse_if_it_does_not_fit(model, replace(catalogue().node("rtx-4090"), device=card), layout, usage)
    other = memory.total - memory.cache - memory.slots
    card = replace(card, memory=other + cache)
    memory = refuse_if_it_does_not_fit(model, replace(catalogue().node("rtx-4090"), device=card), layout, usage)
    return fit(model, layout, memory.cache, snapshots_named("none", 0), SESSION).in_frames


def test_the_bundled_model_gets_the_tokens_that_were_planned(loaded: LoadedEngine) -> None:
    config, granted = loaded.config, loaded.loop.cache.capacity
    assert config.cache.kv_memory is not None
    planned = planned_tokens(loaded.shape, config.cache.kv_format, config.cache.kv_memory, config.max_running)
    assert planned == pytest.approx(granted.tokens, rel=0.03)


@pytest.mark.parametrize("kv_format", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["flash", "pro"])
def test_pools_of_the_released_geometries_hold_the_tokens_that_were_planned(name: str, kv_format: KvFormat) -> None:
    memory, running = 3 << 30, 8
    geometry = CacheGeometry.of(NARROW[name], kv_format)
    pools = Pools(NARROW[name], geometry, plan_capacity(geometry, memory, running), torch.device("cpu"))
    planned = planned_tokens(NARROW[name], kv_format, memory, running)
    assert planned == pytest.approx(pools.frames.shape[0] * 128, rel=0.03)
    assert pools.nbytes == pytest.approx(memory, rel=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_take_the_bytes_that_were_planned(dtype: str) -> None:
    for shape in (ModelShape.from_file(TINY_CONFIG), *NARROW.values()):
        store = WeightStore(shape, getattr(torch, dtype), device="meta")
        planned = of_shape("planned", shape, "float32", None, dtype).weight_bytes  # type: ignore[arg-type]
        assert planned == pytest.approx(store.nbytes, rel=0.01)
