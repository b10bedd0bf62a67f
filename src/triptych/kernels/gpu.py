"""What Triton kernels ask about the GPU."""

from __future__ import annotations

from functools import cache

import torch


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; on a processor, where Triton interprets, the number of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program can have; on a processor those of an H100."""
    if device.type != "cuda":
        return 232448
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 49152))


def rounds_rows(device: torch.device, width: int) -> bool:
    """Whether what makes rows of a product rounds them: for Hopper's products, in whole groups of 128 columns.

    On a processor, where Triton interprets, too.
    """
    return width % 128 == 0 and (device.type == "cpu" or is_hopper(device))


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether the GPU has the instructions of compute capability 9.0, which later ones lack."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
