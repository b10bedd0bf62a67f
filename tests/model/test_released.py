"""Weights kept as released give the tokens of the same weights in float32, and take the bytes of the files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from triptych import tiny
from triptych.checkpoint import CheckpointReader, write_checkpoint
from triptych.checkpoint.sizes import backbone, stored_bytes
from triptych.config import SHAPES
from triptych.engine.api import Engine
from triptych.errors import ConfigError
from triptych.kernels.quant.matrices import Fp8Matrix, FrontMatrix, Mxfp4Matrix
from triptych.model.weights import WeightStore
from triptych.tiny.shape import TINY_SHAPE
from triptych.words import SamplingParams

PARAMS = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
PROMPTS = [np.arange(n, dtype=np.int32) * 5 % 900 + 30 for n in (3, 130, 400)]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled checkpoint in FP8 and MXFP4."""
    directory = tmp_path_factory.mktemp("released") / "fp8"
    reader = CheckpointReader(tiny.ensure_checkpoint())
    write_checkpoint(directory, reader.shape, reader.tensors(show_progress=False), weights="fp8")
    return directory


def test_released_weights_give_the_tokens_of_their_values(released: Path) -> None:
    options = {"kv_memory": 64 << 20, "max_running": 4, "numerics": "native", "device": "cpu"}
    want = Engine.load(released, **options).generate(PROMPTS, PARAMS)
    got = Engine.load(released, weight_dtype="released", **options).generate(PROMPTS, PARAMS)
    assert [out.token_ids for out in got] == [out.token_ids for out in want]


def test_exact_numerics_refuse_released_weights(released: Path) -> None:
    with pytest.raises(ConfigError, match="Released weights"):
        Engine.load(released, weight_dtype="released", kv_memory=64 << 20, device="cpu")


def test_what_is_stored_is_kept_bit_for_bit(released: Path) -> None:
    reader = CheckpointReader(released)
    store = WeightStore(reader.shape, "released")
    for raw in reader.raw_tensors():
        store.place(raw.spec.name, raw.data, raw.scale)
    values = dict(reader.tensors(show_progress=False))
    layer = store.weights.layers[2]
    front, experts = layer.attention.front, layer.moe.experts
    assert isinstance(front, FrontMatrix) and isinstance(experts.w13, Mxfp4Matrix)
    assert isinstance(layer.attention.o_a, Fp8Matrix)
    s, at = reader.shape, "layers.2."
    latent = torch.cat([values[at + "attn.wq_a.weight"], values[at + "attn.wkv.weight"]])
    assert torch.equal(front.latent.dequantize(), latent)
    assert torch.equal(layer.attention.o_a.dequantize().flatten(0, 1), values[at + "attn.wo_a.weight"])
    both = torch.cat([values[at + f"ffn.experts.1.w{n}.weight"] for n in (1, 3)])
    assert torch.equal(experts.w13.one(1).dequantize(), both)
    assert experts.w2.shape == (s.num_experts, s.hidden_size, s.moe_intermediate_size)


def test_experts_in_tiles_are_overwritten_in_tiles(released: Path) -> None:
    reader = CheckpointReader(released)
    store = WeightStore(reader.shape, "released", mtp=reader.has_mtp)
    other = store.blank()
    for raw in reader.raw_tensors():
        other.place(raw.spec.name, raw.data, raw.scale)
        store.place(raw.spec.name, raw.data.flip(0), None if raw.scale is None else raw.scale.flip(0))
    store.put_in_tiles()
    mine, theirs = store.weights.layers[1].moe.experts.w13, other.weights.layers[1].moe.experts.w13
    assert isinstance(mine, Mxfp4Matrix) and isinstance(theirs, Mxfp4Matrix) and mine.tops is not None
    assert not torch.equal(mine.one(0).dequantize(), theirs.one(0).dequantize())
    store.overwrite(other)
    assert torch.equal(mine.dequantize(), theirs.dequantize())


def test_released_bytes_are_those_of_the_files() -> None:
    shape = replace(SHAPES["flash"], num_mtp_layers=0)
    kept = WeightStore(shape, "released", device="meta").nbytes
    assert kept == pytest.approx(stored_bytes(backbone(shape), "fp8"), rel=2e-3)  # the router is kept in float32


def test_sizes_that_share_a_scale_block_are_refused() -> None:
    with pytest.raises(ConfigError, match="q_lora_rank 96"):
        WeightStore(replace(TINY_SHAPE, q_lora_rank=96), "released", device="meta")
