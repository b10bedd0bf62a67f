"""What a context costs: bytes kept per token, bytes read and operations done for one more token.

Sources: DeepSeek-V4 reference sections 4.3 and 4.4 (bytes per token, operations per token), geometry of this engine's
cache (cache/geometry.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from triptych.cache.geometry import CacheGeometry
from triptych.cache.resume import trapezoid_equivalents
from triptych.config import CSA_RATIO, HCA_RATIO, PAGE, WINDOW, ModelShape
from triptych.planner.hardware import Numeric


@dataclass(frozen=True, slots=True)
class Work:
    """Operations of one kind for one token: multiply-adds count two. `split`: divided over the heads' devices."""

    name: str
    flops: float
    numeric: Numeric
    split: bool


class Attention(Protocol):
    """The cache and the attention of one model."""

    @property
    def page_bytes(self) -> int:
        """128 tokens of one sequence, all layers."""

    @property
    def snapshot_bytes(self) -> int:
        """What makes a position resumable beside its entries; 0 if nothing is needed."""

    @property
    def snapshot_frames(self) -> int:
        """Frames of page size that a snapshot takes."""

    @property
    def slot_bytes(self) -> int:
        """Fixed state of one running request."""

    @property
    def token_bytes(self) -> Mapping[str, float]:
        """Bytes that each kind of entry grows by per token."""

    def reads(self, context: float) -> Mapping[str, float]:
        """Bytes read from the cache for one more token behind `context` tokens."""

    def work(self, context: float) -> tuple[Work, ...]:
        """Operations for one more token behind `context` tokens, projections not counted."""

    def rebuild(self, context: int) -> float:
        """Tokens' worth of work that makes a position resumable whose entries are there but no snapshot."""


@dataclass(frozen=True)
class PanelAttention:
    """DeepSeek-V4: CSA, HCA and window."""

    shape: ModelShape
    geometry: CacheGeometry

    @property
    def page_bytes(self) -> int:
        """128 tokens, all layers."""
        return self.geometry.page_bytes

    @property
    def snapshot_bytes(self) -> int:
        """The window rows that make one boundary resumable."""
        return self.geometry.snapshot_bytes

    @property
    def snapshot_frames(self) -> int:
        """Frames of page size that a snapshot takes."""
        return self.geometry.snapshot_frames

    @property
    def slot_bytes(self) -> int:
        """Window ring and compressor rows of one running request."""
        return self.geometry.slot_bytes

    @property
    def token_bytes(self) -> Mapping[str, float]:
        """By panel: CSA entries, their index keys, HCA entries."""
        sums = {"CSA entries": 0, "CSA index keys": 0, "HCA entries": 0}
        names = {"csa_main": "CSA entries", "csa_index": "CSA index keys", "hca": "HCA entries"}
        for segment in self.geometry.segments:
            sums[names[segment.kind]] += segment.bytes
        return {name: size / PAGE for name, size in sums.items()}

    def reads(self, context: float) -> Mapping[str, float]:
        """All index keys, the entries that they choose, all HCA entries, the window."""
        entry, key = self.geometry.main_entry_bytes, self.geometry.index_key_bytes
        csa, hca = len(self.shape.csa_layers), len(self.shape.hca_layers)
        candidates = context / CSA_RATIO
        scanned = candidates if candidates > self.shape.index_topk else 0.0  # fewer are all taken, unscored
        return {
            "CSA entries": csa * min(self.shape.index_topk, candidates) * entry,
            "CSA index keys": csa * scanned * key,
            "HCA entries": hca * context / HCA_RATIO * entry,
            "windows": self.shape.num_layers * min(WINDOW, context + 1) * entry,
        }

    def work(self, context: float) -> tuple[Work, ...]:
        """Scores of the indexer, and scores and sums of the attention over window and entries."""
        s = self.shape
        candidates = context / CSA_RATIO
        scored = candidates if candidates > s.index_topk else 0.0
        index = 2 * s.index_heads * s.index_head_dim * scored * len(s.csa_layers)
        rows = s.num_layers * min(WINDOW, context + 1)
        rows += len(s.csa_layers) * min(s.index_topk, candidates) + len(s.hca_layers) * context / HCA_RATIO
        core = 4 * s.num_heads * s.head_dim * rows
        index_numeric: Numeric = "fp4" if self.geometry.index_format == "mxfp4" else "fp8"
        if self.geometry.index_format in ("bfloat16", "float32"):
            index_numeric = "bf16" if self.geometry.index_format == "bfloat16" else "fp32"
        core_numeric: Numeric = "fp32" if self.geometry.kv_format == "float32" else "bf16"
        return Work("indexer", index, index_numeric, False), Work("attention", core, core_numeric, True)

    def rebuild(self, context: int) -> float:
        """The trapezoid: layer by layer fewer rows run again."""
        boundary = context // PAGE * PAGE
        return min(float(boundary), trapezoid_equivalents(boundary, self.shape.num_layers))


@dataclass(frozen=True)
class PlainAttention:
    """An ordinary model for comparison: every token's entry is kept in every layer, and nothing else.

    `entry`, `key`: bytes per token and layer; `score`: operations per entry and layer that is read; `topk`: entries
    read if an indexer chooses them, None if all are; `index`: operations per candidate and layer.
    """

    layers: int
    entry: int
    score: float
    key: int = 0
    index: float = 0.0
    topk: int | None = None

    snapshot_bytes: int = 0
    snapshot_frames: int = 0
    slot_bytes: int = 0

    @property
    def page_bytes(self) -> int:
        """128 tokens, all layers."""
        return PAGE * self.layers * (self.entry + self.key)

    @property
    def token_bytes(self) -> Mapping[str, float]:
        """Entries, and index keys if there are any."""
        sizes = {"entries": float(self.layers * self.entry)}
        return sizes | ({"index keys": float(self.layers * self.key)} if self.key else {})

    def reads(self, context: float) -> Mapping[str, float]:
        """All entries, or those that the indexer chooses."""
        chosen = context if self.topk is None else min(self.topk, context)
        sizes = {"entries": self.layers * chosen * self.entry}
        return sizes | ({"index keys": self.layers * context * self.key} if self.key else {})

    def work(self, context: float) -> tuple[Work, ...]:
        """Scores and sums over what is read."""
        chosen = context if self.topk is None else min(self.topk, context)
        core = Work("attention", self.layers * chosen * self.score, "bf16", True)
        if self.topk is None:
            return (core,)
        return Work("indexer", self.layers * context * self.index, "fp8", False), core

    def rebuild(self, context: int) -> float:
        """Nothing: a cached prefix is always resumable."""
        return 0.0
