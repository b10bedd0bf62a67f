"""One bundled engine for the whole folder: loading takes a second, and every test leaves it without requests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from triptych.config import EngineConfig
from triptych.engine.api import Engine
from triptych.engine.load import LoadedEngine, load

OPTIONS = {"kv_memory": 64 << 20, "max_running": 8, "step_tokens": 256}


@pytest.fixture(scope="session")
def loaded() -> LoadedEngine:
    return load("tiny", EngineConfig.from_options(**OPTIONS))


@pytest.fixture
def engine(loaded: LoadedEngine) -> Iterator[Engine]:
    engine = Engine(loaded)
    engine.reset_cache()
    yield engine
    assert not loaded.loop.busy
    engine.check_integrity()
