"""What the engine hands to the model for one step: row metadata and the caches, as tensors.

The engine builds it once a step; every layer reads it. The model knows nothing of requests, pages' owners or plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from triptych.kernels.compress.ref import CompressPlan
from triptych.kernels.quant.formats import Rows
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
    """R rows of B sequences. token_ids, positions, seq [R] int64; page_table [B, P] int64; sampled [S] row indices.

    `narrow`: for layers that run fewer rows than the layer before, which ones go on; see Narrowing.
    """

    token_ids: Tensor
    positions: Tensor
    seq: Tensor
    page_table: Tensor
    window: WindowPlan
    csa: EntryPlan
    hca: EntryPlan
    sampled: Tensor
    narrow: Mapping[int, Narrowing] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows of the step."""
        return len(self.positions)


@dataclass(frozen=True, slots=True)
class Narrowing:
    """From one layer on only the rows `keep` [R'] of those before go on, as `batch`; it has no `narrow` of its own."""

    keep: Tensor
    batch: Batch


@dataclass(frozen=True, slots=True)
class LayerCache:
    """The views of the pools that layer number `layer` has.

    window [slots * ring, c] flat rows; frames [n, rows, c] all frames as rows of snapshots; entries [n, 32 or 1, c];
    index_keys [n, 32, Di]; state, index_state [slots * ring, width] compressor rows, float32. None where the layer
    kind has no such cache. Rows are packed in FP8 and MXFP4 caches (kernels/quant/formats.py).
    """

    layer: int
    window: Rows
    frames: Rows
    entries: Rows | None = None
    index_keys: Rows | None = None
    state: Tensor | None = None
    index_state: Tensor | None = None
