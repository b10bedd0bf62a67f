"""Every tensor that a checkpoint of one shape must hold: name, logical shape, and how it may be stored.

Source: reference section 5.1 (header dump of a released checkpoint).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from triptych.config import CSA_LAYER, HCA_LAYER, SWA_LAYER, ModelShape

Kind = Literal["linear", "expert", "matrix", "router", "norm", "float32", "ids"]
"""How the released files store a tensor, which decides what else is allowed:

linear   FP8 blocks of 128 x 128        expert  MXFP4 groups of 32, or FP8     matrix, norm  bf16
router   bf16, used in float32          float32 float32 always                 ids           int64 or int32
"""

Part = Literal["embedding", "experts", "shared", "router", "attention", "compressor", "indexer", "mhc", "norms", "mtp"]
"""What a tensor is part of, for sums of parameters and bytes."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One expected tensor. `shape` is logical: what it multiplies as, before packing. `layer` is None at the top."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    part: Part
    layer: int | None = None

    @property
    def numel(self) -> int:
        """Logical elements."""
        return math.prod(self.shape)

    @property
    def scale_name(self) -> str | None:
        """Where the scales of this weight are if it is stored quantised; None if it never is."""
        return self.name.removesuffix("weight") + "scale" if self.kind in ("linear", "expert") else None


def tensor_table(shape: ModelShape) -> dict[str, TensorSpec]:
    """All expected tensors by official name, in the order of the forward pass, MTP blocks last."""
    table: dict[str, TensorSpec] = {}
    for spec in _all(shape):
        table[spec.name] = spec
    return table


def _all(s: ModelShape) -> Iterator[TensorSpec]:
    yield TensorSpec("embed.weight", (s.vocab_size, s.hidden_size), "matrix", "embedding")
    for layer, ratio in enumerate(s.ratios):
        yield from _block(s, f"layers.{layer}.", layer, ratio)
    yield TensorSpec("norm.weight", (s.hidden_size,), "norm", "norms")
    yield from _head_maps(s, "", None)
    yield TensorSpec("head.weight", (s.vocab_size, s.hidden_size), "matrix", "embedding")
    for index in range(s.num_mtp_layers):
        for spec in _mtp(s, f"mtp.{index}.", s.num_layers + index):
            yield TensorSpec(spec.name, spec.shape, spec.kind, "mtp", spec.layer)


def _block(s: ModelShape, at: str, layer: int, ratio: int) -> Iterator[TensorSpec]:
    d = s.hidden_size
    maps = (2 + s.hc_mult) * s.hc_mult
    for site in ("attn", "ffn"):
        yield TensorSpec(f"{at}{site}_norm.weight", (d,), "norm", "norms", layer)
        yield TensorSpec(f"{at}hc_{site}_fn", (maps, s.hc_mult * d), "float32", "mhc", layer)
        yield TensorSpec(f"{at}hc_{site}_base", (maps,), "float32", "mhc", layer)
        yield TensorSpec(f"{at}hc_{site}_scale", (3,), "float32", "mhc", layer)
    yield from _attention(s, at + "attn.", layer)
    if ratio != SWA_LAYER:
        yield from _compressor(s, at + "attn.compressor.", layer, "compressor")
    if ratio == CSA_LAYER:
        index = at + "attn.indexer."
        queries = s.index_heads * s.index_head_dim
        yield TensorSpec(index + "wq_b.weight", (queries, s.q_lora_rank), "linear", "indexer", layer)
        yield TensorSpec(index + "weights_proj.weight", (s.index_heads, d), "matrix", "indexer", layer)
        yield from _compressor(s, index + "compressor.", layer, "indexer")
    yield from _moe(s, at + "ffn.", layer)


def _attention(s: ModelShape, at: str, layer: int) -> Iterator[TensorSpec]:
    d, c = s.hidden_size, s.head_dim
    low_rank = s.o_groups * s.o_lora_rank
    for name, rows, columns in (
        ("wq_a", s.q_lora_rank, d),
        ("wq_b", s.num_heads * c, s.q_lora_rank),
        ("wkv", c, d),
        ("wo_a", low_rank, s.num_heads * c // s.o_groups),
        ("wo_b", d, low_rank),
    ):
        yield TensorSpec(f"{at}{name}.weight", (rows, columns), "linear", "attention", layer)
    yield TensorSpec(at + "q_norm.weight", (s.q_lora_rank,), "norm", "norms", layer)
    yield TensorSpec(at + "kv_norm.weight", (c,), "norm", "norms", layer)
    yield TensorSpec(at + "attn_sink", (s.num_heads,), "float32", "attention", layer)


def _compressor(s: ModelShape, at: str, layer: int, part: Literal["compressor", "indexer"]) -> Iterator[TensorSpec]:
    """A CSA compressor has two halves of channels (overlap), an HCA compressor one."""
    dim = s.index_head_dim if part == "indexer" else s.head_dim
    overlap = s.ratios[layer] != HCA_LAYER
    wide = 2 * dim if overlap else dim
    for name in ("wkv", "wgate"):
        yield TensorSpec(f"{at}{name}.weight", (wide, s.hidden_size), "matrix", part, layer)
    yield TensorSpec(at + "ape", (s.ratios[layer], wide), "float32", part, layer)
    yield TensorSpec(at + "norm.weight", (dim,), "norm", part, layer)


def _moe(s: ModelShape, at: str, layer: int) -> Iterator[TensorSpec]:
    d, wide = s.hidden_size, s.moe_intermediate_size
    yield TensorSpec(at + "gate.weight", (s.num_experts, d), "router", "router", layer)
    if s.is_hash_layer(layer):
        yield TensorSpec(at + "gate.tid2eid", (s.vocab_size, s.experts_per_token), "ids", "router", layer)
    else:
        yield TensorSpec(at + "gate.bias", (s.num_experts,), "float32", "router", layer)
    sizes = (("w1", (wide, d)), ("w3", (wide, d)), ("w2", (d, wide)))
    for name, size in sizes:
        yield TensorSpec(f"{at}shared_experts.{name}.weight", size, "linear", "shared", layer)
    for expert in range(s.num_experts):
        for name, size in sizes:
            yield TensorSpec(f"{at}experts.{expert}.{name}.weight", size, "expert", "experts", layer)


def _head_maps(s: ModelShape, at: str, layer: int | None) -> Iterator[TensorSpec]:
    n = s.hc_mult
    yield TensorSpec(at + "hc_head_fn", (n, n * s.hidden_size), "float32", "mhc", layer)
    yield TensorSpec(at + "hc_head_base", (n,), "float32", "mhc", layer)
    yield TensorSpec(at + "hc_head_scale", (1,), "float32", "mhc", layer)


def _mtp(s: ModelShape, at: str, layer: int) -> Iterator[TensorSpec]:
    d = s.hidden_size
    for name in ("enorm", "hnorm"):
        yield TensorSpec(f"{at}{name}.weight", (d,), "norm", "mtp", layer)
    for name in ("e_proj", "h_proj"):
        yield TensorSpec(f"{at}{name}.weight", (d, d), "linear", "mtp", layer)
    yield from _block(s, at, layer, SWA_LAYER)
    yield TensorSpec(at + "norm.weight", (d,), "norm", "mtp", layer)
    yield from _head_maps(s, at, layer)
