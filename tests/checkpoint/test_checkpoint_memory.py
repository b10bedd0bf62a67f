"""Loading holds one tensor and one piece at a time, however large the file; nothing is drawn where nobody watches."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_files import SMALL, one_file

import triptych
from triptych.checkpoint import CheckpointReader, synthesize

# resident memory at its highest, before and after: what else the process needs is in both. Not from getrusage, which
# begins with the peak of the process that started this one
SCRIPT = """
import re, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from triptych.checkpoint import CheckpointReader
torch.set_num_threads(1)
reader = CheckpointReader(sys.argv[1])
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
for name, tensor in reader.tensors(mtp=False):  # once over the smallest part, for what decoding itself loads
    break
before = peak()
for name, tensor in reader.tensors():
    pass
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells the peak of a process this way")
def test_loading_needs_little_more_than_one_tensor(tmp_path: Path) -> None:
    shape = replace(SMALL, hidden_size=512, moe_intermediate_size=256, num_experts=20)
    synthesize(tmp_path, shape, weights="bf16")
    size = one_file(tmp_path).stat().st_size
    source = Path(triptych.__file__).parents[1]
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(source)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout)
    assert size > 60_000_000
    assert grown < 20_000_000, f"reading {size:,} bytes took {grown:,} bytes of memory"


def test_pieces_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor much larger than a piece is decoded in several, with the same values."""
    synthesize(tmp_path, SMALL, weights="fp8")
    reader = CheckpointReader(tmp_path)
    whole = dict(reader.tensors())
    monkeypatch.setattr("triptych.checkpoint.decode.PIECE_BYTES", 1)
    for name, tensor in reader.tensors():
        assert torch.equal(tensor, whole[name]), name


def test_no_bar_in_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthesize(tmp_path, SMALL)
    for _ in CheckpointReader(tmp_path).tensors():
        pass
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
