"""Options of an engine by name, as a file or a caller gives them: sizes in bytes, and each of its type."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from triptych.config import CacheConfig, EngineConfig
from triptych.engine.sizes import parse_size
from triptych.errors import ConfigError, nearest
from triptych.values import real

SIZES = ("kv_memory", "host_memory", "disk_memory")
_PLAIN = {"cache", "tenant_shares"}  # what no text stands for


def typed(key: str, value: Any, where: str) -> Any:
    """`value` as the option `key` takes it, a size of text in bytes. ConfigError says what it takes."""
    if key in SIZES and isinstance(value, str):
        return parse_size(value, f"{where}: {key}")
    plain = real(value)
    value = value if plain is None else plain
    wanted = [part for part in get_args(_hints()[key]) or (_hints()[key],) if part is not type(None)]
    if get_origin(wanted[0]) is Literal:  # Literal[...] | None
        wanted = list(get_args(wanted[0]))
    if all(isinstance(part, str) for part in wanted):
        if value not in wanted:
            raise ConfigError(f"{where}: {key} {value!r} is not known.", nearest(str(value), wanted))
    elif type(value) not in wanted and not (float in wanted and type(value) is int):
        raise ConfigError(f"{where}: {key} must be of type {wanted[0].__name__}, not {value!r}.")
    return value


def options_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword options of `load`: None is the default, a path is its text. Unknown names are left to EngineConfig."""
    found = {}
    for key, value in given.items():
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        known = key in _hints()
        if value is None and known:
            continue
        found[key] = typed(key, value, "load") if known and key not in _PLAIN else value
    return found


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(EngineConfig) | get_type_hints(CacheConfig)
