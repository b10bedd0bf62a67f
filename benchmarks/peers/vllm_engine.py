"""vLLM 0.33's KV-cache planning and KVCacheManager for DeepSeek-V4, on the CPU.

Specifications come from its own layer classes, called on bare attribute holders instead of modules; groups, block size
and block counts from its own planner. Only the block hash is exchanged for a faster pure function of the tokens, on
which hits do not depend. Default retention (0), asynchronous scheduling (two chunks in flight), one GPU.
"""

from __future__ import annotations

import hashlib
from types import SimpleNamespace as Bag
from typing import Any

import numpy as np
import torch

from triptych.config import ModelShape
from triptych.workload.traces import TraceRequest

_BLOCK, _CONCURRENT, _STRIDE = 256, 2, 32


class Engine:
    """One KVCacheManager that requests pass through."""

    name = "vllm-0.33.0"

    def __init__(self, budget: int, shape: ModelShape, chunk: int, in_flight: int) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.core.kv_cache_manager import KVCacheManager

        config = _config(chunk)
        plan, scheduling, block, hash_block = _plan(budget, shape, config)
        scheduling.prefix_cache_retention_interval = 0
        self._manager = KVCacheManager(
            scheduling,
            max_model_len=config.model_config.max_model_len,
            scheduler_block_size=block,
            hash_block_size=hash_block,
            max_in_flight_tokens=config.max_in_flight_tokens,
            enable_caching=True,
        )
        self._params = SamplingParams(max_tokens=1 << 20)
        self._chunk, self._granularity, self._blocks = chunk, hash_block, plan.num_blocks
        self._stride = plan.kv_cache_tensors[0].block_stride
        self._evicted = 0
        pool = self._manager.block_pool
        evict = pool._maybe_evict_cached_block

        def counted(block: Any) -> Any:
            gone = evict(block)
            self._evicted += bool(gone)
            return gone

        pool._maybe_evict_cached_block = counted
        self._serial = 0

    def start(self, request: TraceRequest) -> Any:
        """A request with its block hashes."""
        from vllm.v1.request import Request

        self._serial += 1
        handle = Request(
            f"r{self._serial}", request.prompt.tolist(), self._params, None, arrival_time=0.0, block_hasher=self._hashes
        )
        handle.admitted_hit = None
        return handle

    def _hashes(self, request: Any) -> list[bytes]:
        """Chained hashes of the blocks of a request that have none yet."""
        size, known = self._granularity, len(request.block_hashes)
        end = request.num_tokens // size
        if end <= known:
            return []
        raw = np.asarray(request._all_token_ids[known * size : end * size], np.int32).tobytes()
        key = request.block_hashes[-1] if known else b""
        out = []
        for at in range(0, len(raw), 4 * size):
            key = hashlib.blake2b(key + raw[at : at + 4 * size], digest_size=16).digest()
            out.append(key)
        return out

    def prefill(self, request: Any) -> int | None:
        """Admit with the longest hit, then allocate chunk by chunk."""
        from vllm.v1.request import RequestStatus

        length = request.num_prompt_tokens
        if request.admitted_hit is None:
            blocks, hit, junction = self._manager.get_computed_blocks(request)
            request.shared_prefix_boundary = junction
            step = min(self._chunk, length - hit)
            taken = self._manager.allocate_slots(
                request, step, num_new_computed_tokens=hit, new_computed_blocks=blocks, full_sequence_must_fit=True
            )
            if taken is None:
                return None
            request.admitted_hit, request.status = hit, RequestStatus.RUNNING
            request.num_computed_tokens, request.num_in_flight_tokens = hit + step, step
        while request.num_computed_tokens < length:
            step = min(self._chunk, length - request.num_computed_tokens)
            if self._manager.allocate_slots(request, step) is None:
                return None
            request.num_computed_tokens += step
            request.num_in_flight_tokens = step
        return int(request.admitted_hit)

    def decode(self, request: Any, output: Any, at: int) -> int:
        """Append output in strides; afterwards nothing is in flight and only windows are kept."""
        while at < len(output):
            if request.num_tokens == request.num_computed_tokens:
                request.append_output_token_ids(output[at : at + _STRIDE].tolist())
            step = request.num_tokens - request.num_computed_tokens
            if self._manager.allocate_slots(request, step) is None:
                break
            request.num_computed_tokens += step
            request.num_in_flight_tokens = step
            at += step
        request.num_in_flight_tokens = 0
        self._manager.remove_skipped_blocks(request.request_id, request.num_computed_tokens, request.num_prompt_tokens)
        return at

    def finish(self, request: Any) -> None:
        """Its blocks become cache."""
        self._manager.free(request)

    def stats(self) -> dict[str, Any]:
        """Blocks, their bytes, evictions."""
        return {"evictions": self._evicted, "blocks": self._blocks, "peak_bytes": self._blocks * self._stride}


def _config(chunk: int) -> Any:
    from vllm.config.cache import CacheConfig

    cache = CacheConfig(block_size=_BLOCK, cache_dtype="fp8_ds_mla", enable_prefix_caching=True)
    cache.kv_cache_layout = "BLHNC"
    longest = 131072 + 65536
    return Bag(
        cache_config=cache,
        model_config=Bag(max_model_len=longest, original_max_model_len=longest, supports_kv_cache_grouping=False),
        scheduler_config=Bag(disable_hybrid_kv_cache_manager=False, max_num_batched_tokens=chunk),
        parallel_config=Bag(
            decode_context_parallel_size=1,
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            prefill_context_parallel_size=1,
        ),
        attention_config=Bag(hisparse_config=None),
        speculative_config=None,
        kv_transfer_config=None,
        num_prefill_lookahead_tokens=0,
        max_in_flight_tokens=chunk * _CONCURRENT,
        device_config=Bag(device_type="cuda"),
    )


def _specs(shape: ModelShape, config: Any) -> dict[str, Any]:
    """What each layer of this shape asks to be cached, in vLLM's own words."""
    from vllm.models.deepseek_v4.attention import DeepseekV4Attention, DeepseekV4IndexerCache
    from vllm.models.deepseek_v4.compressor import CompressorStateCache
    from vllm.v1.attention.backends.mla.sparse_swa import DeepseekV4SWACache

    def state(dim: int, ratio: int) -> Any:
        halves = 2 if ratio == 4 else 1
        holder = Bag(
            block_size=4 if ratio == 4 else 8,
            state_dim=2 * halves * dim,
            dtype=torch.float32,
            sliding_window=halves * ratio,
        )
        return CompressorStateCache.get_kv_cache_spec(holder, config)

    out, cache = {}, config.cache_config
    for layer, ratio in enumerate(shape.ratios):
        name = f"model.layers.{layer}.attn"
        if ratio == 4:
            keys = shape.index_head_dim + shape.index_head_dim // 128 * 4
            holder = Bag(cache_config=cache, head_dim=keys, dtype=torch.uint8, compress_ratio=4)
            out[f"{name}.indexer.k_cache"] = DeepseekV4IndexerCache.get_kv_cache_spec(holder, config)
            out[f"{name}.indexer.compressor.state_cache"] = state(shape.index_head_dim, ratio)
        window = Bag(
            cache_config=cache,
            bounded_replay=False,
            block_size=64,
            head_dim=shape.head_dim,
            dtype=torch.uint8,
            window_size=128,
            packed_bytes_per_token=584,
            packed_page_alignment=576,
            packed_block_stride_alignment=None,
        )
        out[f"{name}.swa_cache"] = DeepseekV4SWACache.get_kv_cache_spec(window, config)
        if ratio:
            holder = Bag(
                compress_ratio=ratio,
                kv_cache_dtype="fp8_ds_mla",
                head_dim=shape.head_dim,
                kv_cache_torch_dtype=torch.uint8,
            )
            out[name] = DeepseekV4Attention.get_kv_cache_spec(holder, config)
            out[f"{name}.compressor.state_cache"] = state(shape.head_dim, ratio)
    return out


def _plan(budget: int, shape: ModelShape, config: Any) -> tuple[Any, Any, int, int]:
    import vllm.platforms  # noqa: F401  (its import decides the platform)
    from vllm.v1.core import kv_cache_planning as planning
    from vllm.v1.core import kv_cache_utils as utils

    specs = _specs(shape, config)
    groups = planning.get_global_kv_cache_groups(config, [specs])
    plans = planning.get_kv_cache_configs(config, [specs], [budget], groups)
    scheduling = utils.generate_scheduler_kv_cache_config(plans)
    block, hash_block = utils.resolve_kv_cache_block_sizes(scheduling, config)
    return plans[0], scheduling, block, hash_block
