"""The disk store on a file system with less room than the quota: that is the quota then, and nothing else changes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from store_faults import FaultyFiles, key_of, object_of
from test_store_segments import LARGE, SIZE, fill, present, warnings

from triptych.cache.store import SegmentStore

CAPACITY = 60_000


def small_disk(reports: bool = True, capacity: int = CAPACITY) -> FaultyFiles:
    """A file system of `capacity` bytes, which may tell what is free."""
    files = FaultyFiles()
    files.capacity, files.reports = capacity, reports
    return files


@contextmanager
def opened_on(directory: Path, files: FaultyFiles, now: list[float]) -> Iterator[SegmentStore]:
    """A store with a large quota, and a clock that the test sets."""
    with closing(SegmentStore(directory, b"weights", LARGE, 10_000, clock=lambda: now[0], files=files)) as store:
        yield store


def fill_slowly(store: SegmentStore, numbers: range, now: list[float]) -> None:
    for number in numbers:
        now[0] += 0.01
        fill(store, range(number, number + 1))


@pytest.mark.parametrize("reports", [True, False])
def test_what_fits_is_the_quota(tmp_path: Path, reports: bool, caplog: pytest.LogCaptureFixture) -> None:
    now = [1e9]
    with opened_on(tmp_path, small_disk(reports), now) as store:
        fill_slowly(store, range(100), now)
        kept = present(store, range(100))
        assert len(kept) >= 16 and kept == set(range(100 - len(kept), 100)), "the oldest go first, as under a quota"
        assert store.stats()[4:6] == (0, 0), "nothing was damaged or refused"
        assert store.stats().bytes_used <= store.stats().bytes_room < CAPACITY
    assert len(warnings(caplog)) == 1
    assert f"{tmp_path} may take 1.0 GiB, but its file system has room for 5" in warnings(caplog)[0]
    assert "lower --disk-memory" in warnings(caplog)[0]
    with opened_on(tmp_path, small_disk(reports), now) as store:
        assert present(store, range(100)) == kept
        fill_slowly(store, range(100, 130), now)


def test_what_is_used_survives_a_full_disk(tmp_path: Path) -> None:
    now = [1e9]
    with opened_on(tmp_path, small_disk(capacity=400_000), now) as store:
        hot = range(0, 40, 8)
        for number in range(400):
            now[0] += 1.0
            fill(store, range(number, number + 1))
            for used in hot if number > 40 else ():
                store.touch(key_of(used))
        assert present(store, range(40)) == set(hot)


@pytest.mark.parametrize("reports", [True, False])
def test_a_store_makes_way_for_others_and_takes_the_space_again(tmp_path: Path, reports: bool) -> None:
    now, files = [1e9], small_disk(reports)
    with opened_on(tmp_path, files, now) as store:
        fill_slowly(store, range(40), now)
        before = len(present(store, range(40)))
        files.others = CAPACITY - store.stats().bytes_used  # to the last byte
        fill_slowly(store, range(40, 80), now)
        files.others = CAPACITY // 2
        now[0] += 3600.0
        fill_slowly(store, range(80, 120), now)
        between = len(present(store, range(120)))
        files.others = 0
        now[0] += 3600.0
        fill_slowly(store, range(120, 200), now)
        assert 4 <= between < before
        kept = present(store, range(200))
        assert len(kept) >= 16 and kept == set(range(200 - len(kept), 200))
        assert store.stats()[4:6] == (0, 0)


def test_the_whole_quota_is_taken_when_there_is_room_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    now, files = [1e9], small_disk(reports=False)
    with closing(SegmentStore(tmp_path, b"weights", 90_000, 10_000, clock=lambda: now[0], files=files)) as store:
        fill_slowly(store, range(100), now)
        files.capacity = 200_000
        now[0] += 61.0
        fill_slowly(store, range(100, 200), now)
        assert len(present(store, range(200))) >= 28
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "has room for all its 87.9 KiB again" in caplog.messages[1]


@pytest.mark.parametrize("room", [0, 1, 63, 64, 100, 2000, 2150, 9000])
def test_where_giving_up_makes_no_room_little_is_given_up(
    tmp_path: Path, room: int, caplog: pytest.LogCaptureFixture
) -> None:
    now, files = [1e9], FaultyFiles()
    files.reports = False
    with opened_on(tmp_path, files, now) as store:
        fill_slowly(store, range(80), now)
        files.room = room
        stored = [store.put(key_of(number), [object_of(number, SIZE)]) for number in range(80, 100)]
        kept = present(store, range(100))
        assert not any(stored[5:]) and len(kept) > 50, "after one try the rest stays where it is"
        assert len(warnings(caplog)) == 1
        files.room = None
        now[0] += 600.0
        fill_slowly(store, range(100, 120), now)
        assert present(store, range(100)) == kept
        assert store.stats().damaged == 0
    with opened_on(tmp_path, FaultyFiles(), now) as store:
        assert present(store, range(120)) == kept | set(range(100, 120))


def test_a_disk_too_small_for_an_object_refuses_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = [1e9]
    for capacity in (0, 10, 64, 1000, 2200):
        with opened_on(tmp_path / str(capacity), small_disk(capacity=capacity), now) as store:
            assert not store.put(key_of(1), [object_of(1, SIZE)])
            assert present(store, range(2)) == set()
        assert [line for line in warnings(caplog) if f"{tmp_path}/{capacity} may take" in line]
    assert len(warnings(caplog)) == 5


def test_a_real_file_system_that_is_full(tmp_path: Path) -> None:
    """A tmpfs of 2 MB in a name space of its own, where the kernel lets users make one."""
    code = (
        "import sys; from pathlib import Path; from triptych.cache.store import SegmentStore\n"
        "from store_faults import key_of, object_of, fetch\n"
        "for life in range(2):\n"
        "    store = SegmentStore(Path(sys.argv[1]), b'weights', 1 << 26)\n"
        "    assert all(store.put(key_of(n), [object_of(n, 20_000)]) for n in range(200 * life, 200 * life + 200))\n"
        "    kept = [n for n in range(400) if fetch(store, key_of(n), 20_000) == object_of(n, 20_000)]\n"
        "    print(len(kept) > 70, kept[-1], store.stats().damaged)\n"
        "    store.close()\n"
    )
    unshare = shutil.which("unshare")
    mount = f"mount -t tmpfs -o size=2m none {tmp_path}"
    if unshare is None or subprocess.run([unshare, "-Urm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [unshare, "-Urm", "sh", "-c", f'{mount} && exec "$0" "$@"', sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["True 199 0", "True 399 0"]
    assert done.stderr.count("lower --disk-memory") == 2, "once in each life"
