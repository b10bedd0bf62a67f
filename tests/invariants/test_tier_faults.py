"""Tiers on bad ground: whatever happens below the device, the answer is right, nothing crashes, one line says it.

What the stores promise by themselves is proven in tests/unit/test_store_*.py; here a whole engine stands on them.
"""

from __future__ import annotations

import errno
import functools
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import small_engine
import torch
from small_engine import SHAPE, SmallEngine, accounted, agree, text
from tiered import (
    QUESTION,
    QUOTA,
    Ground,
    boundary_of,
    come_back,
    engine_over,
    leave,
    resumed_from,
    server_or_skip,
    warnings,
)

from triptych.cache.geometry import LOOKBACK, CacheGeometry
from triptych.cache.store import SegmentStore
from triptych.cache.store.record import HEADER_BYTES
from triptych.config import EngineConfig
from triptych.engine import mover as mover_module
from triptych.engine import stores as stores_module
from triptych.engine.stores import namespace
from triptych.words import Usage

from store_faults import FaultyFiles, FaultyStore  # isort: skip  (tiered.py makes it importable)

LENGTH = 300
RIGHT_AFTER = 6  # tokens: a lost window or overlap shows from the fourth on


@pytest.fixture(scope="module", autouse=True)
def remembered_truth() -> Iterator[None]:
    """The same texts are asked again and again: work out once what each gives alone."""
    patch = pytest.MonkeyPatch()
    patch.setattr(small_engine, "alone", functools.cache(small_engine.alone))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which an engine left a prompt of LENGTH: two pages and a snapshot."""
    directory = tmp_path_factory.mktemp("kept") / "disk"
    with Ground(directory).engine("disk") as engine:
        engine.ask(text(1, LENGTH), 1)
    return directory


def places(directory: Path) -> dict[str, list[int]]:
    """By file: an offset in every field of every region, and in the bytes that nobody reads."""
    store = SegmentStore(directory, b"small", QUOTA)
    entries = [(entry.offset, entry.length) for entry in store._index.values()]
    store.close()
    out: dict[str, list[int]] = {}
    for path in sorted(directory.iterdir()):
        size = path.stat().st_size
        if path.suffix == ".data":
            # superblock; of each record magic, kind, name, length, checksum, its own checksum, payload, padding
            fields = (0, 10, 30, 50, 60, HEADER_BYTES - 1)
            at = [0, 20, 40, 63] + [offset + field for offset, _ in entries for field in fields]
            for offset, length in entries:
                start = offset + HEADER_BYTES
                at += [start, start + length // 2, start + length - 1, start + length]
        else:
            at = [0, 20, 40, size // 2, size - 1]
        out[path.name] = [offset for offset in at if offset < size]
    return out


def flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1 << offset % 8
    path.write_bytes(raw)


def heals(directory: Path) -> None:
    """A new engine answers right, stores again what it had to compute, and the next one finds all pages."""
    with Ground(directory).engine("disk") as engine:
        come_back(engine, LENGTH, RIGHT_AFTER)
    with Ground(directory).engine("disk") as engine:
        found_all_pages(come_back(engine, LENGTH, RIGHT_AFTER), LENGTH)


def found_all_pages(usage: Usage, length: int) -> None:
    """Whatever became of the snapshot: none of the pages was computed."""
    assert usage.cached_tokens + usage.recomputed_tokens == boundary_of(length)


def test_a_flipped_bit_anywhere_in_the_files(kept: Path, tmp_path: Path) -> None:
    for name, offsets in places(kept).items():
        for offset in offsets:
            directory = tmp_path / f"{name}-{offset}"
            shutil.copytree(kept, directory)
            flip(directory / name, offset)
            heals(directory)
            shutil.rmtree(directory)


@pytest.mark.parametrize("suffix", [".data", ".index"])
def test_a_file_cut_short(kept: Path, tmp_path: Path, suffix: str) -> None:
    [path] = kept.glob(f"*{suffix}")
    size = path.stat().st_size
    for length in (0, 1, 63, 64, 65, 143, 144, size // 2, size - 100, size - 1):
        directory = tmp_path / str(length)
        shutil.copytree(kept, directory)
        os.truncate(directory / path.name, length)
        heals(directory)


def test_damage_under_a_running_engine_is_a_miss_and_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Ground(tmp_path).engine("disk") as engine:
        leave(engine, 1000)
        [path] = tmp_path.glob("*.data")
        for offset in range(200, path.stat().st_size, 5000):
            flip(path, offset)
        assert come_back(engine, 1000).cached_tokens == 0
        [line] = warnings(caplog)
        assert "unreadable and forgotten" in line
        assert engine.loop.settle(30.0)
        engine.spoil_device()
        found_all_pages(come_back(engine, 1000), 1000)


def test_the_directory_vanishes_under_a_running_engine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "disk"
    with Ground(directory).engine("disk") as engine:
        leave(engine, LENGTH)
        shutil.rmtree(directory)
        for seed in (1, 7, 8):
            agree(engine.ask(text(seed, 600), RIGHT_AFTER))
            assert engine.loop.settle(30.0)
            engine.spoil_device()
        assert come_back(engine, LENGTH).cached_by_tier, "open files stay readable"
    assert len(warnings(caplog)) <= 1


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO, errno.EACCES])
def test_a_disk_that_cannot_be_written(
    kept: Path, tmp_path: Path, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    """What it holds is served, nothing is kept, one line says why."""
    shutil.copytree(kept, tmp_path / "disk")
    files = FaultyFiles()
    with engine_over([SegmentStore(tmp_path / "disk", b"small", QUOTA, files=files)]) as engine:
        files.write_error = number
        resumed_from(come_back(engine, LENGTH), "disk", LENGTH)
        for seed in (7, 8, 9):
            agree(engine.ask(text(seed, 600), RIGHT_AFTER))
        assert engine.loop.settle(30.0)
        assert engine.cache.tiers.moved.failed_saves >= 3 * 5
        assert all(os.strerror(number) in line for line in warnings(caplog))
        assert sum("The disk cache" in line and "cannot be written" in line for line in warnings(caplog)) == 1
        assert len(warnings(caplog)) <= 2, "fifteen objects could not be kept"
        files.write_error = None


@pytest.mark.parametrize("room", [0, 63, 64, 6000, 7000, 20_000, 40_000])
def test_a_disk_that_becomes_full(tmp_path: Path, room: int, caplog: pytest.LogCaptureFixture) -> None:
    files = FaultyFiles()
    with engine_over([SegmentStore(tmp_path, b"small", QUOTA, files=files)]) as engine:
        files.room = room
        leave(engine, 1000)
        come_back(engine, 1000)
        [line] = warnings(caplog)
        assert "its file system has room for" in line
        files.room = None
        engine.loop.settle(30.0)
        engine.spoil_device()
        come_back(engine, 1000)
    with Ground(tmp_path).engine("disk") as engine:
        found_all_pages(come_back(engine, 1000), 1000)


def test_a_disk_that_cannot_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = FaultyFiles()
    with engine_over([SegmentStore(tmp_path, b"small", QUOTA, files=files)]) as engine:
        leave(engine, 1000)
        files.read_error = errno.EIO
        assert come_back(engine, 1000).cached_tokens == 0
        [line] = warnings(caplog)
        assert "Input/output error" in line


def test_a_store_that_fails_now_and_then(tmp_path: Path) -> None:
    """Every third operation goes wrong, some after the frames were scribbled on."""
    asked = 0

    def fault(operation: str, key: object) -> str:
        nonlocal asked
        asked += 1
        return ["ok", "ok", "corrupt" if operation == "get" else "fail", "ok", "ok", "fail"][asked % 6]

    [disk] = Ground(tmp_path).stores("disk")
    with engine_over([FaultyStore(disk, fault)]) as engine:
        for _ in range(6):
            leave(engine, 1000)
            come_back(engine, 1000, RIGHT_AFTER)
        assert engine.cache.tiers.moved.failed_fetches and engine.cache.tiers.moved.failed_saves


# ---- the host


def flip_on_the_host(engine: SmallEngine, kind: str, depth: int = 0) -> None:
    """One bit of an object of `kind`: the one that was demoted `depth` before the last."""
    host = engine.cache.tiers.host
    assert host is not None
    items = [item for key, item in host.objects.items() if key.kind == kind]
    engine.loop._mover._host[items[-1 - depth].frames[0], 9] ^= 16


@pytest.mark.parametrize(("kind", "depth"), [("page", 0), ("page", 3), ("page", 6), ("snapshot", 0)])
def test_a_flipped_bit_on_the_host_is_a_miss_and_one_line(
    kind: str, depth: int, caplog: pytest.LogCaptureFixture
) -> None:
    with engine_over([], host_pages=160) as engine:
        leave(engine, 1000)
        flip_on_the_host(engine, kind, depth)
        come_back(engine, 1000)
        assert engine.cache.tiers.moved.failed_fetches <= 1
        lines = warnings(caplog)
        assert len(lines) <= 1 and all("does not match its checksum" in line for line in lines)
        assert lines or kind == "snapshot", "every page is fetched, not every snapshot"


def test_all_of_the_host_is_scribbled_on(caplog: pytest.LogCaptureFixture) -> None:
    with engine_over([], host_pages=160) as engine:
        leave(engine, 1000)
        engine.loop._mover._host[:] = 0
        assert come_back(engine, 1000).cached_tokens == 0
        assert len(warnings(caplog)) == 1


def test_another_objects_bytes_on_the_host_are_no_match() -> None:
    """A page with a checksum of its own in the place of another: right bytes, wrong prefix."""
    with engine_over([], host_pages=160, policy="none") as engine:
        leave(engine, 1000)
        host, mover = engine.cache.tiers.host, engine.loop._mover
        assert host is not None
        first, second = [item.frames[0] for item in host.objects.values()][-2:]
        mover._host[first] = mover._host[second]
        mover._sums[first] = mover._sums[second]
        come_back(engine, 1000)


def test_the_mover_remembers_one_checksum_a_host_frame() -> None:
    """What it remembers is bounded by the host's memory, not by what ever passed through it."""
    with engine_over([], host_pages=9, pages=8) as engine:
        mover, host = engine.loop._mover, engine.cache.tiers.host
        for seed in range(12):
            engine.ask(text(seed, 300), 1)
            engine.spoil_device()
        assert host is not None and host.evicted
        assert len(mover._sums) == 9
        for key, item in host.objects.items():
            kept = mover._sums[item.frames[0]]
            assert kept is not None and kept[0] == key


def test_more_is_given_up_in_one_step_than_the_host_holds() -> None:
    """Objects take the host's frames from each other before any of them was copied; threads copy what is left."""
    with engine_over([], host_pages=40, policy="none") as engine:
        for seed in (1, 2, 3):
            engine.ask(text(seed, 6000), 1)
        engine.spoil_device()
        host = engine.cache.tiers.host
        assert host is not None and len(host.objects) == 40
        for seed in (1, 2, 3):
            agree(engine.ask((*text(seed, 6000), *QUESTION), RIGHT_AFTER))
            assert engine.loop.settle(30.0)
        assert engine.cache.tiers.moved.bytes_out["host"] and not engine.cache.tiers.moved.failed_fetches


def test_memory_that_cannot_be_pinned_is_used_unpinned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def empty(*shape: object, pin_memory: bool = False, **more: object) -> torch.Tensor:
        assert pin_memory
        raise RuntimeError("CUDA error: out of memory\nand a page of advice")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", empty)
    memory = mover_module.host_memory(4, 1 << 20)
    assert memory.shape == (4, 1 << 20)
    assert warnings(caplog) == ["4 MiB of host memory cannot be pinned: CUDA error: out of memory"]


# ---- a server


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Ground]:
    ground = Ground(tmp_path / "disk")
    for ground.server in server_or_skip(tmp_path):
        yield ground


def test_a_server_that_goes_away_is_a_miss_and_one_line(ground: Ground, caplog: pytest.LogCaptureFixture) -> None:
    assert ground.server is not None
    with ground.engine("remote") as engine:
        leave(engine, 1000)
        ground.server.stop()
        assert come_back(engine, 1000).cached_tokens == 0
        agree(engine.ask(text(7, 600), RIGHT_AFTER))
        [line] = warnings(caplog)
        assert "does not answer" in line


def test_a_server_that_was_never_there(ground: Ground, caplog: pytest.LogCaptureFixture) -> None:
    assert ground.server is not None
    ground.server.stop()
    with ground.engine("remote") as engine:
        leave(engine, LENGTH)
        assert come_back(engine, LENGTH).cached_tokens == 0
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("offset", [0, 9, 40, 75, HEADER_BYTES, -1])
def test_a_server_that_gives_other_bytes(ground: Ground, offset: int, caplog: pytest.LogCaptureFixture) -> None:
    import valkey

    assert ground.server is not None
    with ground.engine("remote") as engine:
        leave(engine, LENGTH)
        client = valkey.Valkey.from_url(ground.server.url)
        for name in client.scan_iter():
            value = bytearray(client.get(name))
            value[offset] ^= 2
            client.set(name, bytes(value))
        client.close()
        assert come_back(engine, LENGTH).cached_tokens == 0
        [line] = warnings(caplog)
        assert "unreadable" in line


# ---- what must not be mixed

BASE = EngineConfig()
GEOMETRY = CacheGeometry.of(SHAPE, "float32")


def space(
    weights: bytes = b"w", geometry: CacheGeometry = GEOMETRY, config: EngineConfig = BASE, exact: bool = True
) -> bytes:
    return namespace(weights, geometry, config, exact=exact)


OTHERS = {
    "weights": lambda: space(weights=b"v"),
    "format": lambda: space(geometry=CacheGeometry.of(SHAPE, "bfloat16")),
    "index format": lambda: space(geometry=CacheGeometry.of(SHAPE, "float32", "bfloat16")),
    "numerics": lambda: space(config=replace(BASE, numerics="native")),
    "weight type": lambda: space(config=replace(BASE, weight_dtype="bfloat16")),
    "kernels": lambda: space(config=replace(BASE, kernel_backend="ref")),
    "determinism": lambda: space(config=replace(BASE, deterministic=True)),
    "approximate": lambda: space(exact=False),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_weights_formats_and_kernels_find_nothing(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Ground(tmp_path).engine("disk", fingerprint=space()) as engine:
        engine.ask(text(1, LENGTH), 1)
    with Ground(tmp_path).engine("disk", fingerprint=OTHERS[what]()) as engine:
        assert come_back(engine, LENGTH, RIGHT_AFTER).cached_tokens == 0
    [line] = warnings(caplog)
    assert "of other weights, formats or layout" in line


def test_another_layout_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = space()
    monkeypatch.setattr(stores_module, "LAYOUT", stores_module.LAYOUT + 1)
    assert space() != before


def test_two_models_share_a_server_unseen(ground: Ground) -> None:
    with ground.engine("remote", fingerprint=space()) as engine:
        engine.ask(text(1, LENGTH), 1)
    with ground.engine("remote", fingerprint=space(weights=b"v")) as engine:
        assert come_back(engine, LENGTH, RIGHT_AFTER).cached_tokens == 0
    with ground.engine("remote", fingerprint=space()) as engine:
        resumed_from(come_back(engine, LENGTH, RIGHT_AFTER), "remote", LENGTH)


def test_tenants_share_nothing_after_a_restart(tmp_path: Path) -> None:
    with Ground(tmp_path).engine("disk") as engine:
        engine.ask(text(1, LENGTH), 1, salt="a")
    with Ground(tmp_path).engine("disk") as engine:
        for salt in ("b", ""):
            assert accounted(engine.ask(text(1, LENGTH), 1, salt=salt)).cached_tokens == 0
        usage = come_back(engine, LENGTH, salt="a")
        assert usage.cached_by_tier == {"disk": 256 - LOOKBACK}
