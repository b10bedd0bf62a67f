"""API keys: who may use the server, as which tenant and how much.

A keys file is TOML; only hashes need to be in it (`triptych serve --help` says how it is named):

    [[key]]
    name = "search-team"          # in logs and metrics
    sha256 = "9f86d081884c7d65..." # of the key; or  key = "sk-..."
    tenant = "search"             # who shares a cache; default: the name
    requests_per_minute = 600
    tokens_per_minute = 2000000
    concurrent = 32
    cache_share = 0.25            # of the cache, while others want room
    admin = false                 # may read /metrics and the dashboard, and use /admin where that is on
"""

from __future__ import annotations

import hashlib
import hmac
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from triptych.errors import AccessDenied, ConfigError, nearest
from triptych.server.limits import Limits, Quota

_HEX = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[\w.@:-]{1,64}", re.ASCII)
_SHORTEST = 8  # characters of a key that stands in the file as it is


@dataclass(frozen=True, slots=True, eq=False)
class Caller:
    """Whom a request is served for. `salt` keeps the tenant's cache apart; `cache_share` is what of it is theirs."""

    name: str
    salt: str
    limits: Limits
    cache_share: float | None = None
    admin: bool = False


def anonymous() -> Caller:
    """The one caller of a server without keys: no limits, every page."""
    return Caller("", "", Limits(Quota()), admin=True)


class Keys:
    """The keys of a server by their hash; without any, everyone is welcome."""

    def __init__(self, callers: Mapping[bytes, Caller]) -> None:
        self._callers = dict(callers)
        self._anonymous = anonymous()

    def __bool__(self) -> bool:
        return bool(self._callers)

    @property
    def shares(self) -> dict[str, float]:
        """Cache shares by tenant salt."""
        return {c.salt: c.cache_share for c in self._callers.values() if c.cache_share is not None}

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """Whose key is in `Authorization: Bearer` or `x-api-key`. AccessDenied if it is nobody's."""
        if not self._callers:
            return self._anonymous
        scheme, _, token = headers.get("authorization", "").partition(" ")
        presented = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not presented:
            raise AccessDenied(
                "This server needs an API key.", "Send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'."
            )
        digest = key_hash(presented)
        found = None
        for known, caller in self._callers.items():  # all of them, so that the time tells nothing
            if hmac.compare_digest(known, digest):
                found = caller
        if found is None:
            raise AccessDenied("The API key is not known here.", "Check it, or ask the operator for one.")
        return found


def key_hash(key: str) -> bytes:
    """SHA-256 of a key: keys are random and long, so no slow hash is needed."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def load_keys(file: str | None, flags: tuple[str, ...] = ()) -> Keys:
    """The keys of a TOML `file` and of the command line. ConfigError names the entry; never shows a key."""
    callers: dict[bytes, Caller] = {}
    for i, flag in enumerate(flags):
        if len(flag) < _SHORTEST:
            raise ConfigError(f"--api-key number {i + 1} is shorter than {_SHORTEST} characters.", "Use a longer one.")
        callers[key_hash(flag)] = Caller(f"key-{i + 1}", f"key-{i + 1}", Limits(Quota()), admin=True)
    if file is not None:
        _read_file(Path(file).expanduser(), callers)
    return Keys(callers)


def _read_file(path: Path, callers: dict[bytes, Caller]) -> None:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The keys file {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # also a wrong encoding
        raise ConfigError(f"The keys file {path} is not valid TOML: {error}.") from None
    entries = raw.pop("key", None)
    if raw or not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"The keys file {path} must hold [[key]] tables and nothing else.")
    for i, entry in enumerate(entries):
        digest, caller = _entry(entry, f"{path}: key[{i}]")
        if digest in callers:
            raise ConfigError(f"{path}: key[{i}] repeats an earlier key.", "Remove one of them.")
        callers[digest] = caller


_FIELDS = {
    "name": str,
    "key": str,
    "sha256": str,
    "tenant": str,
    "requests_per_minute": int,
    "tokens_per_minute": int,
    "concurrent": int,
    "cache_share": float,
    "admin": bool,
}


def _entry(entry: Mapping[str, object], at: str) -> tuple[bytes, Caller]:
    for field, value in entry.items():
        if field not in _FIELDS:
            raise ConfigError(f"{at} has the unknown field {field[:60]!r}.", nearest(field[:60], _FIELDS))
        kind = _FIELDS[field]
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ConfigError(f"{at}.{field} must be of type {kind.__name__}.")
    name = entry.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{at}.name must be 1 to 64 letters, digits or . _ : @ -", "Every key needs a name for logs.")
    for field in ("requests_per_minute", "tokens_per_minute", "concurrent"):
        value = entry.get(field)
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"{at}.{field} must be at least 1.", "Leave it out for no limit.")
    share = entry.get("cache_share")
    if isinstance(share, int | float) and not 0.0 < share <= 1.0:
        raise ConfigError(f"{at}.cache_share must be above 0 and at most 1.")
    quota = Quota(*(_integer(entry.get(f)) for f in ("requests_per_minute", "tokens_per_minute", "concurrent")))
    caller = Caller(
        name,
        str(entry.get("tenant", name)),
        Limits(quota),
        float(share) if isinstance(share, int | float) else None,
        entry.get("admin") is True,
    )
    return _digest(entry, at), caller


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _digest(entry: Mapping[str, object], at: str) -> bytes:
    plain, hashed = entry.get("key"), entry.get("sha256")
    if (plain is None) == (hashed is None):
        raise ConfigError(f"{at} must have either key or sha256.", "printf %s KEY | sha256sum  makes the hash.")
    if isinstance(plain, str):
        if len(plain) < _SHORTEST:
            raise ConfigError(f"{at}.key is shorter than {_SHORTEST} characters.", "Use a longer one.")
        return key_hash(plain)
    text = str(hashed).lower()
    if not _HEX.fullmatch(text):
        raise ConfigError(f"{at}.sha256 must be 64 hexadecimal digits.", "printf %s KEY | sha256sum  makes it.")
    return bytes.fromhex(text)
