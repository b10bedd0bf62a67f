"""The trainer's loop of docs/rollouts.md runs as it stands, and every update changes what is said."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "rollouts.py"


PAGE = Path(__file__).parents[2] / "docs" / "rollouts.md"


def test_the_loop_on_the_page_runs() -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["8 1", "8 2"]


def test_the_example_runs() -> None:
    argv = [sys.executable, str(EXAMPLE), "--steps", "2", "--samples", "3", "--tokens", "6"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    steps = re.findall(r"step (\d): 9 trajectories on weights \[(\d)\], .* (\d+) prompt tokens cached", done.stdout)
    assert [(number, version) for number, version, _ in steps] == [("0", "0"), ("1", "1")]
    # three prompts share their task within a step; after an update nothing is left of the step before
    assert len({cached for _, _, cached in steps}) == 1 and int(steps[0][2]) > 0
    assert re.search(r"weights 2: .* stopped for", done.stdout) and "after: mean reward" in done.stdout
