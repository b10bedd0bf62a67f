"""Safetensors files: the header checked entry by entry, the data read in pieces.

Read by hand rather than mapped into memory: a mapped shard stays resident once touched, and a header that is wrong
should name the tensor that is.

    | 8 bytes: length n | n bytes of JSON: name -> dtype, shape, [begin, end) | data |
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triptych.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LONGEST_HEADER = 100_000_000  # what the safetensors library allows


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor, or a row range of one, where it lies: [offset, offset + nbytes) of `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.itemsize

    def part(self, index: int, start: int, stop: int) -> Stored:
        """Rows [start, stop) of matrix `index` of a stack [E, rows, ...]: a contiguous piece."""
        rows = self.shape[1]
        row = math.prod(self.shape[2:]) * self.itemsize
        size = (stop - start, *self.shape[2:])
        return Stored(self.name, self.file, self.dtype, size, self.offset + (index * rows + start) * row)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file. Raises CheckpointError if it is none, truncated or inconsistent."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise CheckpointError(f"{path} is no safetensors file, or cut off inside its header.")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"There is no file {path}.", "Fetch the missing shard.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise CheckpointError(f"{path} is no safetensors file: its header is not JSON.") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is no safetensors file: its header is no JSON object.")
    header.pop("__metadata__", None)
    tensors = {name: _entry(path, name, raw, 8 + length) for name, raw in header.items()}
    _check_extents(path, tensors, 8 + length, size)
    return tensors


def _entry(path: Path, name: str, raw: Any, start: int) -> Stored:
    try:
        dtype, shape, (begin, end) = raw["dtype"], tuple(raw["shape"]), raw["data_offsets"]
        numbers = (*shape, begin, end)
        if not isinstance(dtype, str) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"The header of {path} describes tensor {name} by {str(raw)[:100]!r}.") from None
    if dtype not in DTYPES:
        raise CheckpointError(f"Tensor {name} in {path} has the unknown dtype {dtype!r}.")
    stored = Stored(name, path, dtype, shape, start + begin)
    if stored.nbytes != end - begin:
        raise CheckpointError(
            f"Tensor {name} in {path} is {stored}: {stored.nbytes} bytes, but its header gives it {end - begin}."
        )
    return stored


def _check_extents(path: Path, tensors: dict[str, Stored], start: int, size: int) -> None:
    """The tensors must fill the file from `start` to `size` without gap or overlap, as the format demands."""
    at = start
    for stored in sorted(tensors.values(), key=lambda s: (s.offset, s.nbytes)):
        end = stored.offset + stored.nbytes
        if end > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {stored.name} ends at byte {end}, the file at byte {size}.",
                "Fetch the file again.",
            )
        if stored.offset != at:
            raise CheckpointError(f"Tensor {stored.name} in {path} starts at byte {stored.offset}, expected {at}.")
        at = end
    if at != size:
        raise CheckpointError(f"{path} has {size - at} bytes behind its last tensor.", "Fetch the file again.")


def read_rows(stored: Stored, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows [start, stop) of a stored tensor in its stored dtype, in fresh memory."""
    rows = stored.shape[0] if stored.shape else 1
    stop = rows if stop is None else min(stop, rows)
    row = stored.nbytes // rows if rows else 0
    buffer = torch.empty((stop - start) * row, dtype=torch.uint8)
    view = buffer.numpy().data
    try:
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.offset + start * row)
            while view:
                got = file.readinto(view)
                if not got:
                    raise CheckpointError(f"{stored.file} became shorter while tensor {stored.name} was read.")
                view = view[got:]
    except OSError as error:
        raise CheckpointError(f"{stored.file} cannot be read: {error.strerror}.") from None
    size = (stop - start, *stored.shape[1:]) if stored.shape else ()
    return buffer.view(DTYPES[stored.dtype]).view(size)


def row_pieces(stored: Stored, limit: int, multiple: int) -> Iterator[tuple[int, int]]:
    """Row ranges that cover a stored tensor, each at most `limit` bytes or `multiple` rows, starts on `multiple`."""
    rows = stored.shape[0] if stored.shape else 1
    row = max(1, stored.nbytes // max(rows, 1))
    step = max(multiple, limit // row // multiple * multiple)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)
