"""Reading a checkpoint directory: every tensor under its official name, streamed, in whatever format it is stored.

What is checked before the first byte of data: that every expected tensor is there once, nothing else is, and all
shapes, dtypes and scales fit the shape that config.json describes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triptych.checkpoint import decode
from triptych.checkpoint.container import Stored, read_header, read_rows
from triptych.checkpoint.decode import Format, Source
from triptych.checkpoint.names import FUSED, official_name
from triptych.checkpoint.progress import progress
from triptych.checkpoint.table import TensorSpec, tensor_table
from triptych.config import ModelShape, read_config
from triptych.errors import CheckpointError, nearest
from triptych.kernels.quant import ref as quant

INDEX_FILE = "model.safetensors.index.json"
_IGNORED = re.compile(r"^mtp\.\d+\.(emb|embed|embed_tokens|head|lm_head|shared_head\.head)\.|rotary_emb\.inv_freq$")
"""Copies of embedding and head under an MTP block, and rope tables: the official converter drops them too."""

_EXACT_KINDS = ("norm", "float32", "router")
"""Read in float32 whatever was asked for: small, and rounding them changes which experts are taken."""


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as stored: `data` in its stored dtype and, if quantised, uint8 e8m0 codes or float32 block scales."""

    spec: TensorSpec
    format: Format
    data: Tensor
    scale: Tensor | None


class CheckpointReader:
    """A checkpoint directory, headers read and checked. Raises CheckpointError for the first thing wrong.

    With `strict=False` all that is wrong with names, shapes and dtypes is collected in `problems` instead.
    """

    def __init__(self, directory: Path | str, *, strict: bool = True) -> None:
        self.directory = Path(directory)
        self.config = read_config(self.directory / "config.json")
        self.shape = ModelShape.from_dict(self.config, source=str(self.directory / "config.json"))
        _check_quantization(self.config, self.directory)
        self.files, self._index = shard_files(self.directory)
        self.problems: list[CheckpointError] = []
        self._unreadable: set[str] = set()
        self._strict = strict
        table = tensor_table(self.shape)
        stored = self._collect()
        self._mtp = self._expects_mtp(stored)
        self.sources = self._resolve(table, stored)

    @property
    def has_mtp(self) -> bool:
        """True if the files hold the MTP blocks; what Transformers writes does not."""
        return self._mtp

    def tensors(
        self, dtype: torch.dtype = torch.float32, *, mtp: bool = True, show_progress: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """(official name, values), file by file. Matrices come in `dtype`, everything small in float32, ids in int64.

        Holds one tensor and one piece of it at a time. Raises CheckpointError where data are NaN, infinite or cut off.
        """
        sources = self._wanted(mtp)
        with progress("Loading weights", sum(s.nbytes for s in sources), show=show_progress) as advance:
            for source in sources:
                exact = source.spec.kind in _EXACT_KINDS
                yield source.spec.name, decode.values(source, torch.float32 if exact else dtype, self.shape)
                advance(source.nbytes)

    def raw_tensors(self, *, mtp: bool = True) -> Iterator[RawTensor]:
        """Every tensor as it is stored, with its scales: for devices that multiply FP8 and FP4 themselves."""
        for source in self._wanted(mtp):
            yield RawTensor(source.spec, source.format, read_rows(source.data), decode.read_scale(source))

    def check_values(self, *, show_progress: bool = True) -> Iterator[CheckpointError]:
        """One error for each tensor with NaN, infinite or out-of-range values. Reads everything."""
        sources = self._wanted(True)
        with progress("Checking values", sum(s.nbytes for s in sources), show=show_progress) as advance:
            for source in sources:
                try:
                    decode.check(source, self.shape)
                except CheckpointError as error:
                    yield error
                advance(source.nbytes)

    def _wanted(self, mtp: bool) -> list[Source]:
        """The sources in the order in which they lie in the files."""
        chosen = [s for s in self.sources.values() if mtp or not s.spec.name.startswith("mtp.")]
        return sorted(chosen, key=lambda s: (s.data.file.name, s.data.offset))

    def _report(self, error: CheckpointError) -> None:
        if self._strict:
            raise error
        self.problems.append(error)

    def _collect(self) -> dict[str, Stored]:
        """All stored tensors by official name, stacked experts taken apart."""
        found: dict[str, Stored] = {}
        for file in self.files:
            try:
                header = read_header(file) if file.is_file() else self._absent(file)
            except CheckpointError as error:
                self._report(error)
                self._unreadable.add(file.name)
                continue
            for stored in header.values():
                for name, piece in self._pieces(stored):
                    if name in found:
                        first = found[name]
                        self._report(
                            CheckpointError(
                                f"Tensor {name} comes twice: as {first.name} in {first.file} "
                                f"and as {stored.name} in {stored.file}."
                            )
                        )
                    found[name] = piece
        return found

    def _pieces(self, stored: Stored) -> Iterator[tuple[str, Stored]]:
        """The official tensors inside one stored tensor: itself, or the experts of a stack [E, rows, columns]."""
        name = official_name(stored.name)
        for fused, parts in FUSED.items():
            scale = name.endswith(fused + "_scale_inv")
            if not scale and not name.endswith(fused):
                continue
            layer = name[: name.index(fused)]
            experts, rows = self.shape.num_experts, len(parts)
            if len(stored.shape) != 3 or stored.shape[0] != experts or stored.shape[1] % rows:
                self._report(
                    CheckpointError(
                        f"Tensor {stored.name} in {stored.file} is {stored}, expected a stack of {experts} experts."
                    )
                )
                return
            step = stored.shape[1] // rows
            for expert in range(experts):
                for index, part in enumerate(parts):
                    end = "scale" if scale else "weight"
                    piece = stored.part(expert, index * step, (index + 1) * step)
                    yield f"{layer}ffn.experts.{expert}.{part}.{end}", piece
            return
        yield name, stored

    def _expects_mtp(self, stored: dict[str, Stored]) -> bool:
        """False where MTP blocks are absent legitimately: Transformers drops them when it writes."""
        if any(name.startswith("mtp.") and not _IGNORED.search(name) for name in stored):
            return True
        return self.shape.num_mtp_layers > 0 and "layer_types" not in self.config

    def _resolve(self, table: dict[str, TensorSpec], stored: dict[str, Stored]) -> dict[str, Source]:
        sources: dict[str, Source] = {}
        rest = dict(stored)
        for name, spec in table.items():
            if name.startswith("mtp.") and not self._mtp:
                continue
            data = rest.pop(name, None)
            scale = rest.pop(spec.scale_name, None) if spec.scale_name else None
            try:
                if data is not None:
                    sources[name] = decode.resolve(spec, data, scale)
                elif self._index.get(name) not in self._unreadable:
                    self._missing(spec)
            except CheckpointError as error:
                self._report(error)
        for name, extra in rest.items():
            if not _IGNORED.search(name):
                hint = nearest(name, near(name, table))
                self._report(CheckpointError(f"Tensor {extra.name} in {extra.file} is not part of this model.", hint))
        return sources

    def _missing(self, spec: TensorSpec) -> None:
        hint = "If this checkpoint has no MTP block, set num_nextn_predict_layers to 0 in config.json."
        listed = self._index.get(spec.name)
        where = f"not in {listed}, where the index puts it" if listed else f"in none of the {len(self.files)} files"
        raise CheckpointError(
            f"Tensor {spec.name} {list(spec.shape)} is {where} ({self.directory}).",
            hint if spec.name.startswith("mtp.") else "",
        )

    def _absent(self, file: Path) -> dict[str, Stored]:
        tensor = next((name for name, shard in self._index.items() if shard == file.name), "weights")
        raise CheckpointError(
            f"The index puts tensor {tensor} in {file}, but there is no such file.", "Fetch the missing shard."
        )


def _check_quantization(config: dict[str, Any], directory: Path) -> None:
    """Formats are taken from the files, tensor by tensor; what config.json says must only not contradict them."""
    given = config.get("quantization_config")
    for key, known in (("quant_method", "fp8"), ("fmt", "e4m3"), ("weight_block_size", [quant.FP8_BLOCK] * 2)):
        found = given.get(key) if isinstance(given, dict) else None
        if found not in (None, known):
            raise CheckpointError(
                f"{directory / 'config.json'}: quantization_config has {key} {found!r}, but DeepSeek-V4 has {known!r}."
            )


def near(name: str, table: dict[str, TensorSpec]) -> list[str]:
    """Names worth comparing with: of the same block, or those at the top. All names would take minutes."""
    block = ".".join(name.split(".")[:2]) + "."
    same = [known for known in table if known.startswith(block)]
    return same or [known for known in table if known.count(".") < 2]


def shard_files(directory: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    """The safetensors files of a checkpoint, and its index as official name -> file name.

    Without an index: all files there are, and an empty index. Raises CheckpointError if there is none or no good one.
    """
    index = directory / INDEX_FILE
    if not index.exists():
        found = tuple(sorted(directory.glob("*.safetensors")))
        if not found:
            raise CheckpointError(f"There is no safetensors file in {directory}.", "Point at a checkpoint directory.")
        return found, {}
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is no index of safetensors files: it has no usable weight_map.") from None
    return tuple(directory / name for name in names), {official_name(key): file for key, file in weight_map.items()}
