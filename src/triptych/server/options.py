"""How the server runs, validated once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from triptych.errors import ConfigError, nearest
from triptych.text.spell import EFFORTS

_LOG_LEVELS = ("debug", "info", "warning", "error")
_LOG_FORMATS = ("text", "json")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]+|null")
_POSITIVE = (
    *("max_body", "max_bodies", "max_header", "max_connections", "header_timeout", "body_timeout", "write_timeout"),
    *("keep_alive", "retry_after", "encode_threads"),
)


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where to listen and what to accept. Times in seconds, sizes in bytes.

    `served_model_name` replaces the engine's name for the model; `aliases` are further names for it.
    `max_body` bounds one request body, `max_bodies` those of all requests together while they are read and encoded;
    `max_header` bounds a request line with its headers. `header_timeout`: a connection may take so long to send them;
    `body_timeout`: and so long for the body. `write_timeout`: a reader that takes nothing for so long is let go.
    `request_timeout`: an answer may take so long in all; None: as long as it takes. `max_connections` at once.
    `keep_alive`: a stream that has nothing to say for so long says a comment.
    `drain_timeout`: how long running requests may take after the first SIGTERM. `retry_after` is sent with 429, 503.
    `encode_threads` tokenise prompts beside the event loop. `cors_origins` may call from a browser; none by default.
    `tls_cert` and `tls_key` are PEM files. `log_prompts` writes request bodies into the log.
    `reasoning_effort` is that of requests that name none; "none" does not think.
    `store_memory` bounds the answers of /v1/responses that are kept for `previous_response_id`, over all tenants.
    `weights_root`: admin keys may pause the engine and load weights from below this directory; None: nobody may.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    aliases: tuple[str, ...] = ()
    max_body: int = 32 * 2**20
    max_bodies: int = 512 * 2**20
    max_header: int = 64 * 2**10
    max_connections: int = 4096
    header_timeout: float = 20.0
    body_timeout: float = 120.0
    write_timeout: float = 120.0
    request_timeout: float | None = None
    keep_alive: float = 5.0
    drain_timeout: float = 30.0
    retry_after: int = 2
    encode_threads: int = 4
    cors_origins: tuple[str, ...] = ()
    tls_cert: str | None = None
    tls_key: str | None = None
    log_level: str = "info"
    log_format: str = "text"
    log_prompts: bool = False
    reasoning_effort: str = "none"
    store_memory: int = 256 * 2**20
    weights_root: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be from 0 to 65535, not {self.port}.")
        if self.reasoning_effort != "none" and self.reasoning_effort not in EFFORTS:
            raise ConfigError(
                f"reasoning_effort must be none or one of {', '.join(EFFORTS)}, not {self.reasoning_effort!r}.",
                nearest(self.reasoning_effort, EFFORTS),
            )
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}.")
        if not self.drain_timeout >= 0:
            raise ConfigError(f"drain_timeout must not be negative, but is {self.drain_timeout}.")
        if self.served_model_name == "" or "" in self.aliases:
            raise ConfigError("A model name must not be empty.")
        self._check_choices()

    def _check_choices(self) -> None:
        if self.request_timeout is not None and not self.request_timeout > 0:
            raise ConfigError(
                f"request_timeout must be positive, not {self.request_timeout}.", "Leave it out for none."
            )
        if self.weights_root is not None and not Path(self.weights_root).expanduser().is_dir():
            raise ConfigError(f"There is no directory {self.weights_root!r} for weights.", "Make it first.")
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"--cors-origin {origin!r} is none.", "Write it as browsers do, like https://example.org, or *."
                )
        if self.store_memory < 0:
            raise ConfigError(f"store_memory must not be negative, but is {self.store_memory}.")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("TLS needs both --tls-cert and --tls-key.", "Give the other one too.")
        if self.log_format not in _LOG_FORMATS:
            raise ConfigError(f"log_format must be one of {', '.join(_LOG_FORMATS)}, not {self.log_format!r}.")
        if self.log_level not in _LOG_LEVELS:
            raise ConfigError(f"log_level must be one of {', '.join(_LOG_LEVELS)}, not {self.log_level!r}.")
