"""Random weights of any shape, of sizes at which every part of the model matters and nothing dies or explodes.

Every tensor has its own generator, keyed by seed and name: its values do not depend on what else the model has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from triptych.checkpoint.table import TensorSpec, tensor_table
from triptych.config import ModelShape

_ROWS = 1 << 14  # rows of a token table drawn at once


def random_tensors(shape: ModelShape, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(official name, values) of every tensor, the same for the same seed: float32, or int64 for routing tables."""
    for spec in tensor_table(shape).values():
        yield spec.name, _random(spec, shape, _generator(seed, spec.name))


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def _random(spec: TensorSpec, shape: ModelShape, rng: np.random.Generator) -> Tensor:
    if spec.kind == "ids":
        return _routing_table(spec, shape, rng)
    center, spread = _center_and_spread(spec)
    values = rng.standard_normal(spec.shape, dtype=np.float32)
    values *= np.float32(spread)
    values += np.float32(center)
    return torch.from_numpy(values)


def _center_and_spread(spec: TensorSpec) -> tuple[float, float]:
    """Mean and standard deviation by what a tensor does."""
    name = spec.name
    if spec.kind == "norm":
        return 1.0, 0.1
    if name.endswith("_base"):
        return 0.0, 1.0  # makes the residual maps of different streams differ, far from uniform
    if name.endswith(("hc_attn_scale", "hc_ffn_scale", "hc_head_scale")):
        return 1.0, 0.25
    if name.endswith("attn_sink"):
        return 0.0, 1.0
    if name.endswith("ape"):
        return 0.0, 0.7
    if name.endswith("gate.bias"):
        return 0.0, 0.2
    if name == "embed.weight":
        return 0.0, 1.0
    return 0.0, spec.shape[-1] ** -0.5  # a product with a normed input then has variance 1


def _routing_table(spec: TensorSpec, shape: ModelShape, rng: np.random.Generator) -> Tensor:
    """tid2eid [V, k]: k distinct random experts for each token."""
    tokens, chosen = spec.shape
    table = np.empty((tokens, chosen), dtype=np.int64)
    for start in range(0, tokens, _ROWS):
        keys = rng.random((min(_ROWS, tokens - start), shape.num_experts), dtype=np.float32)
        table[start : start + _ROWS] = np.argsort(keys, axis=1, kind="stable")[:, :chosen]
    return torch.from_numpy(table)
