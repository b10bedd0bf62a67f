"""The configurations that the oracle tests compare, and their checkpoints: every weight random, read by both sides.

The files hold Transformers' own parameter names. `index_heads` is never below 32: with few heads all of them are often
negative at once, scores are exactly zero, and which of the equal entries is taken is an accident of the implementation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM


@dataclass(frozen=True)
class OracleConfig:
    """One random model and the text it is run on: `sequences` prompts of `prompt` tokens, 64 greedy tokens after each.

    `lengths` are prefilled in one shot, each followed by a few decoded tokens: the boundaries of the layer kinds.
    """

    name: str
    ratios: tuple[int, ...]
    prompt: int
    sequences: int
    seed: int
    lengths: tuple[int, ...]
    shape: dict[str, Any] = field(default_factory=dict)

    def hf(self) -> DeepseekV4Config:
        """The Transformers configuration."""
        return DeepseekV4Config(
            **(_BASE | self.shape), num_hidden_layers=len(self.ratios), compress_ratios=[*self.ratios, 0]
        )


_BASE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 24,
    "o_groups": 2,
    "o_lora_rank": 16,
    "sliding_window": 128,
    "index_n_heads": 32,
    "index_head_dim": 16,
    "index_topk": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "num_hash_layers": 2,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 256,
    },
    "max_position_embeddings": 4096,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

# reference section 2.10: around group ends of both compressors, the full window, and the entries that follow
_EDGES = (1, 2, 3, 4, 5, 7, 8, 127, 128, 129, 255, 256, 257)

CONFIGS = (
    # all three kinds, a small top-k so that the indexer decides from position 67 on
    OracleConfig("mixed", (0, 4, 128, 4, 0, 128), 600, 8, 11, (*_EDGES, 511, 512, 513)),
    # Flash's layer pattern and its top-k: selection is the identity up to position 2050
    OracleConfig(
        "flash", (0, 0, 4, 128, 4, 128, 4), 2060, 2, 12, (2047, 2048, 2050, 2051, 2052, 2053),
        {"index_topk": 512, "num_hash_layers": 3},
    ),
    # Pro's layer pattern, scaling and 64 index heads, more groups and experts
    OracleConfig(
        "pro", (128, 128, 4, 128, 4), 780, 8, 23, (*_EDGES, 640, 767, 768),
        {
            "index_topk": 64, "index_n_heads": 64, "num_hash_layers": 3, "routed_scaling_factor": 2.5, "o_groups": 4,
            "num_attention_heads": 8, "n_routed_experts": 12, "num_experts_per_tok": 3, "rms_norm_eps": 1e-5,
        },
    ),
    # CSA only, no yarn, no hash layer, wide rope, tight SwiGLU clamp
    OracleConfig(
        "csa", (4, 4, 4), 520, 8, 14, (*_EDGES, 383, 384, 385),
        {
            "rope_scaling": None, "num_hash_layers": 0, "head_dim": 48, "qk_rope_head_dim": 16, "index_head_dim": 32,
            "index_n_heads": 48, "index_topk": 32, "swiglu_limit": 0.5, "q_lora_rank": 40,
        },
    ),
    # HCA and SWA, hash layers throughout, two streams, few Sinkhorn iterations
    OracleConfig(
        "hca", (128, 0, 128, 0), 1170, 8, 5, (*_EDGES, 1023, 1024, 1025),
        {"num_hash_layers": 4, "hc_mult": 2, "hc_sinkhorn_iters": 5, "o_groups": 1, "n_routed_experts": 4},
    ),
    # long: 2,250 entries of which 128 are kept, 70 HCA entries, angles of far positions
    OracleConfig(
        "long", (4, 128, 0, 4), 8936, 2, 6, (8191, 8192, 8193),
        {"index_topk": 128, "max_position_embeddings": 16384, "num_hash_layers": 1, "vocab_size": 128},
    ),
)  # fmt: skip


def write_checkpoint(directory: Path, config: OracleConfig) -> None:
    """A checkpoint with random weights of `config` in Transformers' naming, float32."""
    hf = config.hf()
    model = DeepseekV4ForCausalLM(hf)
    generator = torch.Generator().manual_seed(config.seed)
    tensors = {name: _random(name, t, hf, generator) for name, t in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    hf.architectures = ["DeepseekV4ForCausalLM"]
    hf.dtype = torch.float32
    hf.save_pretrained(directory)


def _random(name: str, like: torch.Tensor, hf: DeepseekV4Config, generator: torch.Generator) -> torch.Tensor:
    """Values of a size at which every term of the forward pass matters and logits stay near 1."""

    def normal(scale: float) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator) * scale

    if name.endswith("tid2eid"):
        rows = [
            torch.randperm(hf.n_routed_experts, generator=generator)[: hf.num_experts_per_tok] for _ in range(len(like))
        ]
        return torch.stack(rows)
    if name.endswith("norm.weight"):
        return 1 + normal(0.2)
    if name.endswith(("_hc.base", "hc_base", "_hc.scale", "hc_scale")):
        return normal(0.5)
    if name.endswith("position_bias"):
        return normal(0.7)
    if name.endswith("sinks"):
        return normal(1.0)
    if name.endswith("e_score_correction_bias"):
        return normal(0.2)
    if name.endswith("embed_tokens.weight"):
        return normal(1.0)
    return normal(1 / math.sqrt(like.shape[-1]))
