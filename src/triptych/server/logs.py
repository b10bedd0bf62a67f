"""What the server writes down: one line per request, as text or as JSON. Prompts only where the operator asked."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

import msgspec

prompts = logging.getLogger("triptych.prompts")
"""Receives request bodies, if `log_prompts` is set. Nothing else may ever hold them."""


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the fields of an access record, a traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        """`record` as a line of JSON."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict):
            line |= fields
        else:
            line["message"] = record.getMessage()
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def configure(level: str, form: str) -> None:
    """Send the records of this process to standard error in `form`, those of triptych from `level` on."""
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s")
    handler.setFormatter(JsonLines() if form == "json" else plain)
    logging.basicConfig(handlers=[handler])
    logging.getLogger("triptych").setLevel(level.upper())
