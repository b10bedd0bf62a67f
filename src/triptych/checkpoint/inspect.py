"""What a checkpoint holds and everything that is wrong with it, as one value that a command can print."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from triptych.checkpoint.decode import Source
from triptych.checkpoint.reader import CheckpointReader
from triptych.checkpoint.sizes import active_parameters, backbone, parameters
from triptych.checkpoint.table import Part
from triptych.config import ModelShape

PARTS: tuple[Part, ...] = (
    "experts",
    "shared",
    "router",
    "attention",
    "compressor",
    "indexer",
    "mhc",
    "norms",
    "embedding",
    "mtp",
)


@dataclass(frozen=True, slots=True)
class Total:
    """Tensors, logical parameters (routing tables not counted) and stored bytes (scales counted)."""

    tensors: int = 0
    parameters: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """A checkpoint directory at a glance.

    `parameters` and `active_parameters` are the backbone's by its config.json; `parts` and `formats` count what the
    files hold. `problems` has one sentence for each thing that would keep it from loading.
    """

    directory: str
    dialect: str
    layers: dict[str, int]
    parameters: int
    active_parameters: int
    files: int
    bytes: int
    parts: dict[str, Total]
    formats: dict[str, Total]
    has_mtp: bool
    values_checked: bool
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def inspect_checkpoint(directory: Path | str, *, values: bool = False) -> CheckpointReport:
    """Look at the headers of a checkpoint and, if `values` is set, at every number in it.

    Raises ConfigError if there is no usable config.json and CheckpointError if there is no safetensors file at all;
    everything else that is wrong is in the report.
    """
    reader = CheckpointReader(directory, strict=False)
    problems = [str(problem) for problem in reader.problems]
    if values:
        problems += [str(problem) for problem in reader.check_values()]
    specs = backbone(reader.shape)
    sources = list(reader.sources.values())
    return CheckpointReport(
        directory=str(directory),
        dialect="transformers" if "layer_types" in reader.config else "official",
        layers=layer_kinds(reader.shape, reader.has_mtp),
        parameters=parameters(specs),
        active_parameters=active_parameters(reader.shape, specs),
        files=len(reader.files),
        bytes=sum(source.nbytes for source in sources),
        parts=_totals((source.spec.part, source) for source in sources),
        formats=_totals((source.format, source) for source in sources),
        has_mtp=reader.has_mtp,
        values_checked=values,
        problems=tuple(problems),
    )


def layer_kinds(shape: ModelShape, mtp: bool) -> dict[str, int]:
    """How many layers are SWA, CSA and HCA, how many route by token id, and the MTP blocks."""
    kinds = Counter(shape.ratios)
    return {
        "swa": kinds[0],
        "csa": len(shape.csa_layers),
        "hca": len(shape.hca_layers),
        "hash_routed": min(shape.num_hash_layers, shape.num_layers),
        "mtp": shape.num_mtp_layers if mtp else 0,
    }


def _totals(keyed: Iterable[tuple[str, Source]]) -> dict[str, Total]:
    out: dict[str, Total] = {}
    for key, source in keyed:
        old = out.get(key, Total())
        learned = 0 if source.spec.kind == "ids" else source.spec.numel
        out[key] = Total(old.tensors + 1, old.parameters + learned, old.bytes + source.nbytes)
    return out
