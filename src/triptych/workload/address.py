"""Addresses of servers as people type them: `http://127.0.0.1:8000`, `localhost:8000/v1`, `https://host/path`."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import urlsplit

from triptych.errors import ConfigError


class Address(NamedTuple):
    """Where a server is. `port` None is that of the scheme; `path` is what stands before `/v1`."""

    secure: bool
    host: str
    port: int | None
    path: str

    @property
    def base(self) -> str:
        """The address before `/v1`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.secure else ''}://{host}{'' if self.port is None else f':{self.port}'}{self.path}"

    @property
    def here(self) -> bool:
        """Whether the server is on this machine, as far as its name says."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def address_of(url: str) -> Address:
    """The parts of `url`, which may lack its scheme and end in /v1. ConfigError if it is no address."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port
    except ValueError:  # brackets without end, a port that is no number or too high
        host = port = None
    if not host or parts.scheme not in ("http", "https"):
        raise ConfigError(f"{url!r} is no address of a server.", "For instance: http://127.0.0.1:8000")
    return Address(parts.scheme == "https", host, port, parts.path.rstrip("/").removesuffix("/v1"))
