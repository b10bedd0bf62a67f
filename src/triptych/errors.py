"""Every error a user can meet, in one tree.

    TriptychError
    ├── ConfigError            a flag, path, config value or machine limit is wrong      exit 2
    │   └── CheckpointError    a checkpoint file is missing, broken or of another shape  exit 2
    ├── RequestError           one request is wrong; the server goes on                  HTTP 400
    │   ├── ContextTooLong     prompt or output does not fit                             HTTP 400
    │   ├── UnknownField       the request has a field that nothing here reads           HTTP 400
    │   ├── Unsupported        a known field asks for something that is not built yet    HTTP 400
    │   ├── ModelNotFound      the request names a model that is not served              HTTP 404
    │   └── BodyTooLarge       the HTTP body is over the limit                           HTTP 413
    └── Unavailable            right request, wrong moment                               HTTP 503
        └── QueueFull          too many requests wait                                    HTTP 429

A message is one sentence that names the thing; `remedy` says what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TriptychError(Exception):
    """Base of all errors that are meant for a user. `status` is the HTTP status, `code` OpenAI's error code."""

    status = 500
    code: str | None = None

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


class ConfigError(TriptychError):
    """A flag, path or config value that cannot work. Commands print it and exit with status 2."""


class CheckpointError(ConfigError):
    """A checkpoint that cannot be loaded: names the tensor, the file and what was expected."""


class RequestError(TriptychError):
    """One request that cannot be served as it stands. `param` names the offending field."""

    status = 400
    code = "invalid_value"

    def __init__(self, message: str, remedy: str = "", *, param: str | None = None) -> None:
        super().__init__(message, remedy)
        self.param = param


class ContextTooLong(RequestError):
    """Prompt plus output would not fit the model's context or the cache."""

    code = "context_length_exceeded"


class UnknownField(RequestError):
    """The request has a field that would be silently ignored; the remedy names the nearest known one."""

    code = "unknown_parameter"


class Unsupported(RequestError):
    """A field of the API that would change the answer, but which this engine cannot honour (yet)."""

    code = "unsupported_parameter"


class ModelNotFound(RequestError):
    """The request names a model that this server does not serve."""

    status = 404
    code = "model_not_found"


class BodyTooLarge(RequestError):
    """The HTTP body is larger than the server accepts."""

    status = 413
    code = "request_too_large"


class Unavailable(TriptychError):
    """The request is fine, the moment is not: the server drains or the engine stopped."""

    status = 503
    code = "unavailable"


class QueueFull(Unavailable):
    """Too many requests are waiting; retry after a pause."""

    status = 429
    code = "queue_full"


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence naming the nearest known spelling of `name`, or listing what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]!r}?"
    return "Known: " + ", ".join(known) + "." if known else ""
