"""Every kernel has a part in tests/gpu/sanitize.py, which brings it before compute-sanitizer."""

from __future__ import annotations

import os
import stat
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


def test_parts_run_one_by_one_under_each_tool(tmp_path: Path) -> None:
    """A tool that dies of one part, as compute-sanitizer does of `alone`, has still looked at the others."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "saw $2 $9"\n[ "$9" != alone ] || kill -FPE $$\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    script = Path(__file__).parents[1] / "gpu" / "under_sanitizer.py"
    found = subprocess.run(
        [sys.executable, script, "products", "alone", "sites"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 1, found.stderr
    saw = [line.split()[1:] for line in found.stdout.splitlines() if line.startswith("saw")]
    assert saw == [[tool, part] for tool in ("memcheck", "racecheck") for part in ("products", "alone", "sites")]
    assert "failed: alone under memcheck, alone under racecheck" in found.stdout


def test_without_the_tool_it_says_where_to_get_it(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "gpu" / "under_sanitizer.py"
    found = subprocess.run(
        [sys.executable, script], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert found.returncode == 2 and "CUDA toolkit" in found.stderr
