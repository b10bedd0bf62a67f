"""The soak's load on a processor: it finds nothing wrong in a sound engine, sees what is wrong, and ends when told."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from triptych.engine.api import Engine
from triptych.words import SamplingParams

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT))
    yield importlib.import_module("benchmarks.gpu.soak_load")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """A cache of few pages, so that most of what is cached moves."""
    given: dict[str, Any] = {"max_running": 4, "kv_memory": 12 << 20, "host_memory": 16 << 20}
    engine = Engine.load("tiny", device="cpu", disk=str(tmp_path), deterministic=True, canary=1.0, **given)
    yield engine
    engine.close()


def soak(load: ModuleType, engine: Engine, seconds: float) -> Any:
    return load.Load(engine, load.Plan(seconds, tokens=1000, longest=24, exact=True, mood=seconds / 4), seed=1)


def test_a_sound_engine_is_not_complained_of(load: ModuleType, engine: Engine) -> None:
    one = soak(load, engine, 6.0)
    one.run()
    assert one.wrong == []
    assert one.done["requests"] > 0 and one.done["checks"] > 0
    assert one.done["again"] == one.done["again_same"]


def test_another_answer_than_before_is_named(load: ModuleType, engine: Engine) -> None:
    one = soak(load, engine, 0.0)
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    one._known.append(load.Asked(np.arange(2, 40, dtype=np.int32), params, tokens=[-1, -1, -1, -1]))
    one._again()
    one.run()
    assert len(one.wrong) == 1 and "another answer" in one.wrong[0]


def test_what_is_held_in_the_end_is_named(load: ModuleType, engine: Engine) -> None:
    one = soak(load, engine, 0.0)
    free = engine._loop.cache.free_slots
    lost = free.pop()
    one.run()
    assert len(one.wrong) == 1 and "AssertionError" in one.wrong[0]
    free.append(lost)


def test_it_gives_up_what_runs_when_it_is_stopped(load: ModuleType, engine: Engine) -> None:
    one = soak(load, engine, 1000.0)
    params = SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True)
    one._add(load.Asked(np.arange(2, 40, dtype=np.int32), params))
    one.stop()
    one.run()
    assert one.wrong == [] and one.done["aborted"] == 1
