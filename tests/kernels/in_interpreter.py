"""Runs a script beside this file in a process of its own, with Triton's interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def rows_of(script: str) -> list[dict[str, Any]]:
    """What it prints, JSON by lines. Skips the test where the interpreter does not run."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Triton's interpreter makes loop bounds of arrays, which numpy 2.4 refuses")
    path = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / script],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
