"""The geometry of the bundled checkpoint: every part of DeepSeek-V4 once, in about ten million parameters."""

from __future__ import annotations

from pathlib import Path

from triptych.config import CSA_LAYER, HCA_LAYER, SWA_LAYER, ModelShape

VOCAB_SIZE = 4096  # half of what 8192 would cost in embedding and head, the largest tensors of the file
TOKENIZER_FILE = Path(__file__).with_name("tokenizer.json")

TINY_SHAPE = ModelShape(
    vocab_size=VOCAB_SIZE,
    hidden_size=256,
    ratios=(SWA_LAYER, SWA_LAYER, CSA_LAYER, HCA_LAYER, CSA_LAYER, HCA_LAYER, CSA_LAYER, HCA_LAYER),
    num_heads=8,
    head_dim=64,
    rope_dim=16,
    q_lora_rank=128,
    o_groups=4,
    o_lora_rank=64,
    index_heads=8,  # with few heads all ReLUs of an entry are often zero, and equal scores leave the top-k to chance
    index_head_dim=32,
    index_topk=128,
    num_experts=8,
    experts_per_token=2,
    moe_intermediate_size=128,
    num_hash_layers=1,
    routed_scaling=1.5,
)
