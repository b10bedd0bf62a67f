"""Models and caches for benchmarks, made on the GPU from random bytes: their values do not matter, their sizes do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from triptych.cache.geometry import CacheGeometry
from triptych.config import PAGE, SHAPES, CacheConfig, EngineConfig, ModelShape
from triptych.engine.pools import Pools
from triptych.kernels.quant.formats import PackedRows
from triptych.model.weights import ModelWeights, WeightStore, in_tiles
from triptych.words import Chunk, StepPlan

RELEASED_CACHE = {"kv_format": "fp8"}


def shape_of(name: str, layers: int) -> ModelShape:
    """The first `layers` layers of "flash" or "pro", as in reference/gpu-baseline.md."""
    whole = SHAPES[name]
    return replace(whole, ratios=whole.ratios[:layers], num_mtp_layers=0)


def config_of(context: int, batch: int, **options: object) -> EngineConfig:
    """An engine for decoding `batch` rows of up to `context` tokens, in the released formats."""
    given: dict[str, object] = {
        **{"device": "cuda", "numerics": "native", "weight_dtype": "released", "max_running": batch},
        **{"max_context": context, "step_tokens": max(8192, batch), **RELEASED_CACHE, **options},
    }
    return EngineConfig.from_options(**given)


def released_weights(shape: ModelShape, device: str = "cuda", *, tiles: bool = True) -> ModelWeights:
    """Random weights in the released formats; a product of normed inputs comes out near unit size.

    `tiles`: on a GPU as usual kernels read them, which those of deterministic mode do not.
    """
    store = WeightStore(shape, "released", mtp=False, device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, target in store._targets.items():
        _fill(name, target.values, target.scales, shape, generator)
    return in_tiles(store.weights) if device == "cuda" and tiles else store.weights


def _fill(name: str, values: Tensor, scales: Tensor | None, shape: ModelShape, generator: torch.Generator) -> None:
    """Random values of one tensor and the scales that bring rows of it near unit length."""
    width = values.shape[-1]
    if values.dtype == torch.int64:
        values.random_(0, shape.num_experts, generator=generator)
        # experts of a token are distinct
        values.copy_((values[:, :1] + torch.arange(values.shape[1], device=values.device) * 41) % shape.num_experts)
    elif values.dtype == torch.uint8:
        _bytes(values, generator)
        assert scales is not None
        scales.fill_(127 - round(math.log2(2.5 * math.sqrt(2 * width))))
    elif values.dtype == torch.float8_e4m3fn:
        whole = values.view(torch.uint8)
        _bytes(whole, generator)
        whole &= 0b10001111
        whole |= 0b00110000  # 0.5 to 1.9, of either sign
        assert scales is not None
        scales.fill_(2.0 ** -round(math.log2(math.sqrt(width))))
    elif name.endswith(("norm.weight", "_scale")):
        values.fill_(1.0)
    elif values.dim() < 2 or name.endswith(("ape", "_base")):
        values.normal_(generator=generator).mul_(0.1)
    else:
        values.normal_(generator=generator).mul_(width**-0.5 if name != "embed.weight" else 1.0)


def _bytes(values: Tensor, generator: torch.Generator) -> None:
    for some in values.split(max(1, (1 << 28) // max(1, values[0].numel()))):
        some.random_(0, 256, generator=generator)


def fill_pools(pools: Pools) -> None:
    """Rows that could be there: small packed values under scales of one, small dense ones."""
    generator = torch.Generator(pools.device).manual_seed(1)
    for value in vars(pools).values():
        if isinstance(value, Tensor) and value.dtype.is_floating_point:
            value.normal_(generator=generator)
    for cache in pools.layers:
        for rows in (cache.entries, cache.index_keys, cache.window):
            if isinstance(rows, PackedRows):
                _fill_packed(rows, generator)


def _fill_packed(rows: PackedRows, generator: torch.Generator) -> None:
    form = rows.format
    for page in range(0, rows.values.shape[0], 4096):
        values, scales = rows.values[page : page + 4096], rows.scales[page : page + 4096]
        made = torch.randn(values[..., 0].numel(), form.dim, device=values.device, generator=generator)
        packed, factors = form.pack(made)
        values.copy_(packed.view(values.shape))
        scales.copy_(factors.view(scales.shape))


def tables(batch: int, pages: int, frames: int) -> list[np.ndarray]:
    """A page table for each request, scattered over the frames."""
    return [((np.arange(pages) * 7919 + slot * pages) % frames).astype(np.int32) for slot in range(batch)]


def decode_plan(number: int, contexts: Sequence[int], lines: Sequence[np.ndarray], vocab: int) -> StepPlan:
    """One row for each request at the end of its context, of a random token."""
    random = np.random.default_rng(number)
    chunks = []
    for slot, context in enumerate(contexts):
        tokens = random.integers(2, vocab, 1).astype(np.int32)
        chunks.append(Chunk(f"r{slot}", slot, context, context + 1, tokens, lines[slot], context, samples=True))
    return StepPlan(number, tuple(chunks))


def geometry_of(shape: ModelShape, cache: CacheConfig) -> CacheGeometry:
    """The geometry that an engine would have."""
    return CacheGeometry.of(shape, cache.kv_format, cache.index_format)


def pages_of(tokens: int) -> int:
    """Pages that hold `tokens`."""
    return -(-tokens // PAGE)
