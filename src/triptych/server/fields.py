"""Reading a request body: JSON to typed fields, and a clear sentence for everything that is not right.

Nothing that would change the answer is dropped in silence: a field is read, or known to be harmless, or refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import msgspec

from triptych.errors import RequestError, UnknownField, Unsupported, nearest

_INT64 = 2**63


@dataclass(frozen=True, slots=True)
class FieldTable:
    """The fields of one endpoint.

    `read` are used; `harmless` are accepted without effect; `refused` map to the values (besides null) that ask for
    nothing special and are therefore fine.
    """

    read: frozenset[str]
    harmless: frozenset[str]
    refused: Mapping[str, tuple[object, ...]]

    def check(self, raw: Mapping[str, object], at: str = "") -> None:
        """Raise UnknownField or Unsupported for the first field that cannot be honoured. `at`: path of the object."""
        prefix = f"{at}." if at else ""
        for name, value in raw.items():
            if name in self.read or name in self.harmless:
                continue
            if name not in self.refused:
                known = self.read | self.harmless | set(self.refused)
                raise UnknownField(
                    f"Unknown field {shown(prefix + name)}.", _close(name, known), param=(prefix + name)[:80]
                )
            neutral = self.refused[name]
            if value is not None and value not in neutral:
                remedy = f"Leave it out or send {msgspec.json.encode(neutral[0]).decode()}." if neutral else ""
                raise Unsupported(
                    f"{prefix + name} is not supported.", remedy or "Leave it out.", param=(prefix + name)[:80]
                )


def _close(name: str, known: set[str] | frozenset[str]) -> str:
    hint = nearest(name[:80], known)
    return hint if hint.startswith("Did") else ""  # a list of fifty names helps nobody


def parse_object(body: bytes) -> dict[str, object]:
    """The JSON object in `body`. RequestError for anything else, NaN and invalid UTF-8 included."""
    try:
        raw = msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise RequestError(f"The body is not valid UTF-8 (byte {error.start} of a string).") from None
    except RecursionError:
        raise RequestError("The body's JSON is nested too deeply.") from None
    except msgspec.DecodeError as error:
        reason = str(error).removeprefix("JSON is malformed: ")
        hint = "Unpaired surrogates in \\u escapes are not allowed." if b"\\u" in body and "truncated" in reason else ""
        raise RequestError(f"The body is not valid JSON: {reason}.", hint) from None
    if not isinstance(raw, dict):
        raise RequestError(f"The body must be a JSON object, not {shown(raw)}.")
    return raw


def shown(value: object) -> str:
    """A short phrase for a JSON value, never the value of a long one."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return str(value) if isinstance(value, float) or abs(value) < _INT64 else "an enormous number"
    if isinstance(value, str):
        return repr(value) if len(value) <= 60 else f"{value[:60]!r}..."
    return "a list" if isinstance(value, list) else "an object"


class Fields:
    """Typed access to the top level of a body, or to an object in it whose path is `at`. null counts as absent."""

    def __init__(self, raw: Mapping[str, object], at: str = "") -> None:
        self._raw = raw
        self._at = f"{at}." if at else ""

    def path(self, name: str) -> str:
        """The path of a field, as errors name it."""
        return self._at + name

    def given(self, name: str) -> bool:
        """True if the field is there and not null."""
        return self._raw.get(name) is not None

    def value(self, name: str) -> object:
        """The field as it came; None if absent."""
        return self._raw.get(name)

    def text(self, name: str) -> str | None:
        """A string."""
        value = self._raw.get(name)
        if value is None or isinstance(value, str):
            return value
        raise wrong(self.path(name), "a string", value)

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self._raw.get(name)
        if value is None:
            return default
        if isinstance(value, bool):
            return value
        raise wrong(self.path(name), "true or false", value)

    def integer(self, name: str) -> int | None:
        """An integer of 64 bits; 3.0 is one, as in JSON Schema."""
        value = self._raw.get(name)
        if value is None:
            return None
        return as_integer(self.path(name), value)

    def number(self, name: str) -> float | None:
        """A finite number."""
        value = self._raw.get(name)
        if value is None:
            return None
        return as_number(self.path(name), value)

    def inside(self, name: str, read: Collection[str], harmless: Collection[str] = ()) -> Fields:
        """The fields of an object that may have only these; empty if absent."""
        value = self.entries(name, len(read) + len(harmless) + 16)
        FieldTable(frozenset(read), frozenset(harmless), {}).check(value, self.path(name))
        return Fields(value, self.path(name))

    def items(self, name: str, most: int) -> list[object]:
        """A list of at most `most` entries; empty if absent."""
        value = self._raw.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise wrong(self.path(name), "a list", value)
        if len(value) > most:
            raise RequestError(
                f"{self.path(name)} has {len(value)} entries; at most {most} are allowed.", param=self.path(name)
            )
        return value

    def entries(self, name: str, most: int) -> dict[str, object]:
        """An object of at most `most` entries; empty if absent."""
        value = self._raw.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise wrong(self.path(name), "an object", value)
        if len(value) > most:
            raise RequestError(
                f"{self.path(name)} has {len(value)} entries; at most {most} are allowed.", param=self.path(name)
            )
        return value


def as_integer(name: str, value: object) -> int:
    """`value` as a 64-bit integer, or RequestError naming `name`."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not -_INT64 <= value < _INT64:
        raise wrong(name, "an integer", value)
    return value


def as_number(name: str, value: object) -> float:
    """`value` as a finite float, or RequestError naming `name`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
        raise wrong(name, "a number", value)
    return float(value)


def wrong(name: str, wanted: str, value: object) -> RequestError:
    """The error for a field of the wrong type."""
    return RequestError(f"{name} must be {wanted}, not {shown(value)}.", param=name)
