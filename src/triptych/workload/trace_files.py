"""Files of requests, in Mooncake's format (mooncake.py) or in ours (sessions.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from triptych.errors import ConfigError
from triptych.workload.mooncake import MooncakeTrace, TokenMode, checked
from triptych.workload.sessions import SessionTrace
from triptych.workload.traces import Trace


def read_trace(path: Path, mode: TokenMode = "literal", limit: int | None = None) -> Trace:
    """The first `limit` requests of the trace in a file of either format. ConfigError naming file, line and key."""
    lines = _json_lines(path)
    first = next(lines, None)
    if first is None:
        raise ConfigError(f"{path} holds no requests.")
    if "hash_ids" in first[1]:
        numbered = islice(chain([first], lines), limit)
        return MooncakeTrace(path.name, [checked(row, f"{path}, line {number}") for number, row in numbered], mode)
    return SessionTrace.from_lines(path, first[1], islice(lines, limit))


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line that is not blank."""
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                row = json.loads(line.decode("utf-8"))
                if not isinstance(row, dict):
                    raise ConfigError(f"{path}, line {number} holds no JSON object.")
                yield number, row
    except OSError as error:
        remedy = "Name a JSON Lines file, or a workload such as chat or coding-agent."
        raise ConfigError(f"Trace {path} cannot be read: {error.strerror}.", remedy) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}, line {number} is no UTF-8 text.") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {number} is no JSON: {error.msg} at character {error.colno}.") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path}, line {number} is no JSON that can be read.") from None
