"""Every kernel has a part in tests/gpu/sanitize.py, which brings it before compute-sanitizer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are Triton's")


def test_every_kernel_comes_before_compute_sanitizer() -> None:
    script = Path(__file__).parent / "pretend_gpu.py"
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.splitlines()[-1].strip() == "left out:"
