"""The models that can be planned for: DeepSeek-V4 shapes by name or from files, and others to compare with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triptych.cache.geometry import CacheGeometry
from triptych.config import SHAPES, IndexFormat, KvFormat, ModelShape, read_config
from triptych.errors import ConfigError, nearest
from triptych.planner.attention import Attention, PanelAttention, PlainAttention
from triptych.planner.hardware import Numeric
from triptych.planner.parts import Part, WeightFormat, parts_of

TINY_CONFIG = Path(__file__).parents[1] / "tiny" / "data" / "config.json"
COMPARED = ("gqa-70b", "deepseek-v3.2")


@dataclass(frozen=True)
class PlannedModel:
    """Everything that a plan asks of a model. `shape` is None for the models that are only compared with.

    `heads_limit`: over how many devices tensor parallelism can divide the attention at most; it must divide this.
    `divides`: tensor parallelism divides the cache too, because it has heads.
    """

    name: str
    parts: tuple[Part, ...]
    attention: Attention
    layers: int
    hidden: int
    streams: int
    experts: int
    experts_per_token: int
    expert_inner: int
    query_width: int
    vocabulary: int
    heads_limit: int
    max_position: int
    shape: ModelShape | None = None
    divides: bool = False

    @property
    def weight_bytes(self) -> int:
        """All weights once."""
        return sum(part.bytes for part in self.parts)

    @property
    def active_parameters(self) -> int:
        """Parameters that one token multiplies with."""
        return sum(part.active for part in self.parts)


def model_named(
    name: str, kv_format: KvFormat = "fp8", index_format: IndexFormat | None = None, weights: WeightFormat | None = None
) -> PlannedModel:
    """The model called `name`: flash, pro, tiny, a comparison model, a checkpoint directory or its config.json.

    `weights` None means as released: of a file, what its config.json says. ConfigError names the nearest name.
    """
    if name in COMPARED:
        return _gqa_70b() if name == "gqa-70b" else _deepseek_v32()
    if name in SHAPES:
        return of_shape(name, SHAPES[name], kv_format, index_format, weights or "released")
    path = TINY_CONFIG if name == "tiny" else Path(os.path.expanduser(name))
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        known = [*SHAPES, "tiny", *COMPARED]
        raise ConfigError(f"--model {name!r} is neither a known model nor a checkpoint.", nearest(name, known))
    raw = read_config(path)
    shape = ModelShape.from_dict(raw, source=str(path))
    shown = name if name == "tiny" else path.resolve().parent.name
    return of_shape(shown, shape, kv_format, index_format, weights or _stored_format(raw))


def of_shape(
    name: str, shape: ModelShape, kv_format: KvFormat, index_format: IndexFormat | None, weights: WeightFormat
) -> PlannedModel:
    """A DeepSeek-V4 shape as a model to plan for."""
    geometry = CacheGeometry.of(shape, kv_format, index_format)
    return PlannedModel(
        name=name,
        parts=parts_of(shape, weights),
        attention=PanelAttention(shape, geometry),
        layers=shape.num_layers,
        hidden=shape.hidden_size,
        streams=shape.hc_mult,
        experts=shape.num_experts,
        experts_per_token=shape.experts_per_token,
        expert_inner=shape.moe_intermediate_size,
        query_width=shape.num_heads * shape.head_dim,
        vocabulary=shape.vocab_size,
        heads_limit=shape.o_groups,
        max_position=shape.max_position,
        shape=shape,
    )


def _stored_format(raw: dict[str, Any]) -> WeightFormat:
    if raw.get("quantization_config"):
        return "released"
    return "float32" if raw.get("torch_dtype", raw.get("dtype")) == "float32" else "bfloat16"


def _gqa_70b() -> PlannedModel:
    """A dense model of 70B parameters with 8 key-value heads in BF16. Source: Llama 3 70B, config.json."""
    layers, d, inner, heads, kv, c, vocabulary = 80, 8192, 28672, 64, 8, 128, 128256
    attention = layers * (2 * d * heads * c + 2 * d * kv * c)
    dense = layers * 3 * d * inner
    table = vocabulary * d
    parts = [
        Part("embedding", 2 * table, 0, "heads", "bf16"),
        Part("head", 2 * table, table, "heads", "bf16"),
        Part("attention", 2 * attention, attention, "heads", "bf16"),
        Part("dense layers", 2 * dense, dense, "heads", "bf16"),
    ]
    # keys and values of 8 heads; each of 64 query heads scores and sums 128 values per entry
    return PlannedModel(
        name="gqa-70b",
        parts=tuple(parts),
        attention=PlainAttention(layers, 2 * 2 * kv * c, 4.0 * heads * c),
        streams=1,
        divides=True,
        layers=layers,
        hidden=d,
        experts=0,
        experts_per_token=0,
        expert_inner=inner,
        query_width=heads * c,
        vocabulary=vocabulary,
        heads_limit=kv,
        max_position=131072,
    )


def _deepseek_v32() -> PlannedModel:
    """DeepSeek-V3.2, FP8 weights and cache. Source: config.json; 656 + 132 bytes an entry: reference section 4.4."""
    layers, dense_layers, d, vocabulary = 61, 3, 7168, 129280
    heads, q_rank, kv_rank, rope, nope, value = 128, 1536, 512, 64, 128, 128
    experts, chosen, inner, dense_inner = 256, 8, 2048, 18432
    index_heads, index_dim, topk = 64, 128, 2048
    copied = layers * d * (q_rank + kv_rank + rope)
    split = layers * (q_rank * heads * (nope + rope) + kv_rank * heads * (nope + value) + heads * value * d)
    indexer = layers * (q_rank * index_heads * index_dim + d * index_dim + d * index_heads)
    expert, moe_layers, table = 3 * d * inner, layers - dense_layers, vocabulary * d
    parts = [
        Part("embedding", 2 * table, 0, "heads", "bf16"),
        Part("head", 2 * table, table, "heads", "bf16"),
        Part("attention, copied", _fp8(copied), copied, "copied", "fp8"),
        Part("attention", _fp8(split), split, "heads", "fp8"),
        Part("indexer", _fp8(indexer), indexer, "copied", "fp8"),
        Part(
            "dense layers", _fp8(dense_layers * 3 * d * dense_inner), dense_layers * 3 * d * dense_inner, "heads", "fp8"
        ),
        Part("router", 2 * moe_layers * experts * d, moe_layers * experts * d, "copied", "bf16"),
        Part("shared experts", _fp8(moe_layers * expert), moe_layers * expert, "heads", "fp8"),
        Part("experts", _fp8(moe_layers * experts * expert), moe_layers * chosen * expert, "experts", "fp8"),
    ]
    # in latent space a query head scores 512 + 64 values of an entry and sums 512
    score = 2.0 * heads * (kv_rank + rope + kv_rank)
    return PlannedModel(
        name="deepseek-v3.2",
        parts=tuple(parts),
        streams=1,
        attention=PlainAttention(layers, 656, score, 132, 2.0 * index_heads * index_dim, topk),
        layers=layers,
        hidden=d,
        experts=experts,
        experts_per_token=chosen,
        expert_inner=inner,
        query_width=heads * (kv_rank + rope),
        vocabulary=vocabulary,
        heads_limit=heads,
        max_position=163840,
    )


def _fp8(parameters: int) -> int:
    """Bytes with a 4-byte scale per 128 x 128 block."""
    return parameters + 4 * -(-parameters // (128 * 128))


_EQUIVALENT: dict[Numeric, float] = {"fp4": 0.5, "fp8": 1.0, "bf16": 2.0, "fp32": 4.0}


def fp8_equivalent_flops(model: PlannedModel, context: float) -> float:
    """Operations of one token behind `context`, in units of FP8: FP4 counts half, BF16 double, weights as FP8.

    This is how the V4 report compares models ("equivalent FP8 FLOPs"; reference section 4.4).
    """
    attention = sum(work.flops * _EQUIVALENT[work.numeric] for work in model.attention.work(context))
    return 2.0 * model.active_parameters + attention
