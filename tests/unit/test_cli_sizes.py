"""Sizes in and out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.engine.sizes import format_size, parse_size
from triptych.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096", 4096),
        ("12B", 12),
        ("2GiB", 2 << 30),
        ("2 gib", 2 << 30),
        ("1.5GB", 1_500_000_000),
        ("0.5KiB", 512),
        (" 7 TB ", 7 * 10**12),
    ],
)
def test_sizes_are_read_as_written(text: str, size: int) -> None:
    assert parse_size(text, "--kv-memory") == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "2 G B", "two", "1e9", "nan", "1..5MB", "2G"])
def test_what_is_no_size_names_the_option(text: str) -> None:
    with pytest.raises(ConfigError, match="--kv-memory"):
        parse_size(text, "--kv-memory")


@pytest.mark.parametrize("text", ["0", "0GiB", "0.1B"])
def test_nothing_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="at least one byte"):
        parse_size(text, "--kv-memory")


@given(st.integers(1, 1 << 50))
def test_integers_are_exact_and_formatting_is_close(size: int) -> None:
    assert parse_size(str(size), "x") == size
    assert parse_size(format_size(size), "x") == pytest.approx(size, rel=0.006)
