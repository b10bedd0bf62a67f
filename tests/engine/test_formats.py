"""One checkpoint in every format and naming: the engine says the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from triptych.checkpoint import CheckpointReader, synthesize, write_checkpoint
from triptych.config import ModelShape
from triptych.engine.api import Engine, Output
from triptych.errors import CheckpointError
from triptych.words import SamplingParams

SHAPE = ModelShape(
    vocab_size=97, hidden_size=96, ratios=(0, 4, 128, 4), num_heads=4, head_dim=32, rope_dim=8, q_lora_rank=48,
    o_groups=2, o_lora_rank=24, index_heads=32, index_head_dim=16, index_topk=16, num_experts=4, experts_per_token=2,
    moe_intermediate_size=64, num_hash_layers=1, routed_scaling=1.5, num_mtp_layers=1, max_position=4096,
)  # fmt: skip
PROMPTS = [np.arange(n, dtype=np.int32) * 5 % 97 for n in (3, 130, 400)]
PARAMS = SamplingParams(max_tokens=16, temperature=0.0, logprobs=4, ignore_eos=True)


def answers(directory: Path) -> list[Output]:
    return Engine.load(directory, kv_memory=16 << 20, max_running=4).generate(PROMPTS, PARAMS)


@pytest.mark.parametrize("dialect", ["official", "transformers"])
def test_fp8_and_mxfp4_equal_their_bf16_twin(tmp_path: Path, dialect: str) -> None:
    synthesize(tmp_path / "fp8", SHAPE, dialect="official", weights="fp8", seed=3)
    values = CheckpointReader(tmp_path / "fp8").tensors()
    write_checkpoint(tmp_path / "twin", SHAPE, values, weights="bf16", dialect=dialect)  # type: ignore[arg-type]
    for one, other in zip(answers(tmp_path / "fp8"), answers(tmp_path / "twin"), strict=True):
        assert one.token_ids == other.token_ids and one.logprobs == other.logprobs


def test_a_checkpoint_without_tokenizer_takes_token_ids_only(tmp_path: Path) -> None:
    synthesize(tmp_path / "ids", SHAPE, weights="bf16", seed=3)
    engine = Engine.load(tmp_path / "ids", kv_memory=16 << 20, max_running=4)
    [out] = engine.generate([[1, 2, 3]], PARAMS)
    assert out.text == "" and len(out.token_ids) == 16
    with pytest.raises(Exception, match=r"tokenizer\.json"):
        engine.generate(["text"], PARAMS)


def test_a_damaged_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    synthesize(tmp_path / "bad", SHAPE, weights="bf16", seed=3)
    [shard] = (tmp_path / "bad").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=shard.name):
        Engine.load(tmp_path / "bad", kv_memory=16 << 20, max_running=4)


@pytest.mark.parametrize("index_format", ["mxfp4", "float32"])
def test_native_numerics_lose_nothing_in_fp8_caches(tmp_path: Path, index_format: str) -> None:
    """Native values lie on the grids of FP8 entries and MXFP4 keys already, so the bits of every answer agree."""
    shape = replace(SHAPE, index_head_dim=32)
    synthesize(tmp_path / "model", shape, weights="bf16", seed=3)
    options = {"kv_memory": 16 << 20, "max_running": 4, "numerics": "native"}
    wide = Engine.load(tmp_path / "model", **options).generate(PROMPTS, PARAMS)
    narrow = Engine.load(tmp_path / "model", **options, kv_format="fp8", index_format=index_format)
    for one, other in zip(wide, narrow.generate(PROMPTS, PARAMS), strict=True):
        assert one.token_ids == other.token_ids and one.logprobs == other.logprobs
