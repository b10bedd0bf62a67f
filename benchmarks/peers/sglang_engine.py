"""SGLang 0.5.23's UnifiedRadixCache (FULL and SWA components) for DeepSeek-V4, on the CPU.

Pool sizes come from its own configurator with swa_full_tokens_ratio 0.1, the best of the ratios tried; tree, paged
allocator, eviction and locks are its own code. The KV pool is hollow: it would only store bytes.
"""

from __future__ import annotations

from array import array
from types import SimpleNamespace as Bag
from typing import Any

from benchmarks.peers import stubs
from triptych.config import ModelShape
from triptych.workload.traces import TraceRequest

_PAGE, _WINDOW, _RATIO = 256, 128, 0.1
_CONTEXT = 262144


def _boot(in_flight: int, chunk: int) -> None:
    import transformers.image_utils  # noqa: F401  (before torchvision becomes a shell)

    stubs.install(["torchvision", "sgl_kernel", "flashinfer", "deep_gemm", "vllm", "cutlass"])
    from sglang.srt.runtime_context import get_context

    get_context().override_server_args(
        page_size=_PAGE,
        chunked_prefill_size=chunk,
        max_running_requests=in_flight,
        device="cpu",
        swa_full_tokens_ratio=_RATIO,
    ).install()


def _pool_sizes(budget: int, shape: ModelShape, in_flight: int, chunk: int) -> dict[str, int]:
    """Tokens of both pools, as its planner divides the budget."""
    from sglang.srt.mem_cache import deepseek_v4_memory_pool as pool
    from sglang.srt.model_executor import pool_configurator as planner

    execution = Bag(
        kernel=Bag(dsv4_attn_backend="flashmla", enable_deepseek_v4_fp4_indexer=False),
        features=Bag(enable_encoder_swa_bounded_replay=False),
    )
    schedule = Bag(
        max_running_requests=in_flight,
        chunked_prefill_size=chunk,
        swa_prefix_tails=None,
        disable_overlap_schedule=False,
        swa_full_tokens_ratio=_RATIO,
        _swa_full_tokens_ratio_explicitly_set=True,
    )
    kept = planner.get_exec, planner.get_schedule, pool.get_exec
    planner.get_exec = pool.get_exec = lambda: execution
    planner.get_schedule = lambda: schedule
    try:
        model = Bag(
            qk_nope_head_dim=shape.head_dim - shape.rope_dim,
            qk_rope_head_dim=shape.rope_dim,
            index_head_dim=shape.index_head_dim,
            context_len=shape.max_position,
            compress_ratios=list(shape.ratios),
            window_size=_WINDOW,
            hf_config=Bag(kv_source_layer_ids=[]),
        )
        cache = Bag(
            kv_cache_dtype_str="fp8_e4m3",
            model_config=model,
            layer_info=Bag(start_layer=0, end_layer=shape.num_layers),
            pp_size=1,
            attn_dp_size=1,
            sliding_window_size=_WINDOW,
            page_size=_PAGE,
            spec_algorithm=Bag(is_dspark=lambda: False, is_none=lambda: True, is_eagle=lambda: False),
        )
        sizes = planner.DSV4PoolConfigurator(cache).calculate_pool_sizes(budget, _PAGE)
    finally:
        planner.get_exec, planner.get_schedule, pool.get_exec = kept
    return {"full_tokens": sizes.full_max_total_num_tokens, "swa_tokens": sizes.swa_max_total_num_tokens}


class Engine:
    """One radix cache that requests pass through."""

    name = "sglang-0.5.23"

    def __init__(self, budget: int, shape: ModelShape, chunk: int, in_flight: int) -> None:
        _boot(in_flight, chunk)
        self._sizes = _pool_sizes(budget, shape, in_flight, chunk)
        import torch
        from sglang.srt.managers import schedule_batch
        from sglang.srt.mem_cache import allocation, common
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
        from sglang.srt.sampling.sampling_params import SamplingParams

        torch.set_num_threads(1)
        self._torch, self._allocation, self._common = torch, allocation, common
        self._batch, self._component, self._params = schedule_batch, ComponentType, SamplingParams
        self._budget, self._chunk, self._serial, self._evicted = budget, chunk, 0, [0, 0]
        self._build(in_flight, chunk)

    def _build(self, in_flight: int, chunk: int) -> None:
        from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
        from sglang.srt.mem_cache.base_swa_memory_pool import BaseSWAKVPool
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        class Hollow(BaseSWAKVPool):  # type: ignore[misc, unused-ignore]
            def __init__(self) -> None:
                self.full_kv_pool = self.swa_kv_pool = None

            def register_mapping(self, mapping: Any) -> None:
                self.full_to_swa_index_mapping = mapping

            def translate_loc_from_full_to_swa(self, index: Any) -> Any:
                return self.full_to_swa_index_mapping[index]

        Hollow.__abstractmethods__ = frozenset()
        self._requests = ReqToTokenPool(in_flight, _CONTEXT, "cpu", False)
        sizes, torch = self._sizes, self._torch
        self._pool = SWATokenToKVPoolAllocator(
            sizes["full_tokens"], sizes["swa_tokens"], _PAGE, torch.uint8, "cpu", Hollow(), False, self._requests
        )
        for part in (self._pool.full_attn_allocator, self._pool.swa_attn_allocator):
            part.use_triton_kernels = False
        self._tree = UnifiedRadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=self._requests,
                token_to_kv_pool_allocator=self._pool,
                page_size=_PAGE,
                eviction_policy="lru",
                chunked_prefill_size=chunk,
                sliding_window_size=_WINDOW,
                tree_components=(self._component.FULL, self._component.SWA),
                tree_core_backend=None,
            )
        )
        evict = self._tree._evict

        def counted(*args: Any, **more: Any) -> Any:
            gone = evict(*args, **more)
            self._evicted[0] += gone.num_tokens_evicted
            self._evicted[1] += gone.swa_num_tokens_evicted
            return gone

        self._tree._evict = counted

    def start(self, request: TraceRequest) -> Any:
        """Its request object."""
        self._serial += 1
        params = self._params(max_new_tokens=len(request.output) + 1)
        handle = self._batch.Req(f"r{self._serial}", "", array("q", request.prompt.tolist()), params)
        handle.admitted = False
        return handle

    def _fits(self, full: int, swa: int) -> bool:
        """Free and evictable room in both pools, as its scheduler asks."""
        tree, pool = self._tree, self._pool
        return bool(
            full <= pool.full_available_size() + tree.full_evictable_size()
            and swa <= pool.swa_available_size() + tree.swa_evictable_size()
        )

    def _extend(self, request: Any, low: int, high: int) -> None:
        torch = self._torch
        before, after = torch.tensor([low]), torch.tensor([high])
        row = self._requests.req_to_token[request.kv.req_pool_idx]
        last = row[low - 1 : low].to(torch.int64) if low else torch.full((1,), -1, dtype=torch.int64)
        places = self._allocation.alloc_paged_token_slots_extend(
            tree_cache=self._tree,
            prefix_lens=before,
            prefix_lens_cpu=before,
            seq_lens=after,
            seq_lens_cpu=after,
            last_loc=last,
            extend_num_tokens=high - low,
        )
        row[low:high] = (places[0] if isinstance(places, tuple) else places).to(torch.int32)
        request.kv.kv_allocated_len = request.kv.kv_committed_len = high

    def prefill(self, request: Any) -> int | None:
        """Match, lock, admit; then extend chunk by chunk, each chunk leaving its checkpoint."""
        length = len(request.origin_input_ids)
        if not request.admitted and not self._admit(request, length):
            return None
        while request.position < length:
            high = min(length, request.position + self._chunk)
            room = high - request.position + _PAGE
            if not self._fits(room, room):
                return None
            request.extend_end = high
            self._extend(request, request.position, high)
            self._common.checkpoint_kv_cache(request, self._tree)
            request.position = high
        request.decoded = 0
        return int(request.hit)

    def _admit(self, request: Any, length: int) -> bool:
        request.init_next_round_input(self._tree)
        hit = request.prefix_len
        lock = self._tree.lock(request.last_node)
        new = length - hit
        fits = self._fits(-(-new // _PAGE) * _PAGE + _PAGE, min(self._chunk, new) + 2 * _PAGE)
        if not fits or self._requests.available_size() <= 0:
            self._tree.unlock(lock)
            return False
        request.lock = lock
        self._requests.alloc([request])
        held = self._tree.prefix_device_indices(request)[:hit]
        self._requests.req_to_token[request.kv.req_pool_idx, :hit] = held.to(self._torch.int32)
        request.kv.cache_protected_len = request.kv.kv_committed_len = request.kv.kv_allocated_len = hit
        request.admitted, request.hit, request.position = True, hit, hit
        return True

    def decode(self, request: Any, output: Any, at: int) -> int:
        """One allocation per page crossed, windows freed as its scheduler does."""
        prompt = len(request.origin_input_ids)
        while at < len(output):
            low = prompt + at
            high = min(prompt + len(output), (low // _PAGE + 1) * _PAGE)
            if not self._fits(2 * _PAGE, 2 * _PAGE):
                break
            if low - 1 - _WINDOW >= request.kv.get_evicted_seqlen(self._component.SWA) + 128:
                self._tree.evict_sliding_windows(request, low - 1)
            if request.decoded >= _WINDOW:
                self._tree.release_swa_prefix_lock(request)
            self._extend(request, low, high)
            request.output_ids.extend(output[at : at + high - low].tolist())
            request.decoded += high - low
            at += high - low
        return at

    def finish(self, request: Any) -> None:
        """Its pages become cache."""
        if not request.admitted:
            return
        from sglang.srt.managers.schedule_batch import FINISH_LENGTH

        request.finished_reason = FINISH_LENGTH(len(request.output_ids))
        self._common.release_kv_cache(request, self._tree, checkpoint=True)

    def stats(self) -> dict[str, Any]:
        """Pool sizes and what was evicted."""
        return {"evicted_full_tokens": self._evicted[0], "evicted_swa_tokens": self._evicted[1], **self._sizes}
