"""Byte sizes as people write them: `2GiB`, `1.5 GB`, `4096`."""

from __future__ import annotations

import re

from triptych.errors import ConfigError, nearest

_UNITS = {"B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[f"{_letter}iB"] = 1024**_power
_BY_LOWER = {unit.lower(): factor for unit, factor in _UNITS.items()}


def parse_size(text: str, option: str) -> int:
    """Bytes of `text`: a number, then a unit (none means bytes). ConfigError names `option`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None:
        raise ConfigError(f"{option} {text!r} is no size.", "Write it as 512MiB, 2GiB or 1.5GB.")
    number, unit = match.groups()
    factor = _BY_LOWER.get(unit.lower() or "b")
    if factor is None:
        raise ConfigError(f"{option} {text!r} has an unknown unit {unit!r}.", nearest(unit, _UNITS))
    size = int(float(number) * factor) if "." in number else int(number) * factor
    if size < 1:
        raise ConfigError(f"{option} must be at least one byte, not {text!r}.")
    return size


def format_size(size: int) -> str:
    """`size` bytes with three significant digits in the largest binary unit that fits."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"
