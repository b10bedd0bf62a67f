"""The tensors behind the ids: frames, which hold pages and snapshots, and window slots.

Layouts (c = head_dim, L layers):

    frames     [n_frames, page]          a page: csa_main | csa_index | hca segments of all layers, in geometry's order
                                         a snapshot: its L * 128 rows of c, spread over its frames, n rows in each;
                                         row l * 128 + i of boundary b is position b - RESTORED + i in layer l
    window     [slots, L, SLOT_ROWS, c]  rows addressed by position % SLOT_ROWS
    state      [slots, layers, ring, w]  compressor rows [C | Z], float32, addressed by position % ring

A layer reads a flat pool through a view that starts at its own first row, so one set of row indices serves all layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from triptych.cache.geometry import (
    CSA_RING,
    HCA_RING,
    LOOKBACK,
    RESTORED,
    SLOT_ROWS,
    CacheCapacity,
    CacheGeometry,
    SegmentKind,
)
from triptych.config import CSA_LAYER, HCA_LAYER, WINDOW, ModelShape
from triptych.errors import ConfigError
from triptych.model.batch import LayerCache

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Pools:
    """Allocated once at start-up; sizes come from the geometry and never change."""

    def __init__(
        self,
        shape: ModelShape,
        geometry: CacheGeometry,
        capacity: CacheCapacity,
        device: torch.device = torch.device("cpu"),  # noqa: B008  (a value, never changed)
    ) -> None:
        if geometry.kv_format not in _DTYPES:
            raise ConfigError(
                f"KV format {geometry.kv_format!r} has no kernels on this device.", "Use float32 or bfloat16."
            )
        dtype = _DTYPES[geometry.kv_format]
        layers, c, di = shape.num_layers, shape.head_dim, shape.index_head_dim
        n_csa, n_hca = len(shape.csa_layers), len(shape.hca_layers)
        self.capacity = capacity
        self.device = device
        self.window_stride = layers * SLOT_ROWS
        self.rows_per_frame = geometry.rows_per_frame
        self.csa_stride = n_csa * CSA_RING
        self.hca_stride = n_hca * HCA_RING
        self.frames = torch.empty(capacity.frames, geometry.page_bytes // dtype.itemsize, dtype=dtype, device=device)
        self._rows = self.frames[:, : self.rows_per_frame * c].unflatten(1, (self.rows_per_frame, c))
        self.window = torch.empty(capacity.slots * self.window_stride, c, dtype=dtype, device=device)
        self._csa = torch.empty(capacity.slots * self.csa_stride, 4 * c, device=device)
        self._index = torch.empty(capacity.slots * self.csa_stride, 4 * di, device=device)
        self._hca = torch.empty(capacity.slots * self.hca_stride, 2 * c, device=device)
        self.layers = self._layer_views(shape, geometry)
        self._ring_shape = (capacity.slots, layers, SLOT_ROWS, c)

    @property
    def nbytes(self) -> int:
        """Bytes of all pools."""
        tensors = (self.frames, self.window, self._csa, self._index, self._hca)
        return sum(t.nbytes for t in tensors)

    def save(self, slot: int, boundary: int, frames: Sequence[int]) -> None:
        """Copy the window rows that make `boundary` resumable from a slot's ring into the frames of a snapshot."""
        ring, positions, frame, row = self._window_of(slot, boundary, frames)
        self._rows[frame, row] = ring[:, positions % SLOT_ROWS]

    def restore(self, slot: int, boundary: int, frames: Sequence[int]) -> None:
        """Copy a snapshot's window rows into a slot's ring."""
        ring, positions, frame, row = self._window_of(slot, boundary, frames)
        ring[:, positions % SLOT_ROWS] = self._rows[frame, row]

    def _window_of(self, slot: int, boundary: int, frames: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A slot's ring [L, SLOT_ROWS, c], the positions [n] that boundary needs, their frames and rows [L, n]."""
        ring = self.window.view(self._ring_shape)[slot]
        positions = torch.arange(max(boundary - RESTORED, 0), boundary - LOOKBACK, device=self.device)
        layers = torch.arange(ring.shape[0], device=self.device)[:, None]
        rows = layers * WINDOW + (positions - (boundary - RESTORED))
        held = torch.tensor(frames, device=self.device)
        return ring, positions, held[rows // self.rows_per_frame], rows % self.rows_per_frame

    def _layer_views(self, shape: ModelShape, geometry: CacheGeometry) -> tuple[LayerCache, ...]:
        segments = {(s.layer, s.kind): s for s in geometry.segments}

        def entries(layer: int, kind: SegmentKind, dim: int) -> Tensor:
            segment = segments[layer, kind]
            item = self.frames.element_size()
            start, width = segment.offset // item, segment.entries * dim
            assert segment.entry_bytes == dim * item
            view: Tensor = self.frames[:, start : start + width].unflatten(1, (segment.entries, dim))
            return view

        views, csa, hca = [], 0, 0
        for layer, ratio in enumerate(shape.ratios):
            window = self.window[layer * SLOT_ROWS :]
            if ratio == CSA_LAYER:
                main = entries(layer, "csa_main", shape.head_dim)
                keys = entries(layer, "csa_index", shape.index_head_dim)
                at = csa * CSA_RING
                views.append(LayerCache(layer, window, self._rows, main, keys, self._csa[at:], self._index[at:]))
                csa += 1
            elif ratio == HCA_LAYER:
                main = entries(layer, "hca", shape.head_dim)
                views.append(LayerCache(layer, window, self._rows, main, None, self._hca[hca * HCA_RING :]))
                hca += 1
            else:
                views.append(LayerCache(layer, window, self._rows))
        return tuple(views)
