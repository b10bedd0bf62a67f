"""Measurements on one NVIDIA GPU: `python -m benchmarks gpu`."""

from __future__ import annotations

import importlib.util


def main(argv: list[str]) -> int:
    """Run benchmarks.gpu.kernels where that is possible."""
    import torch

    if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
        print("This benchmark needs an NVIDIA GPU, a CUDA build of torch, and triton.")
        return 1
    from benchmarks.gpu.kernels import main as measure

    return measure(argv)
