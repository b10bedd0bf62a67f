"""The disk tier's own segment files against LMDB, SQLite and the machine's floor.

    python -m benchmarks disk_stores [--directory DIR] [--objects 8192] [--contenders segments,lmdb,sqlite,floor]

The objects are a session of a million tokens: 8,192 pages of 492,832 bytes, 4 GB. Each contender writes them one by
one, without waiting for the disk, and reads each into the same buffer, warm and after its pages were dropped from the
page cache. The first gigabytes written to a disk may be several times slower than the same bytes later, so one pass of
the floor is thrown away and the contenders take turns in rotating order; a row keeps the value of every round. Cold
reads by one thread always come before those by two, and the first cold pass is slower too: do not compare these two.
Every phase is a process of its own, so that `/proc/self/io` counts one thing. Segments are checked by checksum at
every read, LMDB and SQLite check nothing. LMDB is measured where it is installed (`pip install lmdb`).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from benchmarks import rows

SIZE = 492_832
CONTENDERS = ("floor", "segments", "lmdb", "sqlite")
# distinct buffers that are written in turn: more than the processor's cache holds
BUFFERS = 64
KILLS = 5


class Contender(Protocol):
    """Numbered objects of SIZE bytes."""

    def put(self, number: int, data: memoryview) -> None: ...
    def get(self, number: int, into: memoryview) -> bool: ...
    def count(self) -> int: ...
    def close(self) -> None: ...


class Floor:
    """One file, every object at its place: what the kernel allows."""

    def __init__(self, directory: Path, objects: int) -> None:
        self._fd = os.open(directory / "flat", os.O_RDWR | os.O_CREAT)

    def put(self, number: int, data: memoryview) -> None:
        assert os.pwrite(self._fd, data, number * SIZE) == SIZE

    def get(self, number: int, into: memoryview) -> bool:
        return os.preadv(self._fd, [into], number * SIZE) == SIZE

    def count(self) -> int:
        return os.fstat(self._fd).st_size // SIZE

    def close(self) -> None:
        os.close(self._fd)


class Segments:
    """Ours."""

    def __init__(self, directory: Path, objects: int) -> None:
        from triptych.cache.store import SegmentStore

        self._store = SegmentStore(directory, b"benchmark", 4 * objects * SIZE, 256 << 20)

    def put(self, number: int, data: memoryview) -> None:
        assert self._store.put(_key(number), [data])

    def get(self, number: int, into: memoryview) -> bool:
        return self._store.get(_key(number), [into])

    def count(self) -> int:
        return self._store.stats().objects

    def close(self) -> None:
        self._store.close()


class Lmdb:
    """One transaction an object, no sync, read through the map and copied once."""

    def __init__(self, directory: Path, objects: int) -> None:
        import lmdb

        self._env = lmdb.open(str(directory), map_size=4 * objects * SIZE, sync=False, metasync=False, readahead=True)

    def put(self, number: int, data: memoryview) -> None:
        with self._env.begin(write=True) as transaction:
            transaction.put(_name(number), data)

    def get(self, number: int, into: memoryview) -> bool:
        with self._env.begin(buffers=True) as transaction:
            data = transaction.get(_name(number))
            if data is None:
                return False
            into[:] = data
            return True

    def count(self) -> int:
        return int(self._env.stat()["entries"])

    def close(self) -> None:
        self._env.close()


class Sqlite:
    """A table of blobs, write-ahead log, one transaction an object, no sync."""

    def __init__(self, directory: Path, objects: int) -> None:
        self._db = sqlite3.connect(directory / "objects.db", isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA page_size=65536")
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=OFF")
        self._db.execute("CREATE TABLE IF NOT EXISTS objects (id INTEGER PRIMARY KEY, name BLOB UNIQUE, data BLOB)")

    def put(self, number: int, data: memoryview) -> None:
        self._db.execute("INSERT OR REPLACE INTO objects (name, data) VALUES (?, ?)", (_name(number), data))

    def get(self, number: int, into: memoryview) -> bool:
        row = self._db.execute("SELECT data FROM objects WHERE name = ?", (_name(number),)).fetchone()
        if row is None:
            return False
        into[:] = row[0]
        return True

    def count(self) -> int:
        return int(self._db.execute("SELECT count(name) FROM objects").fetchone()[0])

    def close(self) -> None:
        self._db.close()


MAKERS: dict[str, Any] = {"floor": Floor, "segments": Segments, "lmdb": Lmdb, "sqlite": Sqlite}


def main(argv: list[str]) -> int:
    """Run all phases of all contenders, print them and append one row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks disk_stores", description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--objects", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    args = parser.parse_args(argv)
    values: dict[str, Any] = {"object_bytes": SIZE, "objects": args.objects, "load": rows.load_average()}
    names = args.contenders.split(",")
    if "lmdb" in names and find_spec("lmdb") is None:
        print("lmdb is not installed and left out")
        names.remove("lmdb")
    values["memcpy_gb_s"] = memcpy_rate()
    with scratch(args.directory, "first") as directory:
        values["first_pass_discarded"] = phase("write", "floor", directory, args.objects)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(args.rounds):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        for name in order:
            with scratch(args.directory, name) as directory:
                results[name].append(measure(name, directory, args.objects))
            print(turn, name, json.dumps(results[name][-1]), flush=True)
    values["rounds"] = {
        name: {key: [r[key] for r in of_one] for key in of_one[0]} for name, of_one in results.items() if of_one
    }
    values["kill"] = {}
    for name in names:
        if name != "floor":
            with scratch(args.directory, name) as directory:
                values["kill"][name] = kill(name, directory, args.objects)
    values["load_after"] = rows.load_average()
    print(rows.append("disk_stores", values, kv_bytes={"page": SIZE}, threads=1))
    return 0


@contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """A directory that is removed afterwards, with the disk at rest before and after."""
    directory = Path(tempfile.mkdtemp(prefix=f"disk-stores-{name}-", dir=parent))
    os.sync()
    try:
        yield directory
    finally:
        shutil.rmtree(directory)
        os.sync()


def phase(which: str, name: str, directory: Path, objects: int, threads: int = 1) -> dict[str, Any]:
    """The result of one phase in a process of its own."""
    done = subprocess.run(command(which, name, directory, objects, threads), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{which} of {name} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(name: str, directory: Path, objects: int) -> dict[str, Any]:
    """All phases of one contender but the kills."""
    written = phase("write", name, directory, objects)
    out = {f"write_{key}": value for key, value in written.items() if key not in ("seconds", "objects")}
    out["restart_warm_s"] = phase("restart", name, directory, objects)["seconds"]
    for threads in (1, 2):
        out[f"read_warm_{threads}_gb_s"] = phase("read", name, directory, objects, threads)["gb_s"]
    for threads in (1, 2):
        drop_from_cache(directory)
        out[f"read_cold_{threads}_gb_s"] = phase("read", name, directory, objects, threads)["gb_s"]
    drop_from_cache(directory)
    out["restart_cold_s"] = phase("restart", name, directory, objects)["seconds"]
    if name == "segments":
        for path in directory.glob("*.index"):
            path.unlink()
        drop_from_cache(directory)
        out["restart_cold_without_index_s"] = phase("restart", name, directory, objects)["seconds"]
    return out


def kill(name: str, directory: Path, objects: int) -> dict[str, Any]:
    """Kill writers at random moments: promised objects that are lost or wrong, and the time of the next start."""
    rng = random.Random(0)
    lost = wrong = promised = 0
    seconds = []
    for _ in range(KILLS):
        for path in files(directory):
            path.unlink()
        with subprocess.Popen(
            command("promise", name, directory, objects), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.uniform(0.2, 1.5))
            process.kill()
            count = process.stdout.read().count(b"+\n")
        done = subprocess.run(command("verify", name, directory, count), capture_output=True, text=True, check=True)
        result = json.loads(done.stdout.splitlines()[-1])
        promised, lost, wrong = promised + count, lost + result["lost"], wrong + result["wrong"]
        seconds.append(result["seconds"])
    return {"promised": promised, "lost": lost, "wrong": wrong, "restart_s": max(seconds)}


def command(which: str, name: str, directory: Path, objects: int, threads: int = 1) -> list[str]:
    """The command line of one phase in a process of its own."""
    code = f"import sys; sys.path[:0] = {sys.path!r}; from benchmarks.disk_stores import child; child(*sys.argv[1:])"
    return [sys.executable, "-c", code, which, name, str(directory), str(objects), str(threads)]


def child(which: str, name: str, directory: str, objects: str, threads: str) -> None:
    """One phase; its result is the last line printed."""
    for number in range(int(objects)):  # names and imports are not what is measured
        _key(number)
    start = time.perf_counter()
    contender: Contender = MAKERS[name](Path(directory), int(objects))
    count = contender.count()
    opened = time.perf_counter() - start
    phases = {"write": write, "read": read, "promise": promise, "verify": verify}
    result = {"seconds": round(opened, 4), "objects": count}
    if which in phases:
        result |= phases[which](contender, int(objects), int(threads))
    if which not in ("write", "verify"):
        contender.close()
    print(json.dumps(result))


def write(contender: Contender, objects: int, threads: int) -> dict[str, Any]:
    """Rate until the last put and a close returned, and until all was on the disk; bytes written per payload byte."""
    data = list(buffers())
    before = process_io()
    start = time.perf_counter()
    for number in range(objects):
        contender.put(number, data[number % BUFFERS])
    contender.close()
    seconds = time.perf_counter() - start
    os.sync()
    synced = time.perf_counter() - start
    after = process_io()
    payload = objects * SIZE
    return {
        "gb_s": round(payload / seconds / 1e9, 3),
        "gb_s_synced": round(payload / synced / 1e9, 3),
        "amplification_calls": round((after["wchar"] - before["wchar"]) / payload, 4),
        "amplification_disk": round((after["write_bytes"] - before["write_bytes"]) / payload, 4),
    }


def read(contender: Contender, objects: int, threads: int) -> dict[str, Any]:
    """Rate of reading every object in the order of the session, each thread into one buffer of its own."""

    def work(part: range) -> None:
        into = memoryview(bytearray(SIZE))
        for number in part:
            assert contender.get(number, into)

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [range(i, objects, threads) for i in range(threads)]))
    return {"gb_s": round(objects * SIZE / (time.perf_counter() - start) / 1e9, 3)}


def promise(contender: Contender, objects: int, threads: int) -> dict[str, Any]:
    """Put for ever and print a line after each."""
    data = list(buffers())
    print("open", flush=True)
    for number in range(objects):
        contender.put(number, data[number % BUFFERS])
        print("+", flush=True)
    return {}


def verify(contender: Contender, objects: int, threads: int) -> dict[str, Any]:
    """How many of the first `objects` are absent, how many are not what was put."""
    data = list(buffers())
    into = memoryview(bytearray(SIZE))
    lost = wrong = 0
    for number in range(objects):
        if not contender.get(number, into):
            lost += 1
        elif into != data[number % BUFFERS]:
            wrong += 1
    return {"lost": lost, "wrong": wrong}


def buffers() -> Iterator[memoryview]:
    """The same BUFFERS payloads every time."""
    rng = random.Random(0)
    return (memoryview(rng.randbytes(SIZE)) for _ in range(BUFFERS))


def memcpy_rate() -> float:
    """GB/s of copying objects from memory that no cache holds into one buffer, as a read does."""
    source = memoryview(bytearray(1 << 30))
    into = memoryview(bytearray(SIZE))
    start = time.perf_counter()
    for offset in range(0, len(source) - SIZE, SIZE):
        into[:] = source[offset : offset + SIZE]
    return round(len(source) / (time.perf_counter() - start) / 1e9, 2)


def drop_from_cache(directory: Path) -> None:
    """Write everything back and drop its pages from the page cache."""
    for path in files(directory):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def files(directory: Path) -> list[Path]:
    """Regular files below the directory."""
    return [path for path in directory.rglob("*") if path.is_file()]


def process_io() -> dict[str, int]:
    """Counters of this process: bytes given to write calls (wchar) and bytes that went to the disk (write_bytes)."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


@functools.cache
def _name(number: int) -> bytes:
    # spread over the key space as hashes are
    return random.Random(number).randbytes(32)


@functools.cache
def _key(number: int) -> Any:
    from triptych.cache.store import ObjectKey

    return ObjectKey("page", _name(number))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
