"""Shared flags: what Typer sees, and that flags and settings cannot drift apart."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Annotated, get_args, get_type_hints

import pytest
import typer

from triptych.cli.flags import EngineFlags, SamplingFlags, spread
from triptych.config import CacheConfig, EngineConfig
from triptych.errors import ConfigError
from triptych.words import SamplingParams


@dataclass(frozen=True)
class Colours:
    """Flags for the test."""

    red: Annotated[int, typer.Option(help="how red")] = 1
    blue: Annotated[str, typer.Option(help="how blue")] = "deep"


def test_spread_shows_the_fields_and_hands_over_the_dataclass() -> None:
    seen: list[tuple[str, Colours]] = []

    @spread
    def paint(name: str = "wall", *, colours: Colours) -> None:
        """Paint it."""
        seen.append((name, colours))

    assert list(inspect.signature(paint).parameters) == ["name", "red", "blue"]
    assert set(get_type_hints(paint)) == {"name", "red", "blue"}
    assert paint.__doc__ == "Paint it."
    paint(name="door", red=5, blue="pale")
    assert seen == [("door", Colours(5, "pale"))]


def test_engine_flags_are_engine_options() -> None:
    assert EngineFlags().options() == {}, "what was not given is the engine's to choose"
    flags = EngineFlags(kv_memory="1MiB", max_running=2, step_tokens=64, deterministic=True, numerics="native")
    config = EngineConfig.from_options(**flags.options())
    assert (config.cache.kv_memory, config.max_running, config.deterministic) == (1 << 20, 2, True)
    known = {f.name for f in fields(EngineConfig)} | {f.name for f in fields(CacheConfig)} | {"profile"}
    assert {f.name for f in fields(EngineFlags)} <= known


@pytest.mark.parametrize("name", ["numerics", "kernel_backend"])
def test_choices_offered_are_the_choices_there_are(name: str) -> None:
    offered = get_args(get_args(get_type_hints(EngineFlags)[name])[0])
    assert set(offered) == set(get_args(get_type_hints(EngineConfig)[name]))


def test_bad_engine_values_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="max_running"):
        EngineConfig.from_options(**EngineFlags(max_running=0).options())


def test_a_bound_of_a_disk_that_is_not_asked_for_is_refused() -> None:
    with pytest.raises(ConfigError, match="--disk-memory limits --disk, which is not given"):
        EngineFlags(disk_memory="1GiB").options()
    assert EngineFlags(disk_memory="1GiB", disk="/tmp/x").options()["disk_memory"] == 1 << 30
    assert "disk_memory" in EngineFlags(disk_memory="1GiB", profile="own.toml").options(), "which may name a disk"


def test_sampling_flags_agree_with_sampling_params() -> None:
    assert SamplingParams(**SamplingFlags().values()) == SamplingParams(max_tokens=SamplingFlags().max_tokens)
    assert SamplingParams(**SamplingFlags(stop=["a", "b"]).values()).stop == ("a", "b")
