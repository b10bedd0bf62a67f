"""Which device an engine takes and what it says when it cannot; no GPU is needed for that."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from triptych.cache.geometry import CacheCapacity, CacheGeometry
from triptych.config import EngineConfig
from triptych.engine import device, load
from triptych.engine.batching import build_batch
from triptych.engine.pools import Pools
from triptych.errors import ConfigError
from triptych.model.weights import WeightStore
from triptych.tiny.shape import TINY_SHAPE
from triptych.words import Chunk, SnapshotWrite


def _machine(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, cuda: str | None = "13.0") -> None:
    """As if torch saw one GPU of that compute capability, or none."""
    properties = SimpleNamespace(name="GPU Z", total_memory=80 << 30)
    if capability is not None:
        properties.major, properties.minor = capability
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.version, "cuda", cuda)


@pytest.mark.parametrize(
    ("wanted", "capability", "got"),
    [
        ("auto", None, "cpu"),
        ("auto", (9, 0), "cuda"),
        ("auto", (7, 5), "cpu"),
        ("cpu", (9, 0), "cpu"),
        ("cuda", (8, 0), "cuda"),
    ],
)
def test_auto_takes_a_gpu_that_can(
    monkeypatch: pytest.MonkeyPatch, wanted: str, capability: tuple[int, int] | None, got: str
) -> None:
    _machine(monkeypatch, capability)
    assert device.device_for(EngineConfig.from_options(device=wanted)).type == got


@pytest.mark.parametrize(
    ("capability", "cuda", "sentence"),
    [
        (None, None, "has no CUDA"),
        (None, "13.0", "finds no NVIDIA GPU"),
        ((7, 5), "13.0", "GPU Z has compute capability 7.5; Triptych needs 8.0 or newer"),
    ],
)
def test_a_gpu_that_is_asked_for_and_cannot_be_had_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, cuda: str | None, sentence: str
) -> None:
    _machine(monkeypatch, capability, cuda)
    with pytest.raises(ConfigError, match=sentence):
        device.device_for(EngineConfig(device="cuda"))


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="device must be auto, cpu or cuda"):
        EngineConfig.from_options(device="tpu")


def test_a_batch_is_rebuilt_from_all_of_its_vectors() -> None:
    geometry = CacheGeometry.of(TINY_SHAPE)
    pools = Pools(TINY_SHAPE, geometry, CacheCapacity(frames=12 + geometry.snapshot_frames, slots=1))
    frames = tuple(range(12, 12 + geometry.snapshot_frames))
    chunk = Chunk(
        "r", 0, 130, 1200, np.zeros(1070, np.int32), np.arange(10, dtype=np.int32), 1152, 130,
        snapshots=(SnapshotWrite(1152, frames),), samples=True, replay_to=1152,
    )  # fmt: skip
    batch = build_batch([chunk], pools)
    assert batch.narrow, "a trapezoid narrows"
    vectors = list(device._tensors(batch))
    assert len(vectors) > 100 and all(vector.dtype == torch.int64 for vector in vectors)
    again = device._rebuilt(batch, iter([vector + 1 for vector in vectors]))
    assert all(torch.equal(a + 1, b) for a, b in zip(vectors, device._tensors(again), strict=True))
    assert again.window.total == batch.window.total and again.narrow.keys() == batch.narrow.keys()
    assert device.on_device(batch, torch.device("cpu")) is batch


def test_weights_on_no_device_tell_their_size() -> None:
    there, nowhere = WeightStore(TINY_SHAPE), WeightStore(TINY_SHAPE, device="meta")
    assert there.nbytes == nowhere.nbytes > 30 << 20
    assert nowhere.weights.embed.device.type == "meta"


def test_released_weights_want_native_numerics() -> None:
    load._refuse_released(EngineConfig(weight_dtype="released", numerics="native"))
    with pytest.raises(ConfigError, match="exact numerics do not have"):
        load._refuse_released(EngineConfig(weight_dtype="released", numerics="exact"))
