"""What clients say about reuse, as `CacheHints`: OpenAI's and Anthropic's words for it, and our own.

| field | means |
|---|---|
| prompt_cache_key, metadata.user_id (Anthropic) | the session |
| prompt_cache_retention "24h", prompt_cache_options.ttl | time to live |
| cache_control.ttl on blocks (Anthropic: "5m", "1h") | time to live; the block's end is a boundary |
| cache_hints {session, ttl, pin} | ours: session, seconds to live, seconds that it must stay |
"""

from __future__ import annotations

import re

from triptych.errors import RequestError
from triptych.server.fields import Fields, wrong
from triptych.words import CacheHints

HINT_FIELDS = frozenset({"prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "cache_hints"})
_RETENTION = {"in_memory": None, "in-memory": None, "24h": 86400.0}
_SPAN = re.compile(r"(\d{1,6})([smhd])", re.ASCII)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST_SESSION = 256  # characters


def cache_hints(fields: Fields, salt: str, marks: tuple[int, ...] = (), ttl: float | None = None) -> CacheHints:
    """The hints in a body's fields. `marks` are the prompt's boundaries, `ttl` what the blocks of the prompt asked for.

    Sessions are named per tenant: two tenants with one name have two sessions.
    """
    session = fields.text("prompt_cache_key")
    retention = fields.text("prompt_cache_retention")
    if retention is not None:
        if retention not in _RETENTION:
            raise wrong("prompt_cache_retention", "'in_memory' or '24h'", retention)
        ttl = _RETENTION[retention] or ttl
    options = fields.inside("prompt_cache_options", ("ttl",), ("mode", "comparison_response_id", "prewarm"))
    ttl = span("prompt_cache_options.ttl", options.value("ttl")) or ttl
    ours = fields.inside("cache_hints", ("session", "ttl", "pin"))
    session = ours.text("session") or session
    ttl = ours.number("ttl") or ttl
    pin = ours.number("pin") or 0.0
    if session is not None and len(session) > _LONGEST_SESSION:
        raise RequestError(f"The session name is longer than {_LONGEST_SESSION} characters.", param="prompt_cache_key")
    try:
        return CacheHints(marks, f"{salt}/{session}" if session else None, ttl, pin)
    except RequestError as error:
        raise RequestError(f"cache_hints.{error.message}", param=f"cache_hints.{error.param}") from None


def span(name: str, raw: object) -> float | None:
    """Seconds of a span such as "5m" or "1h"; None if absent."""
    if raw is None:
        return None
    found = _SPAN.fullmatch(raw) if isinstance(raw, str) else None
    if found is None:
        raise wrong(name, 'a span of time like "5m" or "1h"', raw)
    return float(found[1]) * _UNITS[found[2]] or None


def breakpoint_ttl(name: str, raw: object) -> float | None:
    """The time to live that a `cache_control` object asks for: five minutes unless it says otherwise."""
    if raw is None:
        return None
    if not isinstance(raw, dict) or raw.get("type") != "ephemeral" or set(raw) - {"type", "ttl", "scope"}:
        raise wrong(name, 'an object like {"type": "ephemeral", "ttl": "1h"}', raw)
    return span(f"{name}.ttl", raw.get("ttl")) or 300.0
