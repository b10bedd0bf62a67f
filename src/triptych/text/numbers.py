"""JSON as DeepSeek's encoder writes and reads it, where that differs from Python's `json`.

Written: ", " and ": " between, nothing escaped that need not be, whole numbers beyond 64 bits as floats, exponents
without leading zeros. Read: no NaN, no infinity, no lone surrogates. Same text, same tokens: that is what it is for.
"""

from __future__ import annotations

import json
from json.encoder import encode_basestring as _quote

_INTEGERS = range(-(2**63), 2**64)


def loads(text: str) -> object:
    """JSON text as a value. ValueError for what is none."""
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("too deep") from None
    if "\\u" in text:
        dumps(value).encode("utf-8")  # UnicodeEncodeError is a ValueError
    return value


def dumps(value: object) -> str:
    """`value` as JSON text."""
    if isinstance(value, str):
        return _quote(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value) if value in _INTEGERS else _float(float(value))
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quote(str(key))}: {dumps(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(dumps, value)) + "]"
    raise TypeError(f"{type(value).__name__} is nothing that JSON has")


def _float(value: float) -> str:
    mantissa, e, exponent = repr(value).partition("e")
    if exponent == "-05":  # the one size at which Python already writes an exponent and the encoder does not
        sign = "-" if value < 0 else ""
        return f"{sign}0.0000{mantissa.lstrip('-').replace('.', '')}"
    return f"{mantissa}e{exponent[0]}{exponent[1:].lstrip('0')}" if e else mantissa


def _refuse(text: str) -> object:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is out of range")
    return value
