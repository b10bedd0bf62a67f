"""Weights that come as tensors and not as files, from a trainer say: the same names, formats and checks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from triptych.checkpoint.container import DTYPES
from triptych.checkpoint.names import FUSED, official_name
from triptych.checkpoint.reader import near
from triptych.checkpoint.table import TensorSpec, tensor_table
from triptych.config import ModelShape
from triptych.errors import CheckpointError, nearest
from triptych.kernels.quant import ref as quant

_PACKED = (torch.int8, torch.uint8)
_E4M3_NAN = 0x7F  # beside the sign: the only code of float8_e4m3fn that is no number
_HEADER_BYTES = 100 << 20  # as the format's own library allows


class Named(NamedTuple):
    """One tensor as `WeightStore.place` takes it: official name, data and, where they are quantised, scales."""

    name: str
    data: Tensor
    scale: Tensor | None = None


def official_tensors(tensors: Iterable[tuple[str, Tensor]], shape: ModelShape) -> Iterator[Named]:
    """The tensors of a stream under their official names, each checked; see `official_name` for other namings.

    Data are float32, bfloat16 or float16, or float8_e4m3fn and packed e2m1 (int8, uint8) with scales that come as
    tensors of their own, earlier or later; stacks of experts are taken apart. Raises CheckpointError that names the
    tensor: it is unknown, comes twice, has another shape or dtype, holds NaN or infinity, or lacks its scales.
    """
    table = tensor_table(shape)
    scales = {spec.scale_name: spec for spec in table.values() if spec.scale_name is not None}
    seen: set[str] = set()
    waiting: dict[str, Tensor] = {}  # quantised data without scales so far, and scales without data
    for given, whole in tensors:
        for name, tensor in _pieces(given, whole, shape):
            if name not in table and name not in scales:
                raise CheckpointError(f"Tensor {given} is not part of this model.", nearest(name, near(name, table)))
            if name in seen:
                raise CheckpointError(f"Tensor {given} comes twice.")
            seen.add(name)
            spec = table.get(name) or scales[name]
            if name in scales or _is_quantised(spec, tensor):
                other = str(spec.scale_name) if name in table else spec.name
                if other not in waiting:
                    waiting[name] = tensor
                    continue
                pair = waiting.pop(other)
                named = Named(spec.name, tensor, pair) if name in table else Named(spec.name, pair, tensor)
            else:
                named = Named(spec.name, tensor)
            yield _checked(spec, named, shape.num_experts)
    for name in waiting:
        lacks = f"its scales {table[name].scale_name}" if name in table else f"the quantised tensor {scales[name].name}"
        raise CheckpointError(f"Tensor {name} came without {lacks}.")


def safetensors_stream(pieces: Iterable[bytes]) -> Iterator[tuple[str, Tensor]]:
    """(stored name, tensor) of a safetensors file that arrives in pieces; one tensor is held at a time.

    CheckpointError where the bytes are no such file, or end too early.
    """
    source = _Bytes(pieces)
    length = int.from_bytes(source.take(8), "little")
    if length > _HEADER_BYTES:
        raise CheckpointError("What was sent is no safetensors file.", "Send the bytes of one, from its first on.")
    at = 0
    for start, end, name, code, shape in _entries(source.take(length)):
        dtype = DTYPES.get(code)
        if dtype is None or start != at or end - start != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(f"Tensor {name} is {code} {shape} in bytes {start} to {end}, which cannot be.")
        data = source.take(end - start)
        flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        yield name, flat.view(dtype).reshape(shape)
        at = end


def _entries(header: bytearray) -> list[tuple[int, int, str, str, list[int]]]:
    """(first byte, last byte + 1, name, dtype, shape) of each tensor, in the order in which they lie."""
    try:
        rows = json.loads(header)
        rows.pop("__metadata__", None)
        found = []
        for name, row in rows.items():
            first, last = map(int, row["data_offsets"])
            found.append((first, last, str(name), str(row["dtype"]), list(map(int, row["shape"]))))
        return sorted(found)
    except (ValueError, TypeError, LookupError, AttributeError):
        raise CheckpointError("What was sent has no header of a safetensors file.") from None


class _Bytes:
    """Exactly as many bytes as one asks for, out of pieces of any size."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._rest = memoryview(b"")

    def take(self, count: int) -> bytearray:
        out, filled = bytearray(count), 0
        while filled < count:
            if not self._rest:
                piece = next(self._pieces, None)
                if piece is None:
                    raise CheckpointError(f"The weights end early: {count - filled:,} bytes of a tensor are missing.")
                self._rest = memoryview(piece)
            part = self._rest[: count - filled]
            out[filled : filled + len(part)] = part
            self._rest = self._rest[len(part) :]
            filled += len(part)
        return out


def check_numbers(name: str, data: Tensor) -> None:
    """CheckpointError if `data` hold a value that is no finite number; packed values always are."""
    if data.dtype == torch.float8_e4m3fn:
        bad = int(((data.view(torch.uint8) & _E4M3_NAN) == _E4M3_NAN).sum())
    else:
        bad = int((~torch.isfinite(data)).sum()) if data.is_floating_point() else 0
    if bad:
        raise CheckpointError(f"Tensor {name} holds {bad} values that are NaN or infinite.")


def _pieces(given: str, tensor: Tensor, shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """The official tensors inside one: itself, or the matrices of a stack of experts [E, rows, columns]."""
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"Tensor {given} is of type {type(tensor).__name__}, not a tensor.")
    name, tensor = official_name(given), tensor.detach()
    for fused, parts in FUSED.items():
        if not name.endswith((fused, fused + "_scale_inv")):
            continue
        if tensor.dim() != 3 or tensor.shape[0] != shape.num_experts or tensor.shape[1] % len(parts):
            raise CheckpointError(
                f"Tensor {given} is {list(tensor.shape)}, expected a stack of {shape.num_experts} experts."
            )
        end = "scale" if name.endswith("_scale_inv") else "weight"
        layer = name[: name.index(fused)]
        for expert, matrices in enumerate(tensor.unbind()):
            for part, matrix in zip(parts, matrices.chunk(len(parts)), strict=True):
                yield f"{layer}ffn.experts.{expert}.{part}.{end}", matrix
        return
    yield name, tensor


def _is_quantised(spec: TensorSpec, tensor: Tensor) -> bool:
    return tensor.dtype == torch.float8_e4m3fn or (spec.kind == "expert" and tensor.dtype in _PACKED)


def _checked(spec: TensorSpec, named: Named, experts: int) -> Named:
    name, data, scale = named
    fp8, packed = data.dtype == torch.float8_e4m3fn, scale is not None and data.dtype in _PACKED
    if spec.kind == "ids":
        fits = data.dtype in (torch.int64, torch.int32)
    elif fp8 or packed:
        fits = spec.kind == "expert" or (fp8 and spec.kind == "linear")
    else:
        fits = scale is None and data.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not fits:
        raise CheckpointError(
            f"Tensor {name} is {str(data.dtype).removeprefix('torch.')}, which is none of its formats.",
            "Send int64 for routing tables, for all others float32, bfloat16 or float16.",
        )
    rows, columns = spec.shape[0], spec.shape[-1]
    _expect(name, data, (rows, columns // 2) if packed else spec.shape)
    if scale is not None:
        block, group = quant.FP8_BLOCK, quant.MX_GROUP
        blocks = (rows, columns // group) if packed else (-(-rows // block), -(-columns // block))
        _expect(str(spec.scale_name), scale, blocks)
        scale = _codes(spec, scale, packed)
    if spec.kind == "ids":
        _check_ids(name, data, experts)
    check_numbers(name, data)
    return Named(name, data, scale)


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"Tensor {name} is {list(tensor.shape)}, expected {list(shape)}.")


def _codes(spec: TensorSpec, scale: Tensor, packed: bool) -> Tensor:
    """Scales as e8m0 codes uint8, or float32 as they come."""
    codes = scale.view(torch.uint8) if scale.element_size() == 1 else scale
    bad = codes == quant.E8M0_NAN if codes.dtype == torch.uint8 else ~torch.isfinite(codes)
    if (packed and codes.dtype != torch.uint8) or codes.dtype not in (torch.uint8, torch.float32):
        raise CheckpointError(f"Tensor {spec.scale_name} is {scale.dtype}, expected float8_e8m0fnu.")
    if bool(bad.any()):
        raise CheckpointError(f"Tensor {spec.scale_name} holds a scale that is no number.")
    return codes


def _check_ids(name: str, data: Tensor, experts: int) -> None:
    bad = (data < 0) | (data >= experts)
    if bool(bad.any()):
        raise CheckpointError(f"Tensor {name} names expert {int(data[bad][0])}, expected 0 to {experts - 1}.")
