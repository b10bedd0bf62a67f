"""A small shape with ragged sizes, checkpoints of it, and ways to damage them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from triptych.checkpoint import synthesize
from triptych.checkpoint.reader import INDEX_FILE
from triptych.config import ModelShape

# rows and columns of the FP8 matrices: 40, 96, 160, 200, 320 ... so that blocks of 128 have ragged edges both ways
SMALL = ModelShape(
    vocab_size=130,
    hidden_size=160,
    ratios=(0, 4, 128),
    num_heads=4,
    head_dim=50,
    rope_dim=10,
    q_lora_rank=40,
    o_groups=2,
    o_lora_rank=72,
    index_heads=3,
    index_head_dim=32,
    index_topk=8,
    num_experts=3,
    experts_per_token=2,
    moe_intermediate_size=96,
    num_hash_layers=1,
    routed_scaling=1.5,
)

EXPERT = "layers.1.ffn.experts.2.w1.weight"
Tensors = dict[str, Tensor]


def one_file(directory: Path) -> Path:
    """The only safetensors file of a checkpoint."""
    [path] = directory.glob("*.safetensors")
    return path


def write_small(directory: Path, weights: str = "fp8", dialect: str = "official") -> Path:
    """A checkpoint of SMALL in one file and without an index; returns the file."""
    synthesize(directory, SMALL, weights=weights, dialect=dialect)  # type: ignore[arg-type]
    (directory / INDEX_FILE).unlink()
    return one_file(directory)


def damage(path: Path, change: Callable[[Tensors], object]) -> None:
    """Rewrite a safetensors file after `change` has worked on its tensors."""
    tensors = load_file(path)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)


def set_byte(tensor: Tensor, value: int) -> None:
    """Put a byte into the first element of a tensor of one-byte elements."""
    tensor.view(torch.uint8).view(-1)[0] = value
