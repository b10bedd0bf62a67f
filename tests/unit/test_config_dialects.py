"""config.json in both dialects: read, written, and refused in one sentence when it is of another model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.config import SHAPES, CacheConfig, ModelShape, Yarn, read_config
from triptych.errors import ConfigError

FLASH, PRO = SHAPES["flash"], SHAPES["pro"]

# the keys of the released V4-Flash config.json that matter, as published
FLASH_JSON: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "vocab_size": 129280,
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "sliding_window": 128,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 2048,
    "num_hash_layers": 3,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hidden_act": "silu",
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 65536,
    },
    "max_position_embeddings": 1048576,
    "num_nextn_predict_layers": 1,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
    "expert_dtype": "fp4",
}


def changed(**changes: Any) -> dict[str, Any]:
    """FLASH_JSON with some keys changed; None takes a key away."""
    return {key: value for key, value in (FLASH_JSON | changes).items() if value is not None}


def test_the_released_config_is_the_named_shape() -> None:
    assert ModelShape.from_dict(FLASH_JSON) == FLASH


def test_released_layer_kinds() -> None:
    assert (FLASH.num_layers, len(FLASH.csa_layers), len(FLASH.hca_layers)) == (43, 21, 20)
    assert FLASH.csa_layers == tuple(range(2, 43, 2)) and FLASH.hca_layers == tuple(range(3, 43, 2))
    assert (PRO.num_layers, len(PRO.csa_layers), len(PRO.hca_layers)) == (61, 30, 31)
    assert PRO.csa_layers == tuple(range(2, 61, 2)) and PRO.hca_layers == (0, 1, *range(3, 61, 2))


def test_the_mtp_block_never_routes_by_token_id() -> None:
    shallow = replace(FLASH, ratios=(0, 4), num_hash_layers=3)
    assert [shallow.is_hash_layer(layer) for layer in range(3)] == [True, True, False]


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    """Shapes with every field away from its default."""

    def number(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    def real(low: float, high: float) -> float:
        return draw(st.floats(low, high, allow_nan=False))

    groups, rope = number(1, 4), 2 * number(1, 64)
    experts = number(2, 16)
    layers = draw(st.lists(st.sampled_from([0, 4, 128]), min_size=1, max_size=9))
    yarn = Yarn(real(1, 64), real(8, 64), real(0.5, 4), number(64, 9999)) if draw(st.booleans()) else None
    return ModelShape(
        vocab_size=number(2, 999),
        hidden_size=number(1, 999),
        ratios=tuple(layers),
        num_heads=groups * number(1, 8),
        head_dim=rope + number(0, 400),
        rope_dim=rope,
        q_lora_rank=number(1, 99),
        o_groups=groups,
        o_lora_rank=number(1, 99),
        index_heads=number(1, 64),
        index_head_dim=rope + number(0, 64),
        index_topk=number(1, 999),
        num_experts=experts,
        experts_per_token=number(1, experts),
        moe_intermediate_size=number(1, 999),
        num_hash_layers=number(0, len(layers)),
        routed_scaling=real(0.1, 9),
        swiglu_limit=real(0.1, 99),
        num_mtp_layers=number(0, 2),
        hc_mult=number(1, 8),
        hc_sinkhorn_iters=number(1, 30),
        hc_eps=real(1e-9, 1e-3),
        norm_eps=real(1e-9, 1e-3),
        rope_theta=real(10, 1e6),
        compress_rope_theta=real(10, 1e6),
        yarn=yarn,
        max_position=number(1, 2**20),
        bos_id=number(0, 99),
        eos_ids=tuple(draw(st.lists(st.integers(0, 99), min_size=1, max_size=3))),
    )


@given(shapes())
def test_both_dialects_carry_every_field(shape: ModelShape) -> None:
    for written in (shape.to_dict(), shape.to_transformers_dict()):
        assert ModelShape.from_dict(json.loads(json.dumps(written))) == shape


@given(shapes())
def test_transformers_will_find_the_rope_width(shape: ModelShape) -> None:
    """It takes int(head_dim * factor), which falls short for factors like 30/44 rounded down."""
    written = shape.to_transformers_dict()
    assert int(shape.head_dim * written["partial_rotary_factor"]) == shape.rope_dim


def test_rope_width_from_the_factor_alone() -> None:
    raw = FLASH.to_transformers_dict()
    del raw["qk_rope_head_dim"]
    assert ModelShape.from_dict(raw) == FLASH
    del raw["partial_rotary_factor"]  # it is in rope_parameters.main too
    assert ModelShape.from_dict(raw) == FLASH


def test_the_extra_entries_of_compress_ratios_are_mtp_blocks() -> None:
    assert ModelShape.from_dict(changed(compress_ratios=[0, 0, *[4, 128] * 20, 4])) == FLASH


def test_flat_rope_parameters() -> None:
    yarn = {"rope_type": "yarn", **FLASH_JSON["rope_scaling"]}
    assert ModelShape.from_dict(changed(rope_scaling=None, rope_parameters=yarn)) == FLASH


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "deepseek_v3"}, "model_type 'deepseek_v3' is not deepseek_v4; only DeepSeek-V4 is served."),
        ({"head_dim": None}, "lacks 'head_dim'."),
        ({"head_dim": "512"}, "head_dim must be an integer of at least 1, not '512'."),
        ({"hidden_size": 0}, "hidden_size must be an integer of at least 1, not 0."),
        ({"num_attention_heads": True}, "num_attention_heads must be an integer of at least 1, not True."),
        ({"num_hidden_layers": "43"}, "num_hidden_layers must be a positive integer, not '43'."),
        ({"num_hidden_layers": 60}, "44 layer kinds for 60 layers."),
        ({"compress_ratios": None}, "has neither 'compress_ratios' nor 'layer_types'."),
        ({"compress_ratios": 4}, "compress_ratios is 4, but must be a list."),
        ({"compress_ratios": [0, 8] * 22}, "compress_ratios holds 8; only 0, 4 and 128 exist."),
        ({"compress_ratios": [4.0] * 44}, "compress_ratios holds 4.0; only 0, 4 and 128 exist."),
        ({"layer_types": ["full_attention"] * 43}, "unknown kind 'full_attention' in layer_types."),
        ({"mlp_layer_types": ["moe", "hash_moe"] * 22}, "hash_moe layers must come first in mlp_layer_types."),
        ({"mlp_layer_types": ["dense"] * 43}, "unknown kind 'dense' in mlp_layer_types. Known: hash_moe, moe."),
        ({"compress_rates": {"compressed_sparse_attention": 8}}, "'compressed_sparse_attention': 8; only ratios 4"),
        ({"sliding_window": 4096}, "sliding_window is 4096, but DeepSeek-V4 has 128."),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax', but DeepSeek-V4 has 'sqrtsoftplus'."),
        ({"n_shared_experts": 2}, "n_shared_experts is 2, but DeepSeek-V4 has 1."),
        ({"o_groups": 7}, "num_attention_heads 64 is no multiple of o_groups 7."),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim 63 must be even and fit head_dim and index_head_dim."),
        ({"qk_rope_head_dim": None}, "has neither 'qk_rope_head_dim' nor a number 'partial_rotary_factor'."),
        ({"num_experts_per_tok": 300}, "num_experts_per_tok 300 exceeds n_routed_experts 256."),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be a positive number, not 0.0."),
        ({"hc_eps": float("nan")}, "hc_eps must be a positive number, not nan."),
        ({"swiglu_limit": float("inf")}, "swiglu_limit must be a positive number, not inf."),
        ({"eos_token_id": "end"}, "eos_token_id must be a token id or a list of them, not ['end']."),
        ({"num_hash_layers": "few"}, "num_hash_layers must be an integer of at least 0, not 'few'."),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', but must be a JSON object."),
        (
            {"rope_scaling": {"type": "linear"}},
            "rope type 'linear' is not known; DeepSeek-V4 uses 'yarn' or 'default'.",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 0}}, "yarn factor must be a positive number, not 0."),
        ({"rope_scaling": {"type": "yarn", "attention_factor": 1.3}}, "yarn has attention_factor 1.3"),
        ({"rope_parameters": {"compress": {}, "main": {"rope_type": "yarn"}}}, "rope_parameters.main is 'yarn'"),
    ],
)
def test_what_is_wrong_is_named_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelShape.from_dict(changed(**changes), source="the/config.json")
    message = str(caught.value)
    assert sentence in message and message.startswith("the/config.json")
    assert "\n" not in message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*sorted(FLASH_JSON), "layer_types", "rope_parameters"]), JSON, max_size=3))
def test_any_garbage_is_a_config_error_or_a_shape(garbage: dict[str, Any]) -> None:
    try:
        shape = ModelShape.from_dict(FLASH_JSON | garbage)
    except ConfigError as error:
        assert str(error)
    else:
        assert ModelShape.from_dict(shape.to_dict()) == shape


def test_files_that_are_no_config(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ConfigError, match=r"There is no config\.json in"):
        read_config(path)
    for content in (b"{", b"\xff\xfe", b"[1]"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"cannot be read as JSON|holds no JSON object"):
            read_config(path)
    path.write_text(json.dumps(FLASH_JSON), encoding="utf-8")
    assert ModelShape.from_file(path) == FLASH


def test_a_canary_would_report_what_bounded_allows() -> None:
    with pytest.raises(ConfigError, match="bounded"):
        CacheConfig(policy="bounded", canary=0.1)
