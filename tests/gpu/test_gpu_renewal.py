"""New weights in a running engine on the GPU: recorded decode graphs and derived copies follow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from gpu_answers import LIKELY, NATIVE, NEAR_TIE, greedy, random_engine, same, text
from test_gpu_engine import NARROW_FLASH
from torch import Tensor

from triptych.checkpoint import CheckpointReader, random_tensors
from triptych.config import ModelShape
from triptych.engine.api import Engine
from triptych.errors import CheckpointError
from triptych.kernels.gpu import is_hopper
from triptych.tiny.bundle import ensure_checkpoint
from triptych.words import SamplingParams

OPTIONS: dict[str, Any] = {
    **{"max_running": 4, "step_tokens": 256, "max_context": 2048},
    **{"kv_memory": 256 << 20, "device": "cuda"},
}
LONG = np.arange(700, dtype=np.int32) * 7 % 3900 + 50


def tensors(shape: ModelShape, seed: int) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, tensor) for name, tensor in random_tensors(shape, seed) if not name.startswith("mtp."))


@pytest.mark.parametrize("options", [{}, {"numerics": "native"}], ids=str)
def test_tiny_is_as_if_loaded_with_its_new_weights(options: dict[str, Any]) -> None:
    """With native numerics streams are bf16, and so is a copy of the embedding that decode graphs read."""
    before = dict(CheckpointReader(ensure_checkpoint()).tensors(show_progress=False))
    rng = torch.Generator().manual_seed(0)
    after = {
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=rng) if tensor.is_floating_point() else tensor
        for name, tensor in before.items()
    }
    cpu = Engine.load("tiny", **(OPTIONS | options | {"device": "cpu"}))
    gpu = Engine.load("tiny", **(OPTIONS | options))
    prompts = [LONG, LONG[:130]]
    old = gpu.generate(prompts, greedy(16))
    cpu.update_weights(after.items())
    gpu.update_weights((name, tensor.cuda()) for name, tensor in after.items())
    near = NATIVE if options else NEAR_TIE
    want = cpu.generate(prompts, greedy(16, logprobs=LIKELY if options else 2))
    got = gpu.generate(prompts, greedy(16))
    same(got, want, near)
    assert [out.token_ids for out in got] != [out.token_ids for out in old]
    assert got[0].usage.cached_tokens == 0
    same(gpu.generate(prompts, greedy(16)), want, near)
    gpu.update_weights(before.items())
    fresh = Engine.load("tiny", **(OPTIONS | options))
    same(gpu.generate(prompts, greedy(16)), fresh.generate(prompts, greedy(16, logprobs=2)))
    with pytest.raises(CheckpointError, match="lacks tensor"):
        gpu.update_weights(list(after.items())[5:])
    gpu.check_integrity()


@pytest.mark.parametrize("form", ["bfloat16", "released"])
def test_flash_heads_in_every_form_of_weights(form: str) -> None:
    if form == "released" and not is_hopper(torch.device("cuda", 0)):
        pytest.skip("released weights need a GPU of compute capability 9.0")
    options = OPTIONS | {"weight_dtype": form, "numerics": "native"}
    prompts = [text(NARROW_FLASH, 1, 900), text(NARROW_FLASH, 2, 40)]
    engine = random_engine(NARROW_FLASH, **options)
    old = engine.generate(prompts, greedy(12))
    engine.update_weights(tensors(NARROW_FLASH, 1))
    want = random_engine(NARROW_FLASH, seed=1, **options).generate(prompts, greedy(12, logprobs=2))
    got = engine.generate(prompts, greedy(12))
    assert [out.token_ids for out in got] != [out.token_ids for out in old]
    same(got, want)


def test_in_deterministic_mode_it_is_so_to_the_bit() -> None:
    """Samples of a group, after an update, alone and in company, are those of an engine that began with the weights."""
    options = OPTIONS | {"deterministic": True}
    engine = Engine.load("tiny", **options)
    after = {
        name: tensor.flip(0) if name.endswith("attn.wq_b.weight") else tensor
        for name, tensor in CheckpointReader(ensure_checkpoint()).tensors(show_progress=False)
    }
    draws = SamplingParams(max_tokens=12, n=3, seed=3, logprobs=1, ignore_eos=True)
    engine.generate([LONG, LONG[:130]], draws)
    engine.update_weights(after.items())
    together = engine.generate([LONG, LONG[:130]], draws)
    fresh = Engine.load("tiny", **(options | {"max_running": 1, "prefix_cache": False}))
    fresh.update_weights(after.items())
    alone = [out for prompt in (LONG, LONG[:130]) for out in fresh.generate([prompt], draws)]
    for got, want in zip(together, alone, strict=True):
        assert (got.token_ids, got.logprobs) == (want.token_ids, want.logprobs)
