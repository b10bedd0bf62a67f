"""The GPU's runner: graphs give the tokens of eager steps, sampling on the device those of the host, in any company."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_answers import greedy, random_engine, same, text
from test_gpu_engine import NARROW_FLASH

from triptych.engine import load as loading
from triptych.engine.api import Engine
from triptych.engine.device_sampler import Draw
from triptych.engine.pools import Pools
from triptych.engine.runner import DeviceRunner, Flight, Runner
from triptych.engine.sampler import sample
from triptych.words import FinishReason, Request, SamplingParams, StepPlan

OPTIONS: dict[str, Any] = {
    **{"device": "cuda", "max_running": 2, "step_tokens": 256, "kv_memory": 256 << 20, "max_context": 2400},
}
NATIVE = {"numerics": "native", "weight_dtype": "released", "kv_format": "fp8"}
PROMPTS = [text(NARROW_FLASH, i, n) for i, n in enumerate((1, 5, 127, 129, 600, 2300, 128, 4))]


class Eager(DeviceRunner):
    """Runs what graphs would hold step by step."""

    def __init__(self, weights: Any, config: Any, geometry: Any, capacity: Any) -> None:
        pools = Pools(weights.shape, geometry, capacity, weights.embed.device, spare=1)
        super().__init__(weights, config, pools, capture=False)


class HostSampled(Eager):
    """Samples on the host."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.depth = 0

    def start(self, plan: StepPlan, draws: Sequence[Draw], ready: Callable[[], None] = lambda: None) -> Flight:
        """The step without its last part, and that on the host."""
        flight = super().start(plan, draws, ready)
        _, seconds = flight.finish()
        if flight.logits is None:
            return replace(flight, finish=lambda: ([], seconds))
        drawn = sample(flight.logits, [draw.state for draw in draws])
        return replace(flight, finish=lambda: (drawn, seconds))


def plain(weights: Any, config: Any, geometry: Any, capacity: Any) -> Runner:
    """The general path for every row."""
    return Runner(weights, config, Pools(weights.shape, geometry, capacity, weights.embed.device, spare=1))


def with_runner(patch: pytest.MonkeyPatch, runner: Any, **options: Any) -> Engine:
    """An engine whose steps another runner runs."""
    with patch.context() as patched:
        patched.setattr(loading, "_runner", runner)
        return random_engine(NARROW_FLASH, **OPTIONS, **options)


def test_graphs_give_the_tokens_of_eager_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = random_engine(NARROW_FLASH, **OPTIONS, **NATIVE)
    got = engine.generate(PROMPTS, greedy(20))
    engine.check_integrity()
    want = with_runner(monkeypatch, Eager, **NATIVE).generate(PROMPTS, greedy(20))
    assert [one.token_ids for one in got] == [one.token_ids for one in want]


def test_graphs_give_the_tokens_of_the_general_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 but for the caches, whose attention rounds its weights: random weights make 0.04 nats of that."""
    engine = random_engine(NARROW_FLASH, **OPTIONS, kv_format="bfloat16")
    got = engine.generate(PROMPTS, greedy(20))
    engine.check_integrity()
    want = with_runner(monkeypatch, plain, kv_format="bfloat16").generate(PROMPTS, greedy(20, logprobs=2))
    same(got, want, near=0.1)


def test_drawn_tokens_are_those_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(
        temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, max_tokens=20, ignore_eos=True, seed=7,
        repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.1, logit_bias={5: 2.0}, logprobs=3,
    )  # fmt: skip
    # one prompt at a time: a step later or earlier in a batch of other size sums in another order
    engine, host = random_engine(NARROW_FLASH, **OPTIONS, **NATIVE), with_runner(monkeypatch, HostSampled, **NATIVE)
    for prompt in PROMPTS:
        [got], [want] = engine.generate([prompt], params), host.generate([prompt], params)
        assert got.token_ids == want.token_ids
        for one, other in zip(got.logprobs, want.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
    engine.reset_cache()
    [again] = engine.generate(PROMPTS[3:4], replace(params, logprobs=None))
    host.reset_cache()
    [want] = host.generate(PROMPTS[3:4], replace(params, logprobs=None))
    assert again.token_ids == want.token_ids


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


@pytest.mark.parametrize("graphs", (False, True), ids=("deterministic", "graphs"))
def test_tiers_bring_back_the_same_tokens(tmp_path: Path, graphs: bool) -> None:
    """To the bit where nothing depends on how rows were cut; else only near-ties may turn over."""
    options = {"kv_format": "bfloat16"} if graphs else NATIVE | {"deterministic": True}
    wide = 2 if graphs else 1
    tiers = {"host_memory": wide * 64 << 20, "disk": str(tmp_path), "kv_memory": wide * 9 << 20}
    engine = random_engine(NARROW_FLASH, **(OPTIONS | tiers), **options)
    prompts = [text(NARROW_FLASH, 50 + i, 2200) for i in range(12)]
    first = [engine.generate([prompt], greedy(8, logprobs=2))[0] for prompt in prompts]
    engine._loop.settle(20.0)
    engine.check_integrity()
    for prompt, want in zip(prompts, first, strict=True):
        [got] = engine.generate([prompt], greedy(8, logprobs=2))
        if not graphs:
            assert (got.token_ids, got.logprobs) == (want.token_ids, want.logprobs)
        else:
            same([got], [want], near=0.02)
    engine.check_integrity()
    stats = engine._loop.stats().cache
    print({name: value for name, value in stats.items() if "bytes" in name or "fetch" in name})
    assert stats.get("host_bytes_in", 0) > 0 and stats.get("host_bytes_out", 0) > 0 and stats["fetches_failed"] == 0
