"""How many parameters and bytes a shape has, without any file. Source: reference section 5.4."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from triptych.checkpoint.table import TensorSpec, tensor_table
from triptych.config import ModelShape

Weights = Literal["fp32", "bf16", "fp8"]
"""fp32: all float32. bf16: mHC, sinks, biases and ape float32, all else bf16. fp8: as released, FP8 and MXFP4."""

_BLOCK = 128
_GROUP = 32


def stored_bytes(specs: Iterable[TensorSpec], weights: Weights) -> int:
    """Bytes of these tensors in a weight format, scales included, file headers not."""
    return sum(_bytes(spec, weights) for spec in specs)


def _bytes(spec: TensorSpec, weights: Weights) -> int:
    if spec.kind == "ids":
        return 8 * spec.numel
    if weights == "fp32" or spec.kind == "float32":
        return 4 * spec.numel
    if weights == "fp8" and spec.kind == "linear":
        rows, columns = spec.shape
        return spec.numel + -(-rows // _BLOCK) * -(-columns // _BLOCK)
    if weights == "fp8" and spec.kind == "expert":
        return spec.numel // 2 + spec.numel // _GROUP
    return 2 * spec.numel


def parameters(specs: Iterable[TensorSpec]) -> int:
    """Learned values; routing tables are not counted."""
    return sum(spec.numel for spec in specs if spec.kind != "ids")


def active_parameters(shape: ModelShape, specs: Iterable[TensorSpec]) -> int:
    """Parameters that one token uses: its experts, one embedding row, and everything that is not an expert."""
    total = 0
    for spec in specs:
        if spec.kind == "expert":
            total += spec.numel * shape.experts_per_token  # of num_experts; divided below, to stay in integers
        elif spec.name == "embed.weight":
            total += shape.hidden_size * shape.num_experts
        elif spec.kind != "ids":
            total += spec.numel * shape.num_experts
    return total // shape.num_experts


def backbone(shape: ModelShape) -> list[TensorSpec]:
    """The tensors of a shape without its MTP blocks."""
    return [spec for spec in tensor_table(shape).values() if spec.part != "mtp"]
