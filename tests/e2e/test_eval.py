"""`triptych eval retrieval` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "triptych", "eval", "retrieval", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_the_bundled_model_finds_its_facts(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "map.png"
    done = run("--lengths", "1K", "--documents", "1", "--kv-memory", "256MiB", "--heat-map", str(picture), "--json")
    assert done.returncode == 0, done.stderr
    [summary] = json.loads(done.stdout)["summary"]
    assert summary["length"] == 1024 and summary["alone"] >= 0.9 and summary["together"] >= 0.8
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--lengths", "1Q"), "1Q"),
        (("--lengths", "64"), "1024"),
        (("--documents", "0"), "--documents"),
        (("--heat-map", "x.bmp"), ".png"),
        (("--filler", "/nonexistent"), "--filler"),
        (("--url", "http://127.0.0.1:9"), "triptych serve"),
    ],
)
def test_wrong_values_are_one_sentence(arguments: tuple[str, str], words: str) -> None:
    done = run(*arguments, "--kv-memory", "64MiB")
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
