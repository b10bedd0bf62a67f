"""Options of an engine as a caller writes them: sizes as text, and one sentence for a value of another type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from triptych.config import EngineConfig
from triptych.engine.options import options_of
from triptych.errors import ConfigError, RequestError
from triptych.words import SamplingParams


def test_sizes_may_be_text_and_directories_paths() -> None:
    given = {"kv_memory": "64MiB", "host_memory": 1 << 20, "disk": Path("/tmp/x"), "ttl": 5, "step_tokens": None}
    given |= {"disk_memory": None, "max_running": None}
    config = EngineConfig.from_options(**options_of(given))
    assert (config.cache.kv_memory, config.cache.host_memory) == (64 << 20, 1 << 20)
    assert (config.cache.disk, config.cache.ttl, config.step_tokens) == ("/tmp/x", 5, None)
    assert (config.cache.disk_memory, config.max_running) == (64 << 30, 16), "None is the default"


def test_what_is_no_option_is_left_to_who_knows_them() -> None:
    with pytest.raises(ConfigError, match=r"Unknown option 'kv_memroy'\. Did you mean 'kv_memory'\?"):
        EngineConfig.from_options(**options_of({"kv_memroy": "64MiB"}))
    shares = {"salt": 0.5}
    assert options_of({"tenant_shares": shares})["tenant_shares"] is shares


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("kv_memory", "64 MiBs", "load: kv_memory '64 MiBs' has an unknown unit 'MiBs'"),
        ("max_running", "4", "load: max_running must be of type int, not '4'."),
        ("deterministic", 1, "load: deterministic must be of type bool, not 1."),
        ("canary", "often", "load: canary must be of type float, not 'often'."),
        ("numerics", "exakt", "load: numerics 'exakt' is not known. Did you mean 'exact'?"),
    ],
)
def test_a_value_of_another_type_is_one_sentence(option: str, value: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options_of({option: value})
    assert sentence in str(caught.value)


@pytest.mark.parametrize("count", [0, -1])
def test_no_threads_are_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=f"threads must be at least 1, not {count}"):
        EngineConfig.from_options(threads=count)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"stop": None}, "stop must be at most 16 non-empty strings."),
        ({"stop": 3}, "stop must be at most 16 non-empty strings."),
        ({"stop": ("a", "")}, "stop must be at most 16 non-empty strings."),
        ({"grammar": "start: x"}, "grammar must be a Grammar, not str."),
    ],
)
def test_sampling_values_of_another_type_are_one_sentence(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**given)
    assert str(caught.value) == sentence


def test_a_stop_string_alone_is_not_taken_for_its_letters() -> None:
    with pytest.raises(RequestError, match=r"stop is one string, 'END'\. Put it into a tuple\."):
        SamplingParams(stop="END")  # type: ignore[arg-type]
