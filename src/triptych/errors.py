"""Every error a user can meet, in one tree.

    TriptychError
    ├── ConfigError            a flag, path, config value or machine limit is wrong      exit 2
    │   └── CheckpointError    a checkpoint file is missing, broken or of another shape  exit 2
    ├── RequestError           one request is wrong; the server goes on                  HTTP 400
    │   ├── ContextTooLong     prompt or output does not fit                             HTTP 400
    │   ├── UnknownField       the request has a field that nothing here reads           HTTP 400
    │   ├── Unsupported        a known field asks for something that is not built yet    HTTP 400
    │   ├── ModelNotFound      the request names a model that is not served              HTTP 404
    │   ├── NotFound           the request names an object that is not (or no longer) there  HTTP 404
    │   ├── AccessDenied       no API key, or one that nobody was given                  HTTP 401
    │   ├── Forbidden          the key is good, but not for this                         HTTP 403
    │   ├── TooSlow            the body did not arrive in time                           HTTP 408
    │   └── BodyTooLarge       the HTTP body is over the limit                           HTTP 413
    └── Unavailable            right request, wrong moment                               HTTP 503
        └── QueueFull          too many requests wait                                    HTTP 429
            └── RateLimited    a key has used up what it may ask for now                 HTTP 429

A message is one sentence that names the thing; `remedy` says what to do about it.
"""

from __future__ import annotations

import difflib
import math
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


class NotFound(RequestError):
    """The request names an object that this server does not hold, or no longer."""

    status = 404
    code = "not_found"


class AccessDenied(RequestError):
    """The request carries no API key, or one that nobody was given."""

    status = 401
    code = "invalid_api_key"


class Forbidden(RequestError):
    """The API key is good, but not for what was asked."""

    status = 403
    code = "forbidden"


class TooSlow(RequestError):
    """The client took longer to send its request than the server waits."""

    status = 408
    code = "request_timeout"


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


class RateLimited(QueueFull):
    """A key has used up what it may ask for now; `retry_after` seconds later it may ask again."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after: float) -> None:
        seconds = max(1, math.ceil(retry_after))
        super().__init__(message, f"Retry after {seconds} s.")
        self.retry_after = seconds


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence naming the nearest known spelling of `name`, or listing what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]!r}?"
    return "Known: " + ", ".join(known) + "." if known else ""


def reason_of(error: BaseException) -> str:
    """What an error of the system or of the network says, without its number, its class and what wraps it."""
    inner = getattr(error, "reason", None)  # urllib's, an error or a text
    if isinstance(inner, str):
        return inner
    error = inner if isinstance(inner, BaseException) else error
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
