"""How the server runs, validated once."""

from __future__ import annotations

from dataclasses import dataclass

from triptych.errors import ConfigError

_LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where to listen and what to accept. Times in seconds, sizes in bytes.

    `served_model_name` replaces the engine's name for the model; `aliases` are further names for it.
    `max_body` bounds one request body. `keep_alive`: a stream that has nothing to say for so long says a comment.
    `drain_timeout`: how long running requests may take after the first SIGTERM. `retry_after` is sent with 429, 503.
    `encode_threads` tokenise prompts beside the event loop.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    aliases: tuple[str, ...] = ()
    max_body: int = 32 * 2**20
    keep_alive: float = 5.0
    drain_timeout: float = 30.0
    retry_after: int = 2
    encode_threads: int = 4
    log_level: str = "info"

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be from 0 to 65535, not {self.port}.")
        for name in ("max_body", "keep_alive", "retry_after", "encode_threads"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}.")
        if not self.drain_timeout >= 0:
            raise ConfigError(f"drain_timeout must not be negative, but is {self.drain_timeout}.")
        if self.log_level not in _LOG_LEVELS:
            raise ConfigError(f"log_level must be one of {', '.join(_LOG_LEVELS)}, not {self.log_level!r}.")
        if self.served_model_name == "" or "" in self.aliases:
            raise ConfigError("A model name must not be empty.")
