"""Whole engines: the GPU gives the processor's greedy tokens, whatever way the prompt came into the cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gpu_answers import LIKELY, NATIVE, greedy, random_engine, same, text

from triptych.config import CSA_LAYER, HCA_LAYER, SHAPES, SWA_LAYER, ModelShape
from triptych.engine.api import Engine
from triptych.errors import ConfigError

OPTIONS: dict[str, Any] = {"max_running": 8, "step_tokens": 256}
# true head sizes and top-k of V4-Flash, but few layers, experts and a narrow residual stream
NARROW_FLASH = replace(
    SHAPES["flash"],
    vocab_size=1024,
    hidden_size=256,
    ratios=(SWA_LAYER, CSA_LAYER, HCA_LAYER, CSA_LAYER),
    q_lora_rank=128,
    o_lora_rank=64,
    num_experts=8,
    experts_per_token=2,
    moe_intermediate_size=128,
    num_hash_layers=1,
    num_mtp_layers=0,
)
LONG = np.arange(1700, dtype=np.int32) * 7 % 3900 + 50


def _pair(shape: ModelShape | None, **options: Any) -> tuple[Engine, Engine]:
    """The same engine on the processor and on the GPU."""
    both = []
    for device in ("cpu", "cuda"):
        given = OPTIONS | options | {"device": device, "kv_memory": 512 << 20}
        both.append(Engine.load("tiny", **given) if shape is None else random_engine(shape, **given))
    return both[0], both[1]


@pytest.mark.parametrize("policy", ("adaptive", "none"))
def test_tiny_gives_the_same_tokens_cold_together_and_resumed(policy: str) -> None:
    cpu, gpu = _pair(None, policy=policy)
    prompts = [LONG[:n] for n in (1, 5, 127, 129, 600, 1700)]
    want = cpu.generate(prompts, greedy(24, logprobs=2))
    same(gpu.generate(prompts, greedy(24)), want)
    longer = [np.concatenate([LONG, LONG[:77]])]
    want = cpu.generate(longer, greedy(24, logprobs=2))
    got = gpu.generate(longer, greedy(24))
    same(got, want)
    # with snapshots the resume is one; without any the windows are rebuilt by a trapezoid
    assert got[0].usage.cached_tokens == want[0].usage.cached_tokens
    assert got[0].usage.cached_tokens > 0 or got[0].usage.recomputed_tokens > 0
    assert got[0].usage.resume == want[0].usage.resume
    gpu.check_integrity()


def test_tiny_samples_with_penalties_and_logprobs() -> None:
    cpu, gpu = _pair(None)
    [want] = cpu.generate([LONG[:300]], greedy(8, logprobs=3))
    [got] = gpu.generate([LONG[:300]], greedy(8, logprobs=3))
    same([got], [want])
    for one, other in zip(got.logprobs, want.logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
    [drawn] = gpu.generate([LONG[:300]], replace(greedy(8), temperature=0.8, seed=5, repetition_penalty=1.2))
    assert len(drawn.token_ids) == 8


@pytest.mark.parametrize("deterministic", (False, True))
def test_tiny_scores_prompts(deterministic: bool) -> None:
    cpu, gpu = _pair(None, deterministic=deterministic)
    gpu.generate([LONG[:500]], greedy(4))  # what is cached runs again
    params = replace(greedy(4), prompt_logprobs=3)
    prompts = [LONG[:n] for n in (1, 2, 33, 640, 1700)]
    for got, want in zip(gpu.generate(prompts, params), cpu.generate(prompts, params), strict=True):
        assert len(got.prompt_logprobs) == len(want.prompt_logprobs) and got.prompt_logprobs[0] is None
        for one, other in zip(got.prompt_logprobs[1:], want.prompt_logprobs[1:], strict=True):
            assert one is not None and other is not None and one.token_id == other.token_id
            assert one.logprob == pytest.approx(other.logprob, abs=2e-3)
            assert [p for _, p in one.top] == pytest.approx([p for _, p in other.top], abs=2e-3)
    gpu.check_integrity()


def test_native_numerics_give_the_same_tokens() -> None:
    cpu, gpu = _pair(None, numerics="native")
    prompts = [LONG[:130], LONG[:700]]
    same(gpu.generate(prompts, greedy(12)), cpu.generate(prompts, greedy(12, logprobs=LIKELY)), near=NATIVE)


def test_flash_heads_give_the_same_tokens() -> None:
    cpu, gpu = _pair(NARROW_FLASH)
    prompt = text(NARROW_FLASH, 1, 2300)  # 575 entries: the indexer leaves some out
    want = cpu.generate([prompt], greedy(12, logprobs=2))
    got = gpu.generate([prompt], greedy(12))
    same(got, want)
    [again] = gpu.generate([prompt], greedy(12))
    assert again.usage.resume == "snapshot" and again.usage.cached_tokens > 2000
    same([again], want)


def test_a_bfloat16_cache_and_bfloat16_weights_run() -> None:
    engine = random_engine(NARROW_FLASH, **OPTIONS, device="cuda", kv_format="bfloat16", kv_memory=512 << 20)
    prompt = text(NARROW_FLASH, 1, 2600)
    [first] = engine.generate([prompt], greedy(12))
    [again] = engine.generate([prompt], greedy(12))
    assert again.token_ids == first.token_ids


def test_what_does_not_run_on_a_gpu_says_so() -> None:
    with pytest.raises(ConfigError, match="Deterministic mode needs the triton kernels"):
        Engine.load("tiny", device="cuda", deterministic=True, kernel_backend="ref")
    with pytest.raises(ConfigError, match="cpu kernels run on the processor"):
        Engine.load("tiny", device="cuda", kernel_backend="cpu")
