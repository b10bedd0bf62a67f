"""Every spelling of every tensor leads to its official name."""

from __future__ import annotations

from dataclasses import replace

import pytest
from checkpoint_files import SMALL
from hypothesis import given
from hypothesis import strategies as st

from triptych.checkpoint.names import FUSED, fused_name, official_name, transformers_name
from triptych.checkpoint.table import tensor_table
from triptych.config import SHAPES

TABLE = tensor_table(replace(SMALL, num_experts=12))
NAMES = [name for spec in TABLE.values() for name in (spec.name, spec.scale_name) if name]
BACKBONE = [name for name in NAMES if not name.startswith("mtp.") and fused_name(name) is None]


@pytest.mark.parametrize("name", [name for name in NAMES if "experts.1." not in name])
def test_official_spellings(name: str) -> None:
    assert official_name(name) == name
    assert official_name("model." + name) == name
    other = name.replace(".attn.", ".self_attn.").replace(".ffn.", ".mlp.")
    other = other.replace("gate.bias", "gate.e_score_correction_bias")
    if name.endswith(".scale"):
        other = other.removesuffix("scale") + "weight_scale_inv"
    assert official_name("model." + other) == name


@pytest.mark.parametrize("name", BACKBONE)
def test_transformers_spellings(name: str) -> None:
    theirs = transformers_name(name)
    assert official_name(theirs) == name
    assert official_name(theirs.removeprefix("model.")) == name, "without a head the prefix is absent"
    assert official_name(theirs.replace("kv_norm", "norm")) == name, "as save_pretrained writes it"


def test_no_two_tensors_share_a_name() -> None:
    assert len({transformers_name(name) for name in BACKBONE}) == len(BACKBONE)
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize(
    ("official", "theirs"),
    [
        ("embed.weight", "model.embed_tokens.weight"),
        ("head.weight", "lm_head.weight"),
        ("hc_head_fn", "model.hc_head.hc_fn"),
        ("layers.7.hc_attn_scale", "model.layers.7.attn_hc.scale"),
        ("layers.7.attn.wo_a.scale", "model.layers.7.self_attn.o_a_proj.weight_scale_inv"),
        ("layers.7.attn.attn_sink", "model.layers.7.self_attn.sinks"),
        ("layers.7.attn.compressor.ape", "model.layers.7.self_attn.compressor.position_bias"),
        ("layers.7.attn.indexer.compressor.norm.weight", "model.layers.7.self_attn.compressor.indexer.kv_norm.weight"),
        ("layers.7.attn.indexer.wq_b.weight", "model.layers.7.self_attn.compressor.indexer.q_b_proj.weight"),
        ("layers.7.ffn.gate.bias", "model.layers.7.mlp.gate.e_score_correction_bias"),
        ("layers.7.ffn.shared_experts.w3.weight", "model.layers.7.mlp.shared_experts.up_proj.weight"),
    ],
)
def test_spellings_of_the_reference(official: str, theirs: str) -> None:
    assert transformers_name(official) == theirs
    assert official_name(theirs) == official


def test_experts_are_stacked_gate_first() -> None:
    stack = "model.layers.3.mlp.experts.gate_up_proj"
    assert fused_name("layers.3.ffn.experts.7.w1.weight") == (stack, 7, 0, 2)
    assert fused_name("layers.3.ffn.experts.7.w3.scale") == (stack + "_scale_inv", 7, 1, 2)
    assert fused_name("layers.3.ffn.experts.0.w2.weight") == ("model.layers.3.mlp.experts.down_proj", 0, 0, 1)
    assert fused_name("layers.3.ffn.shared_experts.w2.weight") is None
    for fused in FUSED:
        assert official_name(f"model.layers.3.{fused}") == f"layers.3.{fused}"


def test_flash_has_the_names_of_the_reference() -> None:
    table = tensor_table(SHAPES["flash"])
    expected = {
        "embed.weight": (129280, 4096),
        "hc_head_fn": (4, 16384),
        "layers.0.hc_attn_fn": (24, 16384),
        "layers.0.attn.wq_b.weight": (32768, 1024),
        "layers.0.attn.wo_a.weight": (8192, 4096),
        "layers.0.ffn.gate.tid2eid": (129280, 6),
        "layers.2.attn.compressor.wkv.weight": (1024, 4096),
        "layers.2.attn.compressor.ape": (4, 1024),
        "layers.3.attn.compressor.wgate.weight": (512, 4096),
        "layers.3.attn.compressor.ape": (128, 512),
        "layers.2.attn.indexer.wq_b.weight": (8192, 1024),
        "layers.2.attn.indexer.compressor.wkv.weight": (256, 4096),
        "layers.2.attn.indexer.compressor.ape": (4, 256),
        "layers.3.ffn.gate.bias": (256,),
        "layers.42.ffn.experts.255.w2.weight": (4096, 2048),
        "mtp.0.e_proj.weight": (4096, 4096),
        "mtp.0.ffn.gate.bias": (256,),
        "mtp.0.hc_head_scale": (1,),
    }
    assert {name: table[name].shape for name in expected} == expected
    for absent in ("layers.0.attn.compressor.wkv.weight", "layers.3.attn.indexer.wq_b.weight", "layers.2.ffn.gate.bias",
                   "layers.3.ffn.gate.tid2eid", "mtp.0.attn.compressor.wkv.weight", "mtp.1.e_proj.weight"):  # fmt: skip
        assert absent not in table


@given(st.text(max_size=40))
def test_unknown_names_do_no_harm(name: str) -> None:
    assert isinstance(official_name(name), str)
