"""Where the bundled checkpoint comes from: the package, or else made once in a folder and kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from triptych.checkpoint import CheckpointReader
from triptych.tiny import PACKAGED, TINY_SHAPE, bundle, ensure_checkpoint, is_trained


def test_the_packaged_checkpoint_is_complete_and_small() -> None:
    assert is_trained()
    assert ensure_checkpoint() == PACKAGED
    reader = CheckpointReader(PACKAGED)
    assert reader.shape == TINY_SHAPE
    assert reader.has_mtp
    assert sum(f.stat().st_size for f in PACKAGED.iterdir()) < 16e6
    assert (PACKAGED / "tokenizer.json").read_bytes() == bundle.TOKENIZER_FILE.read_bytes()


def test_random_weights_are_made_once_and_again_when_the_version_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "made" / "here"
    assert ensure_checkpoint(target) == target
    weights = target / "model-00001-of-00001.safetensors"
    first = weights.stat().st_mtime_ns
    assert CheckpointReader(target).shape == TINY_SHAPE
    assert ensure_checkpoint(target) == target
    assert weights.stat().st_mtime_ns == first

    record = target / "triptych-tiny.json"
    record.write_text(json.dumps({"version": "of an older release"}))
    ensure_checkpoint(target)
    assert weights.stat().st_mtime_ns != first
    assert [p.name for p in target.parent.iterdir()] == ["here"]  # nothing half-made is left behind


def test_a_package_without_weights_uses_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "is_trained", lambda: False)
    monkeypatch.setattr(bundle, "_cache_folder", lambda: tmp_path)
    made = ensure_checkpoint()
    assert made.parent == tmp_path and (made / "tokenizer.json").is_file()
