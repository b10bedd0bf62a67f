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
    """R rows of B sequences. token_ids, positions, seq [R] int64; page_table [B, P] int64; sampled [S] and scored [C]
    row indices: whose logits are wanted, and of whose only some log-probabilities are.

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
    scored: Tensor
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
    kind has no such cache. Rows are packed in FP8 and MXFP4 caches (kernels/quant/formats.py). From slot to slot it is
    `window_stride` flat window rows, of which `ring` are a layer's, and `state_stride` compressor rows.
    """

    layer: int
    window: Rows
    frames: Rows
    entries: Rows | None = None
    index_keys: Rows | None = None
    state: Tensor | None = None
    index_state: Tensor | None = None
    ring: int = 0
    window_stride: int = 0
    state_stride: int = 0


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """B rows of B sequences, one each, in fixed shapes that a CUDA graph can be captured over; B and P are buckets.

    token_ids, positions, slots, lowest [B] int64: the row's token, its position, the sequence's window slot, and the
    lowest position whose window row may be read (max(read_from, position - 127)). page_table [B, P] int32: line b
    holds the pages of row b's tokens, entry i those of [128 i, 128 (i + 1)); what lies beyond its position is any
    valid page number and must not be looked at. `max_csa`, `max_hca`: no row sees more entries than that; they depend
    on P alone. Everything else follows from these vectors: row b

        completes  a group of m tokens if (position + 1) % m == 0, and with it entry g = position // m
        writes     window row position % SLOT_ROWS and state row position % ring of its slot, entry g at page
                   page_table[b, position // 128], offset g % (128 // m)
        sees       window rows [lowest, position], entries [0, (position + 1) // m)

    A padding row has token 0, position 0, lowest 0, slot `Pools.spare_slot` (one more than requests can own) and a
    line of any valid pages: it completes nothing, sees no entry, and writes only into the spare slot. Several padding
    rows write the same rows there, with the same values. Their logits are finite and nobody reads them.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    lowest: Tensor
    page_table: Tensor
    max_csa: int
    max_hca: int

    @property
    def rows(self) -> int:
        """Rows of the batch, padding included."""
        return len(self.positions)
