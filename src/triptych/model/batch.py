"""What the engine hands to the model for one step: row metadata and the caches, as tensors.

The engine builds it once a step; every layer reads it. The model knows nothing of requests, pages' owners or plans.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from triptych.kernels.compress.ref import CompressPlan
from triptych.kernels.window.ref import WindowPlan


@dataclass(frozen=True, slots=True)
class EntryPlan:
    """Compressed entries of one ratio in one step: what is pooled, at which rope position, and what each row sees.

    first [E] rope positions of the entries that complete; visible [R] = floor((t+1)/m), at most max_visible.
    """

    compress: CompressPlan
    first: Tensor
    visible: Tensor
    max_visible: int


@dataclass(frozen=True, slots=True)
class Batch:
    """R rows of B sequences. token_ids, positions, seq [R] int64; page_table [B, P] int64; sampled [S] row indices."""

    token_ids: Tensor
    positions: Tensor
    seq: Tensor
    page_table: Tensor
    window: WindowPlan
    csa: EntryPlan
    hca: EntryPlan
    sampled: Tensor


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's views of the pools.

    window [slots * ring, c] and snapshots [n * 128, c] flat rows; entries [pages, 32 or 1, c]; index_keys
    [pages, 32, Di]; state, index_state [slots * ring, width] compressor rows, float32. None where the layer kind has
    no such cache.
    """

    window: Tensor
    snapshots: Tensor
    entries: Tensor | None = None
    index_keys: Tensor | None = None
    state: Tensor | None = None
    index_state: Tensor | None = None
