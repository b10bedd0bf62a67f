"""The tensors behind the ids: pages, window slots and snapshots.

Layouts, so that one object moves as one span (c = head_dim, L layers):

    pages      [n_pages, page]           csa_main | csa_index | hca segments of all layers, in geometry's order
    window     [slots, L, SLOT_ROWS, c]  rows addressed by position % SLOT_ROWS
    snapshots  [n, L, WINDOW, c]         row i of a snapshot at boundary b is position b - SNAPSHOT_REACH + i
    state      [slots, layers, ring, w]  compressor rows [C | Z], float32, addressed by position % ring

A layer reads a flat pool through a view that starts at its own first row, so one set of row indices serves all layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.cache.geometry import (
    CSA_RING,
    HCA_RING,
    LOOKBACK,
    SLOT_ROWS,
    CacheCapacity,
    CacheGeometry,
    SegmentKind,
)
from triptych.config import CSA_LAYER, HCA_LAYER, WINDOW, ModelShape
from triptych.errors import ConfigError
from triptych.model.batch import LayerCache

SNAPSHOT_REACH = WINDOW + LOOKBACK  # rows [b - 132, b - 4) make boundary b resumable (rule R3)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Pools:
    """Allocated once at start-up; sizes come from the geometry and never change."""

    def __init__(self, shape: ModelShape, geometry: CacheGeometry, capacity: CacheCapacity) -> None:
        if geometry.kv_format not in _DTYPES:
            raise ConfigError(
                f"KV format {geometry.kv_format!r} has no kernels on this device.", "Use float32 or bfloat16."
            )
        dtype = _DTYPES[geometry.kv_format]
        layers, c, di = shape.num_layers, shape.head_dim, shape.index_head_dim
        n_csa, n_hca = len(shape.csa_layers), len(shape.hca_layers)
        self.capacity = capacity
        self.window_stride = layers * SLOT_ROWS
        self.snapshot_stride = layers * WINDOW
        self.csa_stride = n_csa * CSA_RING
        self.hca_stride = n_hca * HCA_RING
        self.pages = torch.empty(capacity.pages, geometry.page_bytes // dtype.itemsize, dtype=dtype)
        self.window = torch.empty(capacity.slots * self.window_stride, c, dtype=dtype)
        self.snapshots = torch.empty(capacity.snapshots * self.snapshot_stride, c, dtype=dtype)
        self._csa = torch.empty(capacity.slots * self.csa_stride, 4 * c)
        self._index = torch.empty(capacity.slots * self.csa_stride, 4 * di)
        self._hca = torch.empty(capacity.slots * self.hca_stride, 2 * c)
        self.layers = self._layer_views(shape, geometry)
        self._rows_by_layer = (capacity.slots, layers, SLOT_ROWS, c), (capacity.snapshots, layers, WINDOW, c)

    @property
    def nbytes(self) -> int:
        """Bytes of all pools."""
        tensors = (self.pages, self.window, self.snapshots, self._csa, self._index, self._hca)
        return sum(t.nbytes for t in tensors)

    def save(self, slot: int, boundary: int, snapshot: int) -> None:
        """Copy the window rows that make `boundary` resumable from a slot's ring into a snapshot."""
        ring, stored, rows = self._window_of(slot, boundary, snapshot)
        stored[:, rows - (boundary - SNAPSHOT_REACH)] = ring[:, rows % SLOT_ROWS]

    def restore(self, slot: int, boundary: int, snapshot: int) -> None:
        """Copy a snapshot's window rows into a slot's ring."""
        ring, stored, rows = self._window_of(slot, boundary, snapshot)
        ring[:, rows % SLOT_ROWS] = stored[:, rows - (boundary - SNAPSHOT_REACH)]

    def _window_of(self, slot: int, boundary: int, snapshot: int) -> tuple[Tensor, Tensor, Tensor]:
        ring = self.window.view(self._rows_by_layer[0])[slot]
        stored = self.snapshots.view(self._rows_by_layer[1])[snapshot]
        rows = torch.arange(max(boundary - SNAPSHOT_REACH, 0), boundary - LOOKBACK)
        return ring, stored, rows

    def _layer_views(self, shape: ModelShape, geometry: CacheGeometry) -> tuple[LayerCache, ...]:
        segments = {(s.layer, s.kind): s for s in geometry.segments}

        def entries(layer: int, kind: SegmentKind, dim: int) -> Tensor:
            segment = segments[layer, kind]
            item = self.pages.element_size()
            start, width = segment.offset // item, segment.entries * dim
            assert segment.entry_bytes == dim * item
            view: Tensor = self.pages[:, start : start + width].unflatten(1, (segment.entries, dim))
            return view

        views, csa, hca = [], 0, 0
        for layer, ratio in enumerate(shape.ratios):
            window = self.window[layer * SLOT_ROWS :]
            snapshots = self.snapshots[layer * WINDOW :]
            if ratio == CSA_LAYER:
                main = entries(layer, "csa_main", shape.head_dim)
                keys = entries(layer, "csa_index", shape.index_head_dim)
                at = csa * CSA_RING
                views.append(LayerCache(window, snapshots, main, keys, self._csa[at:], self._index[at:]))
                csa += 1
            elif ratio == HCA_LAYER:
                main = entries(layer, "hca", shape.head_dim)
                views.append(LayerCache(window, snapshots, main, None, self._hca[hca * HCA_RING :]))
                hca += 1
            else:
                views.append(LayerCache(window, snapshots))
        return tuple(views)
