"""Runs in a process of its own, with Triton's interpreter: frames that come up from the host."""

from __future__ import annotations

import ctypes
import json

import torch
from frames_cases import SIZES, comes_up

from triptych.kernels.frames import engines, triton


def copies(to: engines.Addresses, from_: engines.Addresses, size: int, _: int) -> None:
    """What the driver does."""
    for target, source in zip(to.tolist(), from_.tolist(), strict=True):
        ctypes.memmove(target, source, size)


class Stream:
    cuda_stream = 0


if __name__ == "__main__":
    triton._PROGRAMS = 3  # the interpreter is slow
    engines.driver_copies = lambda: copies  # type: ignore[assignment]
    torch.cuda.current_stream = lambda _: Stream  # type: ignore[assignment]
    for size in SIZES:
        for count in (0, 1, 4):
            for way in (triton, engines):
                what = f"{count} frames of {size} bytes, {way.__name__}"
                print(json.dumps({"what": what, "ok": comes_up(way.bring_up, size, count)}))
