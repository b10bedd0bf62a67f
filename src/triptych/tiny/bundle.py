"""Where the bundled checkpoint lies: the trained weights of the package, or else random ones in the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from triptych.tiny.shape import TINY_SHAPE, TOKENIZER_FILE

PACKAGED = Path(__file__).with_name("data")
SEED = 20261123
_RECORD = "triptych-tiny.json"


def is_trained() -> bool:
    """True if trained weights came with the package."""
    return (PACKAGED / "config.json").is_file() and any(PACKAGED.glob("*.safetensors"))


def ensure_checkpoint(directory: Path | None = None) -> Path:
    """The directory of the bundled checkpoint, made at first use if the package holds no trained weights.

    `directory` (default: a folder in the user's cache) receives random weights of TINY_SHAPE from a fixed seed,
    written beside it and moved into place, so that a reader never sees half a checkpoint. It is made again when shape,
    seed or tokenizer changed. Raises OSError if it cannot be written.
    """
    if directory is None and is_trained():
        return PACKAGED
    target = directory if directory is not None else _cache_folder() / "tiny-random"
    version = _version()
    if _recorded(target) == version:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=target.name + ".", dir=target.parent))
    try:
        _write(fresh, version)
        _move_into_place(fresh, target, version)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target


def _write(directory: Path, version: str) -> None:
    from triptych.checkpoint import synthesize

    synthesize(directory, TINY_SHAPE, dialect="official", weights="fp8", seed=SEED)
    shutil.copyfile(TOKENIZER_FILE, directory / "tokenizer.json")
    (directory / _RECORD).write_text(json.dumps({"version": version}) + "\n", encoding="utf-8")


def _move_into_place(fresh: Path, target: Path, version: str) -> None:
    """Rename `fresh` to `target`; another process that was faster with the same version wins."""
    os.chmod(fresh, 0o755)
    stale = Path(tempfile.mkdtemp(prefix=target.name + ".old.", dir=target.parent))
    try:
        if target.exists():
            target.rename(stale / "checkpoint")
        fresh.rename(target)
    except OSError:
        if _recorded(target) != version:
            raise
    finally:
        shutil.rmtree(stale, ignore_errors=True)


def _version() -> str:
    """Changes with the shape, the seed and the tokenizer."""
    text = json.dumps(TINY_SHAPE.to_dict(), sort_keys=True) + str(SEED)
    return hashlib.sha256(text.encode() + TOKENIZER_FILE.read_bytes()).hexdigest()


def _recorded(directory: Path) -> str | None:
    try:
        record = json.loads((directory / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(record.get("version")) if isinstance(record, dict) else None


def _cache_folder() -> Path:
    """The platform's folder for files that can be made again."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "triptych"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "triptych"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "triptych"
