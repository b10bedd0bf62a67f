"""A headless Chromium, if this machine has one: the page as a person would get it, as markup and as a picture."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (found := shutil.which(name))),
    None,
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: the page was not looked at (its figures are tested without one)"
)

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-quic", "--hide-scrollbars", "--enable-logging=stderr"),
)


@dataclass(frozen=True)
class Seen:
    """What a browser made of a page. `console`: what it complained about."""

    markup: str
    picture: Path
    console: list[str]


def visit(url: str, folder: Path, *, size: str = "1280,1500", wait: int = 4000) -> Seen:
    """Open `url`, let `wait` milliseconds of the page's time pass, look."""
    assert CHROMIUM is not None
    picture = folder / "page.png"
    common = [CHROMIUM, *_FLAGS, f"--window-size={size}", f"--virtual-time-budget={wait}"]
    console: list[str] = []
    outputs = []
    for what in ("--dump-dom", f"--screenshot={picture}"):
        done = subprocess.run(
            [*common, f"--user-data-dir={folder / 'profile'}", what, url], capture_output=True, text=True, timeout=120
        )
        console += [line for line in done.stderr.splitlines() if "CONSOLE" in line or "Refused to" in line]
        outputs.append(done.stdout)
    return Seen(outputs[0], picture, console)
