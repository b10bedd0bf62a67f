"""Values as callers give them, of any integral or real type, made plain: checked once, where they come in.

numpy's and others' integers are integers and their floats are numbers; truth values are neither, and a float with an
integral value is no integer, for it was meant as something else.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, SupportsIndex

from triptych.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def integral(value: object) -> int | None:
    """`value` as an int; None if it is no integer. A vector of one integer, as numpy has it, is none either."""
    if type(value) is int:
        return value
    if not isinstance(value, SupportsIndex) or isinstance(value, bool) or getattr(value, "ndim", 0) != 0:
        return None
    try:
        return operator.index(value)
    except TypeError:  # a tensor of a float, say
        return None


def real(value: object) -> float | None:
    """`value` as a finite int or float; None if it is no number, or none that is finite."""
    whole = integral(value)
    if whole is not None:
        return whole
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def integer_in(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int from `low` to `high`; RequestError naming the field `name`."""
    whole = integral(value)
    if whole is None or not low <= whole <= high:
        raise RequestError(f"{name} must be an integer from {low} to {high}, not {value!r}.", param=name)
    return whole


def number_in(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> float:
    """`value` as a number in [low, high], or (low, high]; RequestError naming the field `name`."""
    number = real(value)
    if number is None or not (low < number if open_low else low <= number) or not number <= high:
        bracket = "(" if open_low else "["
        raise RequestError(f"{name} must be a number in {bracket}{low:g}, {high:g}], not {value!r}.", param=name)
    return number


def integers_in(name: str, values: object, low: int, high: int) -> tuple[int, ...]:
    """Some integers, each as `integer_in` has it: of a list, a tuple, a set or an array."""
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__iter__"):
        raise RequestError(f"{name} must be a list of integers, not {values!r}.", param=name)
    return tuple(integer_in(name, value, low, high) for value in values)


def weights_in(name: str, values: object, most_key: int, most: float) -> dict[int, float]:
    """Numbers in [-most, most] by integers from 0 to `most_key`."""
    if not isinstance(values, Mapping):
        raise RequestError(f"{name} must map token ids to numbers, not be {values!r}.", param=name)
    return {integer_in(name, key, 0, most_key): number_in(name, value, -most, most) for key, value in values.items()}


def texts_in(name: str, values: object, most: int) -> tuple[str, ...]:
    """At most `most` strings, none of them empty, of a list or a tuple."""
    if isinstance(values, str):  # each of its letters would be one
        raise RequestError(f"{name} is one string, {values!r}.", "Put it into a tuple.", param=name)
    if (
        not isinstance(values, tuple | list)
        or len(values) > most
        or any(not isinstance(t, str) or not t for t in values)
    ):
        raise RequestError(f"{name} must be at most {most} non-empty strings.", param=name)
    return tuple(values)


def token_ids(ids: object, *, vocab_size: int | None = None, param: str = "prompt") -> npt.NDArray[np.int32]:
    """A read-only int32 vector [n] of `ids`, a list or an array; RequestError if one is no integer or out of range."""
    import numpy as np  # here: what only reads settings stays light

    try:
        array = np.asarray(ids)
        if array.size and (array.ndim != 1 or array.dtype.kind not in "iu" or _holds_truth(ids)):
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise RequestError("Token ids must be a flat list of integers.", param=param) from None
    if array.size:
        low, high = int(array.min()), int(array.max())
        limit = vocab_size if vocab_size is not None else 2**31
        if low < 0 or high >= limit:
            worst = low if low < 0 else high
            raise RequestError(f"Token id {worst} is outside [0, {limit}).", param=param)
    out = array.astype(np.int32).reshape(-1)
    out.flags.writeable = False
    return out


def _holds_truth(ids: object) -> bool:
    """Whether a list has truth values, which an array of it takes for 0 and 1."""
    return isinstance(ids, list | tuple) and any(kind.__name__.startswith("bool") for kind in set(map(type, ids)))
