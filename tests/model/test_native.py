"""Native numerics: every value that the released model rounds lies on its grid, and rounding changes no logic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from triptych.cache.geometry import CacheCapacity, CacheGeometry
from triptych.checkpoint import random_tensors
from triptych.config import EngineConfig, ModelShape
from triptych.engine.pools import Pools
from triptych.engine.runner import Runner
from triptych.kernels.quant.ref import fake_quant_fp4, fake_quant_fp8
from triptych.model.weights import WeightStore
from triptych.words import Chunk, StepPlan

SHAPE = ModelShape(
    vocab_size=97, hidden_size=128, ratios=(0, 4, 128, 4), num_heads=4, head_dim=80, rope_dim=16, q_lora_rank=128,
    o_groups=2, o_lora_rank=64, index_heads=32, index_head_dim=32, index_topk=16, num_experts=4, experts_per_token=2,
    moe_intermediate_size=128, num_hash_layers=1, routed_scaling=1.5, num_mtp_layers=0, max_position=4096,
)  # fmt: skip
TOKENS = (np.random.default_rng(0).integers(0, 97, 200)).astype(np.int32)


@pytest.fixture(scope="module")
def store() -> WeightStore:
    store = WeightStore(SHAPE, mtp=False)
    for name, tensor in random_tensors(SHAPE, seed=1):
        store.place(name, tensor)
    return store


def make_runner(store: WeightStore, **options: Any) -> Runner:
    capacity = CacheCapacity(frames=4, slots=1)
    return Runner(store.weights, EngineConfig(**options), Pools(SHAPE, CacheGeometry.of(SHAPE), capacity))


def logits(runner: Runner, sizes: list[int]) -> Tensor:
    """Logits of all TOKENS run in chunks of the given sizes, the last one repeated."""
    out, at, steps = [], 0, iter(sizes)
    size = 1
    while at < len(TOKENS):
        size = next(steps, size)
        end = min(at + size, len(TOKENS))
        pages = np.arange(-(-end // 128), dtype=np.int32)
        out.append(runner.all_logits(StepPlan(0, (Chunk("r", 0, at, end, TOKENS[at:end], pages, at, samples=True),))))
        at = end
    return torch.cat(out)


@pytest.mark.parametrize("sizes", [[1], [3], [127], [128, 1, 4]])
def test_chunking_does_not_change_a_bit(store: WeightStore, sizes: list[int]) -> None:
    whole = logits(make_runner(store, numerics="native", deterministic=True), [200])
    assert torch.equal(logits(make_runner(store, numerics="native", deterministic=True), sizes), whole)


def test_rounding_is_small_but_there(store: WeightStore) -> None:
    exact = logits(make_runner(store), [200])
    native = logits(make_runner(store, numerics="native"), [200])
    assert not torch.equal(exact, native)
    closeness = torch.nn.functional.cosine_similarity(exact, native)
    assert closeness.median() > 0.97


def test_compiled_and_reference_kernels_agree(store: WeightStore) -> None:
    fast = logits(make_runner(store, numerics="native"), [200])
    slow = logits(make_runner(store, numerics="native", kernel_backend="ref"), [200])
    # sums differ in their last bits, so in time a value beside a rounding boundary falls to the other side
    assert torch.allclose(fast[:4], slow[:4], atol=1e-3)
    assert torch.nn.functional.cosine_similarity(fast, slow).median() > 0.99


def _spied(runner: Runner) -> Iterator[tuple[str, Callable[..., Any]]]:
    kernels = runner.model.kernels
    for field in dataclasses.fields(kernels):
        yield field.name, getattr(kernels, field.name)


def test_inputs_lie_on_their_grids(store: WeightStore) -> None:
    runner = make_runner(store, numerics="native")
    weights = store.weights
    seen: dict[str, list[tuple[Any, ...]]] = {}

    def spy(name: str, right: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            seen.setdefault(name, []).append((arguments[0].clone(), *arguments[1:]))  # some work in place
            return right(*arguments)

        return call

    spied = dataclasses.replace(runner.model.kernels, **{name: spy(name, right) for name, right in _spied(runner)})
    runner.model.use_kernels(spied)
    logits(runner, [200])

    def on_fp8_grid(x: Tensor, group: int) -> bool:
        return torch.equal(fake_quant_fp8(x, group), x)

    matrices = {w.data_ptr() for layer in weights.layers for w in (layer.attention.query, layer.attention.o_b)}
    inputs = [x for x, weight in seen["linear"] if weight.data_ptr() in matrices]
    assert len(inputs) == 2 * SHAPE.num_layers
    assert all(on_fp8_grid(x, 128) for x in inputs)
    assert all(on_fp8_grid(arguments[0], 128) for arguments in seen["experts"] + seen["shared_expert"])
    assert all(on_fp8_grid(arguments[0][:, :-16], 64) for arguments in seen["window_rows"])
    assert all(torch.equal(x.bfloat16().float(), x) for x, *_ in seen["mhc_pre"])
    queries = [arguments[0] for arguments in seen["select_entries"]]
    assert queries and all(torch.equal(fake_quant_fp4(q, 32), q) for q in queries)
    router_inputs = [arguments[0] for arguments in seen["route"]]
    assert not all(on_fp8_grid(x, 128) for x in router_inputs), "the router reads unquantised activations"
    pools = runner.pools
    for layer, ratio in enumerate(SHAPE.ratios):
        entries = pools.layers[layer].entries
        if ratio:
            assert entries is not None
            pages = entries[:1].flatten(0, 1)
            assert on_fp8_grid(pages[:, :-16], 64)
        keys = pools.layers[layer].index_keys
        if keys is not None:
            assert torch.equal(fake_quant_fp4(keys[:1], 32), keys[:1])
