"""Checkpoints go back and forth between Triptych and Transformers without losing a bit or a name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from triptych.checkpoint import CheckpointReader, random_tensors, synthesize
from triptych.checkpoint.names import fused_name, transformers_name
from triptych.config import ModelShape, Yarn

pytestmark = pytest.mark.oracle

SHAPE = ModelShape(
    vocab_size=96,
    hidden_size=64,
    ratios=(0, 4, 128, 4),
    num_heads=4,
    head_dim=48,
    rope_dim=16,
    q_lora_rank=32,
    o_groups=2,
    o_lora_rank=24,
    index_heads=6,
    index_head_dim=32,
    index_topk=8,
    num_experts=4,
    experts_per_token=2,
    moe_intermediate_size=32,
    num_hash_layers=2,
    routed_scaling=2.5,
    swiglu_limit=7.0,
    rope_theta=5000.0,
    compress_rope_theta=80000.0,
    yarn=Yarn(factor=8.0, beta_fast=16.0, beta_slow=2.0, original_max_position=512),
    max_position=4096,
    bos_id=3,
    eos_ids=(5,),
)


def load_hf(directory: Path) -> tuple[DeepseekV4ForCausalLM, dict[str, Any]]:
    """Transformers' model of a directory in float32, and what it says about names."""
    model, info = DeepseekV4ForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    return model, info


def in_transformers(name: str, state: dict[str, Tensor]) -> Tensor:
    """The values that Transformers holds for an official name."""
    place = fused_name(name)
    if place is None:
        return state[transformers_name(name)]
    stack, expert, part, parts = place
    return state[stack][expert].chunk(parts)[part]


@pytest.mark.parametrize("dialect", ["transformers", "official"])
@pytest.mark.parametrize("yarn", [True, False])
def test_transformers_loads_what_we_write(tmp_path: Path, dialect: Any, yarn: bool) -> None:
    shape = SHAPE if yarn else replace(SHAPE, yarn=None)
    synthesize(tmp_path, shape, dialect=dialect, weights="fp32", seed=7, max_shard_bytes=200_000)
    model, info = load_hf(tmp_path)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(key.startswith("mtp.") for key in info["unexpected_keys"])
    state = model.state_dict()
    expected = {name: t for name, t in random_tensors(shape, 7) if not name.startswith("mtp.")}
    assert sum(t.numel() for t in state.values()) == sum(t.numel() for t in expected.values())
    for name, tensor in expected.items():
        assert torch.equal(in_transformers(name, state), tensor), name


@pytest.mark.parametrize("dialect", ["transformers", "official"])
def test_transformers_understands_our_config(tmp_path: Path, dialect: Any) -> None:
    synthesize(tmp_path, SHAPE, dialect=dialect, weights="fp32")
    config = load_hf(tmp_path)[0].config
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    assert config.layer_types == [kinds[ratio] for ratio in SHAPE.ratios]
    assert config.mlp_layer_types == ["hash_moe", "hash_moe", "moe", "moe"]
    assert config.qk_rope_head_dim == 16
    assert config.rope_parameters["main"]["rope_theta"] == 5000.0
    compress = config.rope_parameters["compress"]
    assert (compress["rope_type"], compress["rope_theta"], compress["factor"]) == ("yarn", 80000.0, 8.0)
    assert (compress["beta_fast"], compress["beta_slow"]) == (16.0, 2.0)
    assert (compress["original_max_position_embeddings"], compress["attention_factor"]) == (512, 1.0)
    assert (config.swiglu_limit, config.routed_scaling_factor) == (7.0, 2.5)
    assert (config.bos_token_id, config.eos_token_id) == (3, 5)


@pytest.mark.parametrize("dialect", ["transformers", "official"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_we_load_what_transformers_saves(tmp_path: Path, dialect: Any, dtype: torch.dtype) -> None:
    """It saves in names that depend on those it loaded."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    synthesize(ours, SHAPE, dialect=dialect, weights="fp32", seed=3)
    DeepseekV4ForCausalLM.from_pretrained(ours, dtype=dtype).save_pretrained(theirs, max_shard_size="300KB")
    reader = CheckpointReader(theirs)
    assert len(reader.files) > 1
    assert reader.shape == SHAPE
    assert not reader.has_mtp
    loaded = dict(reader.tensors())
    expected = {name: t for name, t in random_tensors(SHAPE, 3) if not name.startswith("mtp.")}
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        if not torch.equal(loaded[name], tensor):
            assert dtype == torch.bfloat16 and torch.equal(loaded[name], tensor.bfloat16().float()), name


@pytest.mark.parametrize(
    ("dialect", "spelling"),
    [("transformers", "model.layers.0.self_attn.norm.weight"), ("official", "model.layers.0.attn.norm.weight")],
)
def test_the_kv_norm_is_saved_under_an_odd_name(tmp_path: Path, dialect: Any, spelling: str) -> None:
    """Transformers 5.23 writes `norm` for `kv_norm`; when this changes, names.py can forget that spelling."""
    synthesize(tmp_path / "ours", SHAPE, dialect=dialect, weights="fp32")
    load_hf(tmp_path / "ours")[0].save_pretrained(tmp_path / "theirs")
    with safe_open(tmp_path / "theirs" / "model.safetensors", "pt") as file:
        assert spelling in file.keys()  # noqa: SIM118


def test_module_names_of_transformers_are_known(tmp_path: Path) -> None:
    """A state dict written as it is, with stacked experts: what other exporters produce."""
    synthesize(tmp_path, SHAPE, dialect="transformers", weights="fp32", seed=5)
    state = load_hf(tmp_path)[0].state_dict()
    with safe_open(next(tmp_path.glob("*.safetensors")), "pt") as file:
        assert set(file.keys()) == set(state)
