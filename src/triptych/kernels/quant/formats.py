"""Rows of a cache that are packed into bytes: how they lie in memory, and reading and writing them.

A pool of packed rows has pages of rows; the values of a page's rows follow each other, and so do their scales:

    page p    | values of row 0 | values of row 1 | ...      | scales of row 0 | scales of row 1 | ...
              ^ values[p, 0]      + row stride                ^ scales[p, 0]      + row stride

    kind    values of a row               scales of a row                   bytes, released sizes
    entry   nope e4m3 | rope bf16         one e8m0 per 64, padded to 8      576 + 8
    fp8     e4m3                          one float32                       128 + 4
    mxfp4   two e2m1 a byte               one e8m0 per 32                    64 + 4

Pages of the prefix cache, the window rings of slots and the rows of snapshots are all such pools, so one reader and
one writer serve them. The bytes of a page are those of `pages.py`. Values begin at multiples of 16 bytes wherever
the sizes allow it, which a GPU's wide loads need. `triton_rows.py` has the same for kernels.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from triptych.kernels.quant import pages
from triptych.kernels.quant.ref import MX_GROUP

Index = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class RowFormat:
    """What one packed row of `dim` values is; `rope` trailing dims of an entry stay bf16."""

    kind: Literal["entry", "fp8", "mxfp4"]
    dim: int
    rope: int = 0

    @property
    def value_bytes(self) -> int:
        """Bytes of one row's values."""
        if self.kind == "entry":
            return self.dim + self.rope
        return self.dim if self.kind == "fp8" else self.dim // 2

    @property
    def scale_bytes(self) -> int:
        """Bytes of one row's scales."""
        if self.kind == "entry":
            return pages.entry_scale_bytes(self.dim, self.rope)
        return 4 if self.kind == "fp8" else self.dim // MX_GROUP

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.value_bytes + self.scale_bytes

    def pack(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows [N, dim] -> uint8 values [N, value_bytes] and scales [N, scale_bytes], rounded where they must be."""
        if self.kind == "entry":
            page = pages.pack_entries(rows, self.rope)
        elif self.kind == "fp8":
            page = pages.pack_index_keys_fp8(rows)
        else:
            page = pages.pack_index_keys_mxfp4(rows)
        cut = len(rows) * self.value_bytes
        return page[:cut].view(len(rows), -1), page[cut:].view(len(rows), -1)

    def unpack(self, values: Tensor, scales: Tensor) -> Tensor:
        """float32 rows [N, dim] of values [N, value_bytes] and scales [N, scale_bytes]."""
        page = torch.cat([values.flatten(), scales.flatten()])
        if self.kind == "entry":
            return pages.unpack_entries(page, len(values), self.dim, self.rope)
        if self.kind == "fp8":
            return pages.unpack_index_keys_fp8(page, len(values), self.dim)
        return pages.unpack_index_keys_mxfp4(page, len(values), self.dim)


@dataclass(frozen=True, slots=True)
class PackedRows:
    """A pool of packed rows: values uint8 [P, B, value_bytes], scales uint8 [P, B, scale_bytes], both strided views.

    Reads and writes like a float tensor [P, B, dim] under index tensors: `rows[page, offset]`. A flat index n, as
    window rings have, is page n // stretch and row n % stretch; `stretch` exceeds B where other rows lie between.
    """

    values: Tensor
    scales: Tensor
    format: RowFormat
    stretch: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Pages, rows of a page, values of a row."""
        return self.values.shape[0], self.values.shape[1], self.format.dim

    @property
    def dtype(self) -> torch.dtype:
        """uint8: what lies in memory."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self.values.device

    def __getitem__(self, index: Index) -> Tensor:
        """float32 [..., dim] of the rows at (page, offset) or at flat indices, of any shape."""
        page, offset = self._place(index)
        values, scales = self.values[page, offset], self.scales[page, offset]
        rows = self.format.unpack(values.flatten(0, -2), scales.flatten(0, -2))
        return rows.view(*values.shape[:-1], self.format.dim)

    def __setitem__(self, index: Index, rows: Tensor) -> None:
        """Write rows [N, dim] at N indices, rounded to the format."""
        page, offset = self._place(index)
        self.values[page, offset], self.scales[page, offset] = self.format.pack(rows)

    def _place(self, index: Index) -> tuple[Tensor, Tensor]:
        if isinstance(index, tuple):
            return index
        return index // self.stretch, index % self.stretch

    def only(self, row: int) -> PackedRows:
        """The pool of this one row of each page."""
        part = slice(row, row + 1)
        return PackedRows(self.values[:, part], self.scales[:, part], self.format, 1)

    def rounded(self, rows: Tensor) -> Tensor:
        """rows [N, dim] as they would be read back, in their own dtype."""
        return self.format.unpack(*self.format.pack(rows)).to(rows.dtype)


Rows = Tensor | PackedRows
"""Rows of a cache: a float tensor, or packed."""


def packed(memory: Tensor, offset: int, rows: int, form: RowFormat, stretch: int | None = None) -> PackedRows:
    """The rows of one section of each page: memory uint8 [P, bytes], `rows` rows from byte `offset` of a page on."""
    values, scales = rows * form.value_bytes, rows * form.scale_bytes
    return PackedRows(
        memory[:, offset : offset + values].unflatten(1, (rows, -1)),
        memory[:, offset + values : offset + values + scales].unflatten(1, (rows, -1)),
        form,
        stretch or rows,
    )


def write_rows(pool: Rows, index: Index, rows: Tensor) -> None:
    """Write rows [N, dim] at N places, flat or (page, offset), rounded to what the pool keeps."""
    if isinstance(pool, PackedRows) and pool.device.type == "cuda":
        importlib.import_module("triptych.kernels.quant.triton_rows").store_rows(pool, index, rows)
        return
    pool[index] = rows if isinstance(pool, PackedRows) else rows.to(pool.dtype)


def rounded_like(pool: Rows, rows: Tensor) -> Tensor:
    """rows [N, dim] as they will be read back from `pool`, in their own dtype."""
    return pool.rounded(rows) if isinstance(pool, PackedRows) else rows.to(pool.dtype).to(rows.dtype)
