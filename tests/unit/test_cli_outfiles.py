"""Files that commands write are refused before the work, and failures name flag, file and reason."""

from __future__ import annotations

import os
import urllib.error
from pathlib import Path

import pytest

from triptych.cli.outfiles import PICTURE, check_file, write_file
from triptych.errors import ConfigError, reason_of


def test_what_can_be_written_is_let_through(tmp_path: Path) -> None:
    check_file("--out", None)
    check_file("--out", tmp_path / "new.json")
    write_file("--out", tmp_path / "new.json", "text")
    check_file("--out", tmp_path / "new.json")
    check_file("--plot", tmp_path / "new.svg", PICTURE)
    assert (tmp_path / "new.json").read_text() == "text"


def test_what_cannot_be_written_is_named_with_its_flag(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--plot .*/new.pdf must end in .png or .svg\.$"):
        check_file("--plot", tmp_path / "new.pdf", PICTURE)
    with pytest.raises(ConfigError, match=r"^--out .* cannot be written: it is a directory\. Name a file in it\.$"):
        check_file("--out", tmp_path)
    with pytest.raises(ConfigError, match=r"^--out .* cannot be written: there is no directory .*/no\.$"):
        check_file("--out", tmp_path / "no" / "new.json")
    with pytest.raises(ConfigError, match=r"^--out .* cannot be written: Is a directory\.$"):
        write_file("--out", tmp_path, "text")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match=r"this user may not write there\.$"):
        check_file("--out", tmp_path / "new.json")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError(2, "No such file or directory", "x"), "No such file or directory"),
        (urllib.error.URLError(ConnectionRefusedError(111, "Connection refused")), "Connection refused"),
        (urllib.error.URLError("unknown url type: x"), "unknown url type: x"),
        (ValueError("no number"), "no number"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_reasons_are_told_without_numbers_and_wrapping(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason
