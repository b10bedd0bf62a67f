"""Files that a command writes: refused before the work begins, and one sentence if writing fails all the same."""

from __future__ import annotations

import os
from pathlib import Path

from triptych.errors import ConfigError, reason_of

PICTURE = (".png", ".svg")


def check_file(flag: str, path: Path | None, endings: tuple[str, ...] = ()) -> None:
    """ConfigError if `path`, given as `flag`, cannot be written or has none of `endings`. None is not asked for."""
    if path is None:
        return
    if endings and path.suffix not in endings:
        raise ConfigError(f"{flag} {path} must end in {' or '.join(endings)}.")
    if path.is_dir():
        raise ConfigError(f"{flag} {path} cannot be written: it is a directory.", "Name a file in it.")
    if not path.parent.is_dir():
        raise ConfigError(f"{flag} {path} cannot be written: there is no directory {path.parent}.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{flag} {path} cannot be written: this user may not write there.")


def write_file(flag: str, path: Path, text: str) -> None:
    """Write `text` to `path`, given as `flag`. ConfigError says why it failed."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be written: {reason_of(error)}.") from None
