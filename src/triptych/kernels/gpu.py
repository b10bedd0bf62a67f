"""What Triton kernels ask about the GPU."""

from __future__ import annotations

from functools import cache

import torch


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; on a processor, where Triton interprets, the number of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
