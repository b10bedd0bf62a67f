"""Runs in a process of its own, with Triton's interpreter: frames that come up from the host."""

from __future__ import annotations

import json

from frames_cases import SIZES, comes_up

from triptych.kernels.frames import triton

if __name__ == "__main__":
    triton._PROGRAMS = 3  # the interpreter is slow
    for size in SIZES:
        for count in (0, 1, 4):
            print(json.dumps({"what": f"{count} frames of {size} bytes", "ok": comes_up(triton.bring_up, size, count)}))
