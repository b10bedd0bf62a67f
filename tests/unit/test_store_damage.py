"""The disk store on a bad disk: whatever happens below, a get is exact or a miss, and nothing is raised."""

from __future__ import annotations

import errno
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from store_faults import FaultyFiles, key_of
from test_store_segments import SIZE, copy_of, fill, opened, present, warnings


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A directory with 10 objects in three segments, closed."""
    directory = tmp_path / "store"
    with opened(directory) as store:
        fill(store, range(10))
    return directory


def flip(path: Path, offset: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def test_a_flipped_bit_anywhere_costs_at_most_one_object(closed: Path, tmp_path: Path) -> None:
    rng = random.Random(1)
    files = sorted(path.name for path in closed.iterdir())
    places = [(name, at) for name in files for at in range(0, 160)]
    places += [(name, rng.randrange((closed / name).stat().st_size)) for name in files for _ in range(20)]
    for number, (name, offset) in enumerate(places):
        directory = copy_of(closed, tmp_path / str(number))
        flip(directory / name, offset, rng.randrange(8))
        with opened(directory) as store:
            found = present(store, range(10))
            assert len(found) >= (10 if name.endswith(".index") else 9), (name, offset)
            fill(store, range(10))
            assert present(store, range(10)) == set(range(10)), "what was lost can be put again"


def test_a_flipped_bit_without_an_index_costs_at_most_one_object(closed: Path, tmp_path: Path) -> None:
    rng = random.Random(2)
    names = sorted(path.name for path in closed.glob("*.data"))
    for path in closed.glob("*.index"):
        path.unlink()
    places = [(name, at) for name in names for at in range(64, 64 + 80)]
    places += [(name, rng.randrange((closed / name).stat().st_size)) for name in names for _ in range(20)]
    for number, (name, offset) in enumerate(places):
        directory = copy_of(closed, tmp_path / str(number))
        flip(directory / name, offset, rng.randrange(8))
        with opened(directory) as store:
            assert len(present(store, range(10))) >= 9, (name, offset)


def test_damage_under_an_open_store_is_a_miss_and_one_line(closed: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(closed) as store:
        for path in closed.glob("*.data"):
            flip(path, 64 + 80 + 100, 3)
        assert present(store, range(10)) == set(range(10)) - {0, 4, 8}
        assert store.stats().damaged == 3 and key_of(0) not in store
        assert len(warnings(caplog)) == 1 and "its checksum differs" in warnings(caplog)[0]


@pytest.mark.parametrize("suffix", ["data", "index"])
def test_truncated_files_are_misses(closed: Path, tmp_path: Path, suffix: str) -> None:
    for number, length in enumerate([0, 1, 63, 64, 100, 144, 145, 2000, 2200, 5000, 8000]):
        directory = copy_of(closed, tmp_path / f"{suffix}{number}")
        for path in directory.glob(f"*.{suffix}"):
            os.truncate(path, min(length, path.stat().st_size))
        with opened(directory) as store:
            found = present(store, range(10))
            assert suffix == "data" or found == set(range(10))
            fill(store, range(10))
            assert present(store, range(10)) == set(range(10))


def test_files_that_vanish_or_shrink_under_an_open_store(closed: Path) -> None:
    with opened(closed) as store:
        for path in closed.iterdir():
            path.unlink()
        assert present(store, range(10)) == set(range(10)), "an open file stays readable"
        fill(store, range(10, 30))
    with opened(closed) as store:
        assert present(store, range(10)) == set()
        found = present(store, range(10, 30))
        for path in closed.glob("*.data"):
            os.truncate(path, 70)
        assert found and present(store, range(10, 30)) == set()


def test_a_directory_that_is_removed_refuses_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "store"
    with opened(directory) as store:
        fill(store, range(4))
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()
        assert not store.put(key_of(9), [bytes(SIZE)])
        assert present(store, range(4)) == set(range(4))
    assert warnings(caplog)


def test_read_errors_are_misses_and_one_line(closed: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = FaultyFiles()
    with opened(closed, files=files) as store:
        files.read_error = errno.EIO
        assert present(store, range(5)) == set()
        assert len(warnings(caplog)) == 1 and "Input/output error" in warnings(caplog)[0]
        files.read_error = None
        assert present(store, range(10)) == set(range(5, 10))
        fill(store, range(10))
        assert present(store, range(10)) == set(range(10))


def test_a_disk_that_cannot_be_read_at_the_start_is_empty(closed: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = FaultyFiles()
    files.read_error = errno.EIO
    with opened(closed, files=files) as store:
        assert present(store, range(10)) == set()
        assert len(warnings(caplog)) == 1
    with opened(closed) as store:
        assert present(store, range(10)) == set(range(10)), "and nothing was thrown away"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_directory_that_cannot_be_written_serves_hits(
    closed: Path, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    before = {path.name: path.read_bytes() for path in closed.iterdir()}
    files = FaultyFiles()
    files.write_error = number
    with opened(closed, files=files) as store:
        expected = set() if number == errno.EIO else set(range(10))
        assert present(store, range(10)) == expected
        assert not store.put(key_of(10), [bytes(SIZE)])
        assert not store.put(key_of(11), [bytes(SIZE)])
        assert store.stats().refused == 2
        store.discard(key_of(1))
        assert key_of(1) not in store
    assert {path.name: path.read_bytes() for path in closed.iterdir()} == before
    assert 1 <= len(warnings(caplog)) <= 2


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_read_only_directory_serves_hits(closed: Path) -> None:
    for path in closed.iterdir():
        path.chmod(0o400)
    closed.chmod(0o500)
    with opened(closed) as store:
        assert present(store, range(10)) == set(range(10))
        assert not store.put(key_of(10), [bytes(SIZE)])


def test_a_real_limit_of_the_file_system_refuses(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel write a part and then fail, as a full disk does."""
    code = (
        "import resource, sys; from pathlib import Path; from triptych.cache.store import SegmentStore\n"
        "from store_faults import key_of, object_of, fetch\n"
        "store = SegmentStore(Path(sys.argv[1]), b'weights', 1 << 30, 1 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))\n"
        "print([store.put(key_of(n), [object_of(n, 2000)]) for n in range(6)])\n"
        "print([fetch(store, key_of(n), 2000) == object_of(n, 2000) for n in range(6)])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "print(store.put(key_of(5), [object_of(5, 2000)]))\n"
        "store.close()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    put = [True] * 4 + [False] * 2
    assert done.stdout.split("\n")[:3] == [str(put), str(put), "True"]
    assert "File too large" in done.stderr
    with opened(tmp_path) as store:
        assert present(store, range(6)) == {0, 1, 2, 3, 5}
