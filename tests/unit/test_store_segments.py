"""The disk store: what a restart finds, what the quota keeps, whose directory it is."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from store_faults import FaultyFiles, fetch, key_of, object_of

from triptych.cache.store.files import Files
from triptych.cache.store.segment import SUPERBLOCK_BYTES
from triptych.cache.store.segments import SegmentStore
from triptych.errors import ConfigError

SIZE = 2000
LARGE = 1 << 30


@contextmanager
def opened(
    directory: Path,
    fingerprint: bytes = b"weights",
    quota: int = LARGE,
    segment_bytes: int = 10_000,
    files: Files | None = None,
) -> Iterator[SegmentStore]:
    """A store with small segments: four objects of SIZE in each."""
    with closing(SegmentStore(directory, fingerprint, quota, segment_bytes, files=files)) as store:
        yield store


def fill(store: SegmentStore, numbers: range, size: int = SIZE) -> None:
    for number in numbers:
        assert store.put(key_of(number), [object_of(number, size)])


def present(store: SegmentStore, numbers: range, size: int = SIZE) -> set[int]:
    """Numbers of the objects that can be read; wrong bytes fail the test."""
    found = set()
    for number in numbers:
        data = fetch(store, key_of(number), size)
        assert data is None or data == object_of(number, size), f"wrong bytes for {number}"
        if data is not None:
            found.add(number)
    return found


def copy_of(source: Path, target: Path) -> Path:
    """The directory as a killed process leaves it."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("indexes", ["kept", "lost"])
def test_a_restart_finds_everything(tmp_path: Path, indexes: str) -> None:
    with opened(tmp_path) as store:
        fill(store, range(30))
        store.discard(key_of(7))
    if indexes == "lost":
        for path in tmp_path.glob("*.index"):
            path.unlink()
    with opened(tmp_path) as store:
        assert len(list(tmp_path.glob("*.data"))) == 8
        assert present(store, range(30)) == set(range(30)) - {7}
        assert store.stats().damaged == 0


def test_a_restart_without_close_finds_everything(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as store:
        fill(store, range(30))
        store.discard(key_of(29))
        killed = copy_of(tmp_path / "a", tmp_path / "b")
    with opened(killed) as store:
        assert key_of(29) not in store
        assert present(store, range(30)) == set(range(29))


def test_a_discard_outlives_an_index_that_does_not_know_of_it(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as store:
        fill(store, range(4))
    with opened(tmp_path / "a") as store:
        store.discard(key_of(1))
        killed = copy_of(tmp_path / "a", tmp_path / "b")
    with opened(killed) as store:
        assert present(store, range(4)) == {0, 2, 3}
        assert store.stats().damaged == 0


def test_an_object_replaced_by_another_length_does_not_come_back(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.put(key_of(1), [b"short"])
        store.put(key_of(1), [b"longer"])
        store.discard(key_of(1))
    for path in tmp_path.glob("*.index"):
        path.unlink()
    with opened(tmp_path) as store:
        assert key_of(1) not in store


def test_writing_goes_on_in_the_last_segment(tmp_path: Path) -> None:
    for number in range(4):
        with opened(tmp_path) as store:
            fill(store, range(number, number + 1))
    assert len(list(tmp_path.glob("*.data"))) == 1
    with opened(tmp_path) as store:
        assert present(store, range(4)) == set(range(4))


def test_a_torn_record_is_invisible_and_overwritten(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        fill(store, range(3))
    [path] = tmp_path.glob("*.data")
    for cut in (1, SIZE // 2, SIZE, SIZE + 40):
        whole = path.read_bytes()
        os.truncate(path, len(whole) - cut)
        with opened(tmp_path) as store:
            assert key_of(2) not in store
            assert present(store, range(3)) == {0, 1}
            assert store.stats().damaged == 0
            fill(store, range(2, 3))
        with opened(tmp_path) as store:
            assert present(store, range(3)) == {0, 1, 2}
        assert len(path.read_bytes()) == len(whole)


def test_another_fingerprint_is_never_read_and_its_space_is_free(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path) as store:
        fill(store, range(30))
    (tmp_path / "notes.txt").write_text("not the store's")
    with opened(tmp_path, fingerprint=b"other weights") as store:
        assert store.stats()[:2] == (0, 0)
        assert present(store, range(30)) == set()
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
        assert len(warnings(caplog)) == 1 and "other weights, formats or layout" in warnings(caplog)[0]
        fill(store, range(3))
    with opened(tmp_path, fingerprint=b"other weights") as store:
        assert present(store, range(3)) == {0, 1, 2}


def test_a_segment_copied_from_another_store_is_not_read(tmp_path: Path) -> None:
    """Also with the superblock of this store: every record knows where it belongs."""
    with opened(tmp_path / "a", fingerprint=b"one") as store:
        fill(store, range(4))
    with opened(tmp_path / "b", fingerprint=b"two") as store:
        store.put(key_of(99), [bytes(SIZE)])
    name = "segment-00000000.data"
    ours, theirs = (tmp_path / "b" / name).read_bytes(), (tmp_path / "a" / name).read_bytes()
    (tmp_path / "b" / name).write_bytes(ours[:SUPERBLOCK_BYTES] + theirs[SUPERBLOCK_BYTES:])
    with opened(tmp_path / "b", fingerprint=b"two") as store:
        assert present(store, range(4)) == set()
        assert fetch(store, key_of(99), SIZE) is None


def test_the_quota_holds_and_the_oldest_go_first(tmp_path: Path) -> None:
    with opened(tmp_path, quota=60_000) as store:
        for number in range(100):
            fill(store, range(number, number + 1))
            assert store.stats().bytes_used <= 60_000
            assert sum(path.stat().st_size for path in tmp_path.glob("*.data")) <= 60_000
        kept = present(store, range(100))
    assert len(kept) >= 16 and kept == set(range(100 - len(kept), 100))
    with opened(tmp_path, quota=20_000) as store:
        assert store.stats().bytes_used <= 20_000
        assert present(store, range(100)) < kept


def test_what_is_used_survives_and_amplification_stays_below_the_bound(tmp_path: Path) -> None:
    now = [1e9]
    store = SegmentStore(tmp_path, b"weights", 400_000, 10_000, clock=lambda: now[0])
    with closing(store):
        hot = range(0, 40, 8)
        for number in range(1000):
            now[0] += 1.0
            fill(store, range(number, number + 1))
            if number > 40:
                for used in hot:
                    store.touch(key_of(used))
        assert present(store, range(40)) == set(hot)
        assert 1.0 < store.stats().bytes_written / (1000 * SIZE) <= 1.3


def test_amplification_stays_below_the_bound_when_everything_is_used(tmp_path: Path) -> None:
    now = [1e9]
    store = SegmentStore(tmp_path, b"weights", 400_000, 10_000, clock=lambda: now[0])
    with closing(store):
        for number in range(1000):
            now[0] += 1.0
            fill(store, range(number, number + 1))
            for used in range(number % 3, number, 3):
                store.touch(key_of(used))
        assert store.stats().bytes_written / (1000 * SIZE) <= 1.3


def test_touches_are_remembered_by_the_index(tmp_path: Path) -> None:
    now = [1e9]
    with closing(SegmentStore(tmp_path, b"weights", 60_000, 10_000, clock=lambda: now[0])) as store:
        for number in range(16):
            now[0] += 1.0
            fill(store, range(number, number + 1))
        now[0] += 1000.0
        for number in range(4):
            store.touch(key_of(number))
    with closing(SegmentStore(tmp_path, b"weights", 60_000, 10_000, clock=lambda: now[0])) as store:
        fill(store, range(100, 112))
        assert present(store, range(4)) == set(range(4))
        assert present(store, range(4, 8)) == set()


def test_an_object_too_large_for_the_quota_is_refused_and_nothing_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path, quota=40_000) as store:
        fill(store, range(4))
        assert not store.put(key_of(50), [bytes(40_000)])
        assert not store.put(key_of(50), [bytes(40_000)])
        assert store.put(key_of(51), [bytes(15_000)]), "larger than a segment, but it fits"
        assert fetch(store, key_of(51), 15_000) == bytes(15_000)
        assert present(store, range(4)) == set(range(4))
        assert store.stats().refused == 2
    assert len(warnings(caplog)) == 1


def test_a_second_store_on_the_directory_is_refused_by_name(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(ConfigError, match="in use by another process") as caught:
        SegmentStore(tmp_path, b"weights", LARGE)
    assert str(tmp_path) in str(caught.value)
    with opened(tmp_path):
        pass


def test_a_second_process_is_refused_and_a_dead_one_blocks_nobody(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from triptych.cache.store import SegmentStore\n"
        "store = SegmentStore(Path(sys.argv[1]), b'weights', 1 << 30); print('open', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"open\n"
        with pytest.raises(ConfigError, match="in use"):
            SegmentStore(tmp_path, b"weights", LARGE)
        other.kill()
    with opened(tmp_path) as store:
        fill(store, range(1))


def test_a_path_that_is_no_directory_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    for wrong in (path, path / "below"):
        with pytest.raises(ConfigError, match="cannot be used") as caught:
            SegmentStore(wrong, b"weights", LARGE)
        assert str(wrong) in str(caught.value)
    with pytest.raises(ConfigError, match="quota"):
        SegmentStore(tmp_path, b"weights", 0)


def test_descriptors_do_not_leak(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    with opened(tmp_path, quota=60_000) as store:
        for number in range(200):
            fill(store, range(number, number + 1))
            fetch(store, key_of(number), SIZE)
    with opened(tmp_path, fingerprint=b"other", files=FaultyFiles()):
        pass
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before
