"""From stored bytes to the values they stand for, a piece at a time.

| stored                                   | values                                     |
|------------------------------------------|--------------------------------------------|
| F32, BF16, F16                           | themselves                                 |
| F8_E4M3 [R, C] + scale per 128 x 128     | e4m3 * scale                               |
| I8 or U8 [R, C/2] + scale per 32 columns | e2m1 pairs * scale                         |
| I64, I32                                 | themselves, int64                          |
Scales are e8m0 bytes, or float32 as in the -Base releases. Source: reference section 5.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from triptych.checkpoint.container import Stored, read_rows, row_pieces
from triptych.checkpoint.table import TensorSpec
from triptych.config import ModelShape
from triptych.errors import CheckpointError
from triptych.kernels.quant import ref as quant

PIECE_BYTES = 4 << 20
"""Stored bytes decoded at once; more only costs memory."""

Format = Literal["float32", "bfloat16", "float16", "fp8", "mxfp4", "int64", "int32"]
_FLOATS: dict[str, Format] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_INTS: dict[str, Format] = {"I64": "int64", "I32": "int32"}
_SCALE_DTYPES = ("F8_E8M0", "U8", "F32")


@dataclass(frozen=True, slots=True)
class Source:
    """Where an expected tensor comes from: its spec, its data and, if quantised, its scales."""

    spec: TensorSpec
    data: Stored
    scale: Stored | None
    format: Format

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales."""
        return self.data.nbytes + (self.scale.nbytes if self.scale is not None else 0)


def resolve(spec: TensorSpec, data: Stored, scale: Stored | None) -> Source:
    """How `data` holds `spec`. Raises CheckpointError where dtype, shape or scales do not fit."""
    if spec.kind == "ids":
        found: Format | None = _INTS.get(data.dtype)
        _expect(found is not None, spec, data, "I64 or I32")
    elif data.dtype in _FLOATS:
        found = _FLOATS[data.dtype]
    elif spec.kind in ("linear", "expert") and data.dtype == "F8_E4M3":
        found = "fp8"
    elif spec.kind == "expert" and data.dtype in ("I8", "U8"):
        found = "mxfp4"
    else:
        found = None
    _expect(found is not None, spec, data, _allowed(spec))
    assert found is not None
    shape = (spec.shape[0], spec.shape[1] // 2) if found == "mxfp4" else spec.shape
    if data.shape != shape:
        raise CheckpointError(
            f"Tensor {data.name} in {data.file} is {data}, expected {list(shape)} for {spec.name} of this config.json."
        )
    if found in ("fp8", "mxfp4"):
        _check_scale(spec, data, scale, found)
        return Source(spec, data, scale, found)
    if scale is not None:
        raise CheckpointError(f"Tensor {scale.name} in {scale.file} scales {data.name}, which is {data.dtype}.")
    return Source(spec, data, None, found)


def _allowed(spec: TensorSpec) -> str:
    extra = {"linear": ", or F8_E4M3 with scales", "expert": ", or F8_E4M3 or packed I8 with scales"}
    return "F32, BF16 or F16" + extra.get(spec.kind, "")


def _expect(fits: bool, spec: TensorSpec, data: Stored, allowed: str) -> None:
    if not fits:
        raise CheckpointError(f"Tensor {data.name} in {data.file} is {data.dtype}, expected {allowed}.")


def _check_scale(spec: TensorSpec, data: Stored, scale: Stored | None, found: Format) -> None:
    rows, columns = spec.shape
    block = quant.FP8_BLOCK
    shape = (-(-rows // block), -(-columns // block)) if found == "fp8" else (rows, columns // quant.MX_GROUP)
    if scale is None:
        raise CheckpointError(
            f"Tensor {data.name} in {data.file} is {data.dtype} and needs scales {spec.scale_name} {list(shape)}."
        )
    if scale.dtype not in _SCALE_DTYPES or (found == "mxfp4" and scale.dtype == "F32"):
        raise CheckpointError(f"Tensor {scale.name} in {scale.file} is {scale.dtype}, expected F8_E8M0.")
    if scale.shape != shape:
        raise CheckpointError(f"Tensor {scale.name} in {scale.file} is {scale}, expected {list(shape)}.")


def values(source: Source, dtype: torch.dtype, shape: ModelShape) -> Tensor:
    """The logical values of one tensor in `dtype` (int64 for ids). Raises CheckpointError for NaN, Inf and bad ids."""
    spec = source.spec
    out = torch.empty(spec.shape, dtype=torch.int64 if spec.kind == "ids" else dtype)
    for start, stop, piece in pieces(source, shape):
        out[start:stop] = piece
    return out


def check(source: Source, shape: ModelShape) -> None:
    """Raises CheckpointError if a tensor holds NaN, Inf or expert ids that do not exist."""
    for _ in pieces(source, shape):
        pass


def pieces(source: Source, shape: ModelShape) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, logical values of rows [start, stop)), checked, a bounded piece at a time."""
    scale = read_scale(source)
    for start, stop in row_pieces(source.data, PIECE_BYTES, quant.FP8_BLOCK):
        piece = _decode(source, read_rows(source.data, start, stop), scale, start, stop)
        if source.spec.kind == "ids":
            _check_ids(source, piece, shape.num_experts, start)
        else:
            _check_finite(source, piece)
        yield start, stop, piece


def read_scale(source: Source) -> Tensor | None:
    """The scales as stored: uint8 e8m0 codes or float32; None for tensors without. CheckpointError for NaN scales."""
    if source.scale is None:
        return None
    raw = read_rows(source.scale)
    codes = raw.view(torch.uint8) if raw.element_size() == 1 else raw
    bad = codes == quant.E8M0_NAN if codes.dtype == torch.uint8 else ~torch.isfinite(codes)
    if bool(bad.any()):
        where = torch.nonzero(bad)[0].tolist()
        raise CheckpointError(f"Tensor {source.scale.name} in {source.scale.file} holds a NaN scale at {where}.")
    return codes


def _decode(source: Source, raw: Tensor, scale: Tensor | None, start: int, stop: int) -> Tensor:
    if scale is None:
        return raw
    if source.format == "mxfp4":
        return quant.dequantize_mxfp4(raw, scale[start:stop])
    block = quant.FP8_BLOCK
    return quant.dequantize_fp8(raw, scale[start // block : -(-stop // block)])


def _check_finite(source: Source, piece: Tensor) -> None:
    bad = ~torch.isfinite(piece)
    if bool(bad.any()):
        data = source.data
        raise CheckpointError(
            f"Tensor {data.name} in {data.file} holds {int(bad.sum())} values that are NaN or infinite.",
            "Every weight must be a finite number: fetch the file again or export it anew.",
        )


def _check_ids(source: Source, piece: Tensor, experts: int, start: int) -> None:
    bad = (piece < 0) | (piece >= experts)
    if bool(bad.any()):
        row, column = torch.nonzero(bad)[0].tolist()
        data = source.data
        raise CheckpointError(
            f"Tensor {data.name} in {data.file} sends token {start + row} to expert {int(piece[row, column])}, "
            f"expected 0 to {experts - 1}."
        )
