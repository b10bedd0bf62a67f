"""`triptych demo` as a user runs it, on a short document."""

from __future__ import annotations

import json
import subprocess
import sys


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "triptych", "demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_the_document_is_read_once_and_its_facts_are_found() -> None:
    done = run("--tokens", "4000", "--kv-memory", "256MiB", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    first, *others = shown["asked"]
    assert first["cached_tokens"] == first["recomputed_tokens"] == 0
    for row in others:
        assert row["cached_tokens"] + row["recomputed_tokens"] + row["computed_tokens"] == row["prompt_tokens"]
        assert row["cached_tokens"] >= shown["document_tokens"] - 2 * 128
    assert sum(row["right"] for row in shown["asked"]) >= len(shown["asked"]) - 1


def test_wrong_values_are_one_sentence() -> None:
    done = run("--tokens", "10")
    assert done.returncode == 2 and "Use 500 or more" in done.stderr and "Traceback" not in done.stderr
    done = run("--kv-memory", "many")
    assert done.returncode == 2 and "Traceback" not in done.stderr
