"""Runs tests/gpu/sanitize.py as if this processor were an H200 on which no kernel does anything.

Prints the kernels that no part launches. What a launch is given, its grid and its tensors' shapes, is made as on a GPU,
so a part that does not fit the functions it calls fails here.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from triton.runtime.jit import JITFunction

from triptych.kernels import gpu

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
WHOLE_ENGINES = ("steps", "vendor")
"""Parts that need more of a GPU than this."""
THEIRS = {
    "quant.triton_rows._store_rows", "window.triton._copy", "attend_rows.vendor_chunks._prepare_chunk",
    "attend_rows.vendor_chunks._widen", "attend_rows.vendor_rows.prepare", "attend_rows.vendor_rows.turn_back",
}  # fmt: skip
"""What only those launch."""


class OnProcessor(TorchFunctionMode):
    """Tensors of "cuda" are made on the processor, and say that they are on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {}) | ({"pin_memory": False} if kwargs and "pin_memory" in kwargs else {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and str(args[1]).startswith("cuda"):
            args = (args[0], "cpu", *args[2:])
        if func is torch.mm and "out_dtype" in kwargs:
            product = torch.mm(args[0].float(), args[1].float()).to(kwargs["out_dtype"])
            return kwargs["out"].copy_(product) if "out" in kwargs else product
        if getattr(func, "__name__", "") == "_scaled_mm":
            return torch.zeros(len(args[0]), args[1].shape[1], dtype=kwargs["out_dtype"])
        return func(*args, **kwargs)


def launch(kernel: Any, *args: Any, grid: Any = None, **kwargs: Any) -> None:
    """In place of a kernel's run."""
    assert grid and all(int(size) > 0 for size in grid), (kernel, grid)


def main() -> None:
    """Run the parts."""
    found = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=232448)
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # type: ignore[assignment]
    torch.cuda.get_device_properties = lambda *_: found  # type: ignore[assignment, return-value]
    torch.cuda.Stream = lambda *_: None  # type: ignore[assignment, misc]
    torch.cuda.current_stream = lambda *_: SimpleNamespace(cuda_stream=0)  # type: ignore[assignment, return-value]
    torch.cuda.stream = lambda _: nullcontext()  # type: ignore[assignment, misc, return-value]
    gpu.is_hopper = lambda device: True  # type: ignore[assignment]
    JITFunction.run = launch
    import sanitize

    from triptych.kernels.frames import engines
    from triptych.kernels.linear import triton as linears

    engines.driver_copies = lambda: lambda *_: None  # type: ignore[assignment]
    linears._library_can = lambda device: True  # type: ignore[assignment]
    launches = sanitize.Launches()
    with OnProcessor():
        for name, part in sanitize.PARTS.items():
            if name not in WHOLE_ENGINES:
                part()
    print("left out:", *(name for name in launches.missing() if name not in THEIRS))


if __name__ == "__main__":
    main()
