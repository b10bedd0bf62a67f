"""Numbers and token ids as callers have them: numpy's and others' become plain, and what is none is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from triptych.engine.options import options_of
from triptych.errors import ConfigError, RequestError
from triptych.values import integral, real, token_ids
from triptych.words import CacheHints, SamplingParams


class Index:
    """Neither numpy's nor Python's, and an integer nevertheless."""

    def __index__(self) -> int:
        return 7


@pytest.mark.parametrize("value", [7, np.int8(7), np.uint64(7), np.array(7), Index()])
def test_integers_of_any_type_are_integers(value: object) -> None:
    assert integral(value) == 7 and type(integral(value)) is int


@pytest.mark.parametrize("value", [True, np.bool_(True), 7.0, np.float64(7), "7", None, np.array([7]), [7], 7j])
def test_what_is_no_integer_is_none(value: object) -> None:
    assert integral(value) is None


@pytest.mark.parametrize("value", [0.5, np.float16(0.5), np.float64(0.5)])
def test_numbers_of_any_type_are_numbers(value: object) -> None:
    assert real(value) == 0.5 and type(real(value)) is float
    assert real(np.int64(3)) == 3


@pytest.mark.parametrize("value", [True, np.bool_(False), "0.5", None, float("nan"), np.float32("inf"), 1j, [0.5]])
def test_what_is_no_finite_number_is_none(value: object) -> None:
    assert real(value) is None


def test_sampling_takes_numpys_numbers() -> None:
    ours = {"seed": 3, "max_tokens": 5, "n": 2, "top_k": 4, "logprobs": 1, "temperature": 0.5, "top_p": 0.25}
    theirs = {name: np.int64(value) if isinstance(value, int) else np.float32(value) for name, value in ours.items()}
    given = SamplingParams(**theirs, stop_token_ids=np.array([1, 2]), logit_bias={np.int32(3): np.float16(1.5)})  # type: ignore[arg-type]
    assert given == SamplingParams(**ours, stop_token_ids=(1, 2), logit_bias={3: 1.5})  # type: ignore[arg-type]
    assert all(type(getattr(given, name)) is type(value) for name, value in ours.items())
    assert all(type(token) is int for token in given.stop_token_ids)
    hints = CacheHints(marks=np.array([128, 256]), ttl=np.float32(1), pin=np.int64(2))  # type: ignore[arg-type]
    assert hints == CacheHints(marks=(128, 256), ttl=1.0, pin=2)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"seed": True}, "seed must be an integer from -9223372036854775808 to 9223372036854775807, not True"),
        ({"max_tokens": 2.0}, "max_tokens must be an integer from 1 to 2147483647, not 2.0"),
        ({"top_k": np.float64(2)}, "top_k must be an integer"),
        ({"temperature": np.bool_(True)}, "temperature must be a number in"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list of integers, not 5"),
        ({"stop_token_ids": "12"}, "stop_token_ids must be a list of integers, not '12'"),
        ({"stop_token_ids": [True]}, "stop_token_ids must be an integer from 0"),
        ({"logit_bias": [1]}, "logit_bias must map token ids to numbers"),
    ],
)
def test_fields_of_another_kind_are_named(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**given)
    assert sentence in str(caught.value) and caught.value.param == next(iter(given))


@pytest.mark.parametrize(
    "ids",
    [[1, 2], (np.int64(1), 2), np.array([1, 2], dtype=np.uint8), np.array([1, 2], dtype=np.int64), range(1, 3)],
    ids=["list", "tuple", "bytes", "long", "range"],
)
def test_prompts_are_lists_or_arrays_of_integers(ids: object) -> None:
    out = token_ids(ids, vocab_size=3)
    assert out.tolist() == [1, 2] and out.dtype == np.int32 and not out.flags.writeable


@pytest.mark.parametrize(
    "ids", [[True, 2], (2, np.bool_(True)), np.array([True]), [1.0], np.array([1.0]), 5, [[1]], [None]]
)
def test_prompts_of_anything_else_are_refused(ids: object) -> None:
    with pytest.raises(RequestError, match=r"Token ids must be a flat list of integers\."):
        token_ids(ids)


def test_options_take_numpys_numbers() -> None:
    given = options_of({"max_running": np.int64(4), "tenant_quota": np.float64(0.5), "kv_memory": np.int64(1 << 20)})
    assert given == {"max_running": 4, "tenant_quota": 0.5, "kv_memory": 1 << 20}
    assert type(given["max_running"]) is int
    with pytest.raises(ConfigError, match="max_running must be of type int, not True"):
        options_of({"max_running": True})
