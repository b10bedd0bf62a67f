"""The GPU's runner: graphs give the tokens of eager steps, sampling on the device those of the host, in any company."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_answers import greedy, random_engine, text
from test_gpu_engine import NARROW_FLASH

from triptych.engine import load as loading
from triptych.engine.api import Engine
from triptych.engine.pools import Pools
from triptych.engine.runner import Runner
from triptych.words import FinishReason, Request, SamplingParams

OPTIONS: dict[str, Any] = {
    **{"device": "cuda", "max_running": 2, "step_tokens": 256, "kv_memory": 256 << 20, "max_context": 2400},
}
NATIVE = {"numerics": "native", "weight_dtype": "released", "kv_format": "fp8"}
PROMPTS = [text(NARROW_FLASH, i, n) for i, n in enumerate((1, 5, 127, 129, 600, 2300, 128, 4))]


def _eager(weights: Any, config: Any, geometry: Any, capacity: Any) -> Runner:
    return Runner(weights, config, Pools(weights.shape, geometry, capacity, weights.embed.device, spare=1))


def _plain(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Engine:
    """An engine that runs every step at once and samples on the host."""
    with monkeypatch.context() as patch:
        patch.setattr(loading, "_runner", _eager)
        return random_engine(NARROW_FLASH, **OPTIONS, **options)


@pytest.mark.parametrize("options", (NATIVE, {}), ids=("native", "exact"))
def test_graphs_give_the_tokens_of_eager_steps(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    engine = random_engine(NARROW_FLASH, **OPTIONS, **options)
    got = engine.generate(PROMPTS, greedy(20))
    engine.check_integrity()
    want = _plain(monkeypatch, **options).generate(PROMPTS, greedy(20, logprobs=2))
    near = 0.1 if options else 1e-3
    equal = 0
    for one, other in zip(got, want, strict=True):
        same = [a == b for a, b in zip(one.token_ids, other.token_ids, strict=True)]
        equal += all(same)
        if not all(same):
            at = same.index(False)
            best, second = other.logprobs[at].top
            print(f"token {at}: gap {best[1] - second[1]:.3g} nats")
            assert best[1] - second[1] < near
    assert equal >= (4 if options else 7)


def test_drawn_tokens_are_those_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(
        temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, max_tokens=20, ignore_eos=True, seed=7,
        repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.1, logit_bias={5: 2.0}, logprobs=3,
    )  # fmt: skip
    got = random_engine(NARROW_FLASH, **OPTIONS, **NATIVE).generate(PROMPTS, params)
    want = _plain(monkeypatch, **NATIVE).generate(PROMPTS, params)
    assert sum(a.token_ids == b.token_ids for a, b in zip(got, want, strict=True)) >= 4
    [again] = random_engine(NARROW_FLASH, **OPTIONS, **NATIVE).generate(PROMPTS[3:4], replace(params, logprobs=None))
    assert again.token_ids == got[3].token_ids


def test_an_abort_while_its_rows_run_leaves_nothing_behind() -> None:
    engine = random_engine(NARROW_FLASH, **OPTIONS, **NATIVE)
    [want] = engine.generate([PROMPTS[5]], greedy(10))
    engine.reset_cache()
    loop = engine._loop
    for after in (1, 4, 11):
        loop.add(Request("r", np.asarray(PROMPTS[5]), greedy(30)))
        for _ in range(after):
            loop.step()
        loop.finish("r", FinishReason.ABORT)
        while loop.busy:
            loop.step()
        engine.check_integrity()
        [got] = engine.generate([PROMPTS[5]], greedy(10))
        assert got.token_ids == want.token_ids


def test_tiers_bring_back_the_same_tokens(tmp_path: Path) -> None:
    tiers = {"host_memory": 64 << 20, "disk": str(tmp_path), "kv_memory": 24 << 20}
    engine = random_engine(NARROW_FLASH, **(OPTIONS | tiers), **NATIVE)
    prompts = [text(NARROW_FLASH, 50 + i, 2200) for i in range(12)]
    first = [engine.generate([prompt], greedy(8))[0] for prompt in prompts]
    engine._loop.settle(20.0)
    engine.check_integrity()
    for prompt, want in zip(prompts, first, strict=True):
        [got] = engine.generate([prompt], greedy(8))
        assert got.token_ids == want.token_ids
    engine.check_integrity()
    stats = engine._loop.stats().cache
    print({name: value for name, value in stats.items() if "bytes" in name or "fetch" in name})
    assert stats["host_bytes_in"] > 0 and stats["host_bytes_out"] > 0 and stats["fetches_failed"] == 0
