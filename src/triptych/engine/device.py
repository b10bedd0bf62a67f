"""Which device an engine runs on, what that device has free, and how a step's indices get there."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from triptych.config import EngineConfig
from triptych.engine.memory import free_memory
from triptych.errors import ConfigError
from triptych.kernels.registry import Choice, loaded, table
from triptych.model.batch import Batch

logger = logging.getLogger(__name__)

_CAPABILITY = (8, 0)  # Ampere: bfloat16 in the tensor cores and asynchronous copies, which the kernels build on
STEP_TOKENS = {"cpu": 512, "cuda": 8192}
"""Rows of a step by kind of device: on a GPU so many that every expert is kept busy."""
_ALIGN = 2  # int64 of 16 bytes: where each vector of a step begins in the one copy


class GpuFacts(NamedTuple):
    """What is known of the GPU that would be used; `problem` is why it cannot be, or None."""

    name: str
    capability: tuple[int, int]
    memory: int
    problem: str | None


def gpu() -> GpuFacts | None:
    """The first NVIDIA GPU that torch sees, or None."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    capability = (properties.major, properties.minor)
    problem = None
    if capability < _CAPABILITY:
        problem = (
            f"{properties.name} has compute capability {capability[0]}.{capability[1]}; "
            f"Triptych needs {_CAPABILITY[0]}.{_CAPABILITY[1]} or newer."
        )
    return GpuFacts(properties.name, capability, properties.total_memory, problem)


def device_for(config: EngineConfig) -> torch.device:
    """The device that `config` asks for. ConfigError if it is not there or cannot run the model."""
    if config.device == "cpu":
        return torch.device("cpu")
    facts = gpu()
    if facts is not None and facts.problem is None:
        return torch.device("cuda", 0)
    if config.device == "auto":
        if facts is not None:
            logger.warning("%s The processor is used.", facts.problem)
        return torch.device("cpu")
    if facts is not None:
        raise ConfigError(str(facts.problem), "Use --device cpu.")
    if torch.version.cuda is None:
        raise ConfigError(
            f"The installed torch {torch.__version__} has no CUDA.",
            "Install a CUDA build of torch (make TORCH=...), or use --device cpu.",
        )
    raise ConfigError("torch finds no NVIDIA GPU.", "Check nvidia-smi and the driver, or use --device cpu.")


def with_defaults(config: EngineConfig, device: torch.device) -> EngineConfig:
    """`config` with what it leaves to the device filled in: the rows of a step."""
    if config.step_tokens is not None:
        return config
    return replace(config, step_tokens=max(STEP_TOKENS[kind_of(device)], config.max_running))


def kind_of(device: torch.device) -> Literal["cpu", "cuda"]:
    """The kind of device, as the kernel registry names it."""
    return "cuda" if device.type == "cuda" else "cpu"


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a GPU; None for the processor."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def kernels_for(config: EngineConfig, device: torch.device) -> tuple[Choice, ...]:
    """Which kernels serve each operation on `device`. ConfigError if those asked for cannot."""
    rows = table(
        config.kernel_backend,
        deterministic=config.deterministic,
        device=kind_of(device),
        capability=capability_of(device),
    )
    return tuple(loaded(row, config.kernel_backend) for row in rows)


def free_device_memory(device: torch.device) -> int:
    """Bytes that new allocations on `device` can have; of a GPU those that no process holds."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_memory()


def on_device(batch: Batch, device: torch.device) -> Batch:
    """`batch` with all of its vectors on `device`, in one copy; itself if it is there already."""
    return batch if device.type == "cpu" else sized(batch, staged(batch).to(device, non_blocking=True))


def staged(batch: Batch) -> Tensor:
    """All of a batch's vectors, which are int64, one after the other in one pinned vector."""
    found = list(_tensors(batch))
    starts, total = _starts(found)
    host = torch.empty(max(total, 1), dtype=torch.int64, pin_memory=torch.cuda.is_available())
    room = host.numpy()  # whose small copies take a fraction of the time of torch's
    for tensor, start in zip(found, starts, strict=True):
        assert tensor.dtype == torch.int64, tensor.dtype
        room[start : start + tensor.numel()] = tensor.numpy().reshape(-1)
    return host


def sized(batch: Batch, there: Tensor) -> Batch:
    """A batch with the sizes of `batch` whose vectors are views of `there`, which is laid out as by `staged`."""
    found = list(_tensors(batch))
    views = [there[at : at + t.numel()].view(t.shape) for t, at in zip(found, _starts(found)[0], strict=True)]
    moved: Batch = _rebuilt(batch, iter(views))
    return moved


def signature(value: Any) -> tuple[object, ...]:
    """Sizes of all tensors inside and all numbers: what a graph of a batch is recorded for."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    parts = _parts(value)
    return tuple(signature(part) for part in parts.values()) if parts else (value if isinstance(value, int) else None,)


def _starts(tensors: list[Tensor]) -> tuple[list[int], int]:
    """Where each tensor begins in one vector, and how long that is."""
    starts, total = [], 0
    for tensor in tensors:
        starts.append(total)
        total += -(-tensor.numel() // _ALIGN) * _ALIGN
    return starts, total


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors inside dataclasses, named tuples and mappings, in a fixed order."""
    if isinstance(value, Tensor):
        yield value
    else:
        for part in _parts(value).values():
            yield from _tensors(part)


def _rebuilt(value: Any, tensors: Iterator[Tensor]) -> Any:
    """`value` with its tensors replaced, in the order of `_tensors`."""
    if isinstance(value, Tensor):
        return next(tensors)
    parts = {name: _rebuilt(part, tensors) for name, part in _parts(value).items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **parts)
    if isinstance(value, dict):
        return parts
    return type(value)(**parts) if isinstance(value, tuple) else value


def _parts(value: Any) -> dict[Any, Any]:
    """What a dataclass, a named tuple or a mapping holds, by name; nothing for anything else."""
    if is_dataclass(value):
        return {item.name: getattr(value, item.name) for item in fields(value)}
    if isinstance(value, dict):
        return value
    return {name: getattr(value, name) for name in getattr(value, "_fields", ())}
