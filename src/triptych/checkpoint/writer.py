"""Writing checkpoints: any tensors of a shape, in either dialect and each weight format, in shards with an index.

Tensors stream through: what is held is one shard, and in the Transformers dialect the stacks of experts being filled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from triptych.checkpoint.names import fused_name, transformers_name
from triptych.checkpoint.progress import progress
from triptych.checkpoint.reader import INDEX_FILE, near
from triptych.checkpoint.sizes import Weights, stored_bytes
from triptych.checkpoint.synthetic import random_tensors
from triptych.checkpoint.table import TensorSpec, tensor_table
from triptych.config import ModelShape
from triptych.errors import CheckpointError, ConfigError, nearest, reason_of
from triptych.kernels.quant import ref as quant

Dialect = Literal["official", "transformers"]
SHARD_BYTES = 1 << 30


def synthesize(
    directory: Path | str,
    shape: ModelShape,
    *,
    dialect: Dialect = "official",
    weights: Weights = "bf16",
    seed: int = 0,
    max_shard_bytes: int = SHARD_BYTES,
    tokenizer: Path | None = None,
) -> None:
    """Write a checkpoint of random weights; the same bytes for the same arguments. See `write_checkpoint`."""
    tensors = random_tensors(shape, seed)
    write_checkpoint(
        directory,
        shape,
        tensors,
        weights=weights,
        dialect=dialect,
        max_shard_bytes=max_shard_bytes,
        tokenizer=tokenizer,
    )


def write_checkpoint(
    directory: Path | str,
    shape: ModelShape,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    weights: Weights = "bf16",
    dialect: Dialect = "official",
    max_shard_bytes: int = SHARD_BYTES,
    tokenizer: Path | None = None,
) -> None:
    """Write (official name, values) pairs in any order as config.json, safetensors shards and their index.

    MTP tensors may be absent from a Transformers checkpoint, which has no place for them. A `tokenizer` file is copied
    in as tokenizer.json. Raises CheckpointError for unknown, missing, repeated or misshapen tensors, ConfigError for a
    shape that the format cannot hold or a directory that holds a checkpoint already. Whatever goes wrong, no weights
    are left behind.
    """
    target = Path(directory)
    _check_format(shape, weights)
    _make_directory(target)
    shards = _Shards(target, max_shard_bytes)
    table = tensor_table(shape)
    try:
        with progress("Writing weights", stored_bytes(table.values(), weights)) as advance:
            for name, tensor in _stored(_checked(tensors, table, dialect), shape, weights, dialect):
                shards.add(name, tensor)
                advance(tensor.nbytes)
        with _writing(target):
            shards.finish()
            if tokenizer is not None:
                shutil.copyfile(tokenizer, target / "tokenizer.json")
            config = checkpoint_config(shape, weights=weights, dialect=dialect)
            (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except BaseException:
        shards.discard()
        raise


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """A full disk, or one that fails, as a ConfigError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{target} cannot be written: {reason_of(error)}.", "None of it is kept.") from None


def _make_directory(target: Path) -> None:
    """Never over an older checkpoint: it may be all that somebody has."""
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{target} cannot be made a directory: {error.strerror}.") from None
    old = [target / "config.json", target / INDEX_FILE, *target.glob("*.safetensors")]
    if any(path.exists() for path in old):
        raise ConfigError(f"{target} holds a checkpoint already.", "Choose another directory, or remove it first.")


def checkpoint_config(shape: ModelShape, *, weights: Weights, dialect: Dialect) -> dict[str, Any]:
    """The config.json of a checkpoint in one dialect and weight format."""
    config = shape.to_dict() if dialect == "official" else shape.to_transformers_dict()
    config["torch_dtype" if dialect == "official" else "dtype"] = "float32" if weights == "fp32" else "bfloat16"
    if weights == "fp8":
        config["expert_dtype"] = "fp4"
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "scale_fmt": "ue8m0",
            "weight_block_size": [quant.FP8_BLOCK, quant.FP8_BLOCK],
        }
    return config


def _check_format(shape: ModelShape, weights: Weights) -> None:
    if weights != "fp8":
        return
    for name in ("hidden_size", "moe_intermediate_size"):
        if getattr(shape, name) % quant.MX_GROUP:
            raise ConfigError(
                f"{name} {getattr(shape, name)} is no multiple of {quant.MX_GROUP}, the group of MXFP4 experts.",
                "Choose another size or write bf16.",
            )


def _checked(
    tensors: Iterable[tuple[str, Tensor]], table: dict[str, TensorSpec], dialect: Dialect
) -> Iterator[tuple[TensorSpec, Tensor]]:
    """The pairs with their specs. Raises CheckpointError at the first wrong one, and at the end if some are missing."""
    absent = dict(table)
    for name, tensor in tensors:
        spec = absent.pop(name, None)
        if spec is None:
            if name in table:
                raise CheckpointError(f"Tensor {name} was given twice.")
            raise CheckpointError(f"Tensor {name} is not part of this shape.", nearest(name, near(name, table)))
        if tuple(tensor.shape) != spec.shape:
            raise CheckpointError(f"Tensor {name} is {list(tensor.shape)}, expected {list(spec.shape)}.")
        if dialect == "official" or not name.startswith("mtp."):
            yield spec, tensor
    for name in absent:
        if dialect == "official" or not name.startswith("mtp."):
            raise CheckpointError(f"Tensor {name} is missing, and {len(absent) - 1} more.")


def _stored(
    tensors: Iterator[tuple[TensorSpec, Tensor]], shape: ModelShape, weights: Weights, dialect: Dialect
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as the files hold them."""
    stacks = _Stacks(shape.num_experts)
    for spec, tensor in tensors:
        for name, encoded in _encode(spec, tensor, weights):
            if dialect == "official":
                yield name, encoded
            elif (place := fused_name(name)) is not None:
                yield from stacks.fill(place, encoded)
            else:
                yield transformers_name(name), encoded


def _encode(spec: TensorSpec, tensor: Tensor, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """One tensor in the weight format, followed by its scales if it is quantised."""
    if spec.kind == "ids":
        yield spec.name, tensor.to(torch.int64)
    elif weights == "fp32" or spec.kind == "float32":
        yield spec.name, tensor.to(torch.float32)
    elif weights == "fp8" and spec.scale_name is not None:
        data, codes = quant.quantize_fp8(tensor) if spec.kind == "linear" else quant.quantize_mxfp4(tensor)
        yield spec.name, data
        yield spec.scale_name, codes.view(torch.float8_e8m0fnu)
    else:
        yield spec.name, tensor.to(torch.bfloat16)


class _Stacks:
    """Transformers' stacked experts, filled one matrix at a time and handed out when full."""

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self._open: dict[str, tuple[Tensor, int]] = {}

    def fill(self, place: tuple[str, int, int, int], piece: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Put `piece` where `place` (see `fused_name`) says; yields the stack if it was the last piece."""
        name, expert, part, parts = place
        rows = piece.shape[0]
        stack, left = self._open.pop(name, (None, self._experts * parts))
        if stack is None:
            stack = torch.empty(self._experts, parts * rows, *piece.shape[1:], dtype=piece.dtype)
        stack[expert, part * rows : (part + 1) * rows] = piece
        if left == 1:
            yield name, stack
        else:
            self._open[name] = stack, left - 1


class _Shards:
    """Collects tensors up to a size, writes them, and names the files once their number is known."""

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory = directory
        self._limit = limit
        self._tensors: dict[str, Tensor] = {}
        self._bytes = 0
        self._written: list[tuple[Path, list[str]]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Put one tensor into the current shard, or into a new one if it would grow over the limit."""
        if self._tensors and self._bytes + tensor.nbytes > self._limit:
            self._flush()
        self._tensors[name] = tensor.contiguous().clone() if _is_part(tensor) else tensor.contiguous()
        self._bytes += tensor.nbytes

    def _flush(self) -> None:
        path = self._directory / f"part-{len(self._written)}.safetensors"
        self._written.append((path, list(self._tensors)))
        with _writing(path):
            save_file(self._tensors, path, metadata={"format": "pt"})
        self._total += self._bytes
        self._tensors, self._bytes = {}, 0

    def finish(self) -> None:
        """Write what is left, name all files `model-00001-of-0000N.safetensors` and write their index."""
        self._flush()
        count = len(self._written)
        files = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        weight_map = {name: file for file, (_, names) in zip(files, self._written, strict=True) for name in names}
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
        index_file = self._directory / INDEX_FILE
        index_file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for file, (path, _) in zip(files, self._written, strict=True):
            path.chmod(index_file.stat().st_mode)  # the library writes files that only their owner can read
            path.rename(self._directory / file)

    def discard(self) -> None:
        """Remove every file written so far; a tokenizer may have been there before."""
        named = [*self._directory.glob("model-*-of-*.safetensors"), *(path for path, _ in self._written)]
        for path in [*named, self._directory / INDEX_FILE, self._directory / "config.json"]:
            path.unlink(missing_ok=True)


def _is_part(tensor: Tensor) -> bool:
    """True for a view into a larger buffer: safetensors refuses tensors that share memory."""
    return tensor.untyped_storage().nbytes() != tensor.nbytes
