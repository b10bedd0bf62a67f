"""The tensors behind the ids: frames, which hold pages and snapshots, and window slots.

Layouts (c = head_dim, L layers):

    frames     [n_frames, page]          a page: segments of all layers, in geometry's order
                                         a snapshot: its L * 128 window rows, spread over its frames, n rows in each;
                                         row l * 128 + i of boundary b is position b - RESTORED + i in layer l
    window     [slots, L, SLOT_ROWS, c]  rows addressed by position % SLOT_ROWS
    state      [slots, layers, ring, w]  compressor rows [C | Z], float32, addressed by position % ring

A layer reads a flat pool through a view that starts at its own first row, so one set of row indices serves all layers.
In FP8 entries and window rows are packed (kernels/quant/formats.py): frames and window are bytes, and what a layer has
are views of values and of scales: of a page, of its own ring in a slot, of the snapshot rows in a frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
    Segment,
)
from triptych.config import CSA_LAYER, HCA_LAYER, WINDOW, IndexFormat, ModelShape
from triptych.kernels.quant.formats import PackedRows, RowFormat, Rows, packed
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
        spare: int = 0,
    ) -> None:
        """`spare`: one slot and one frame more than requests can own if 1, for what decode batches write for nobody."""
        layers, c, di = shape.num_layers, shape.head_dim, shape.index_head_dim
        n_csa, n_hca = len(shape.csa_layers), len(shape.hca_layers)
        self.capacity = capacity
        self.device = device
        self.spare_slot, self.spare_frame = capacity.slots, capacity.frames
        slots = capacity.slots + spare
        self.window_stride = layers * SLOT_ROWS
        self.rows_per_frame = geometry.rows_per_frame
        self.csa_stride = n_csa * CSA_RING
        self.hca_stride = n_hca * HCA_RING
        self._entry = RowFormat("entry", c, shape.rope_dim) if geometry.kv_format == "fp8" else None
        dtype = _DTYPES.get(geometry.kv_format, torch.uint8)
        frames = capacity.frames + spare
        self.frames = torch.empty(frames, geometry.page_bytes // dtype.itemsize, dtype=dtype, device=device)
        ring_bytes = SLOT_ROWS * geometry.window_row_bytes
        self.window = torch.empty(slots, layers, ring_bytes // dtype.itemsize, dtype=dtype, device=device)
        self._dim = c
        self._rows = self._rows_in(self.frames.view(torch.uint8), 0, self.rows_per_frame)
        self._csa = torch.empty(slots * self.csa_stride, 4 * c, device=device)
        self._index = torch.empty(slots * self.csa_stride, 4 * di, device=device)
        self._hca = torch.empty(slots * self.hca_stride, 2 * c, device=device)
        self.layers = self._layer_views(shape, geometry)

    @property
    def nbytes(self) -> int:
        """Bytes of all pools."""
        tensors = (self.frames, self.window, self._csa, self._index, self._hca)
        return sum(t.nbytes for t in tensors)

    @property
    def row_sections(self) -> tuple[int, ...]:
        """Bytes of a window row in each section of a frame: the row itself, or its values and its scales."""
        return tuple(part.shape[-1] * part.element_size() for part in _parts(self._rows))

    def save(self, slot: int, boundary: int, frames: Sequence[int]) -> None:
        """Copy the window rows that make `boundary` resumable from a slot's ring into the frames of a snapshot."""
        positions, frame, row = self._window_of(boundary, frames)
        for rows, ring in zip(_parts(self._rows), self._rings(slot), strict=True):
            rows[frame, row] = ring[:, positions % SLOT_ROWS]

    def restore(self, slot: int, boundary: int, frames: Sequence[int]) -> None:
        """Copy a snapshot's window rows into a slot's ring."""
        positions, frame, row = self._window_of(boundary, frames)
        for rows, ring in zip(_parts(self._rows), self._rings(slot), strict=True):
            ring[:, positions % SLOT_ROWS] = rows[frame, row]

    def _window_of(self, boundary: int, frames: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The positions [n] that a boundary needs, their frames and rows [L, n]."""
        positions = torch.arange(max(boundary - RESTORED, 0), boundary - LOOKBACK, device=self.device)
        layers = torch.arange(len(self.layers), device=self.device)[:, None]
        rows = layers * WINDOW + (positions - (boundary - RESTORED))
        held = torch.tensor(frames)
        if self.device.type == "cuda":  # the host does not wait for this copy
            held = held.pin_memory().to(self.device, non_blocking=True)
        return positions, held[rows // self.rows_per_frame], rows % self.rows_per_frame

    def _rings(self, slot: int) -> list[Tensor]:
        """A slot's ring of all layers [L, SLOT_ROWS, width]: its rows, or their values and their scales."""
        if self._entry is None:
            return [self.window[slot].unflatten(1, (SLOT_ROWS, -1))]
        rings = packed(self.window[slot], 0, SLOT_ROWS, self._entry)
        return [rings.values, rings.scales]

    def _entries(self, pages: Tensor, segment: Segment) -> Rows:
        """Entries of a segment of pages [P, entries, c]."""
        return self._rows_in(pages, segment.offset, segment.entries)

    def _rows_in(self, memory: Tensor, offset: int, rows: int) -> Rows:
        """`rows` entries or window rows of each line of bytes from `offset` on."""
        if self._entry is not None:
            return packed(memory, offset, rows, self._entry)
        return _dense(memory, offset, rows, self.frames.dtype, self._dim)

    def _ring(self, layer: int) -> Rows:
        """Window rows of a layer in all slots, under flat indices that begin at its own first row."""
        if self._entry is None:
            return self.window.view(-1, self._dim)[layer * SLOT_ROWS :]
        return packed(self.window[:, layer], 0, SLOT_ROWS, self._entry, self.window_stride)

    def _layer_views(self, shape: ModelShape, geometry: CacheGeometry) -> tuple[LayerCache, ...]:
        segments = {(layer, s.kind): s for s in geometry.segments for layer in s.layers}
        pages = self.frames.view(torch.uint8)
        views, csa, hca = [], 0, 0
        for layer, ratio in enumerate(shape.ratios):
            one = LayerCache(
                *(layer, self._ring(layer), self._rows),
                ring=SLOT_ROWS,
                window_stride=self.window_stride,
                state_stride=self.csa_stride if ratio == CSA_LAYER else self.hca_stride,
            )
            if ratio == CSA_LAYER:
                main = self._entries(pages, segments[layer, "csa_main"])
                keys = _keys(pages, segments[layer, "csa_index"], geometry.index_format, shape.index_head_dim)
                at = csa * CSA_RING
                one = replace(one, entries=main, index_keys=keys, state=self._csa[at:], index_state=self._index[at:])
                csa += 1
            elif ratio == HCA_LAYER:
                every = self._entries(pages, segments[layer, "hca"])
                main = every.only(hca) if isinstance(every, PackedRows) else every[:, hca : hca + 1]
                one = replace(one, entries=main, state=self._hca[hca * HCA_RING :])
                hca += 1
            views.append(one)
        return tuple(views)


def _keys(memory: Tensor, segment: Segment, form: IndexFormat, dim: int) -> Rows:
    """Index keys [P, entries, dim] of a segment of pages."""
    if form == "fp8" or form == "mxfp4":
        return packed(memory, segment.offset, segment.entries, RowFormat(form, dim))
    return _dense(memory, segment.offset, segment.entries, _DTYPES[form], dim)


def _dense(memory: Tensor, offset: int, rows: int, dtype: torch.dtype, dim: int) -> Tensor:
    """[P, rows, dim] of numbers from byte `offset` on of each line of bytes."""
    view: Tensor = memory[:, offset : offset + rows * dim * dtype.itemsize].view(dtype).unflatten(1, (rows, dim))
    return view


def _parts(rows: Rows) -> tuple[Tensor, ...]:
    """What lies in memory: the rows themselves, or their values and their scales."""
    return (rows.values, rows.scales) if isinstance(rows, PackedRows) else (rows,)
