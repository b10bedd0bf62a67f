"""A session of a million tokens leaves the device and comes back: through host memory and through the disk.

    python -m benchmarks tier_trip [--directory DIR] [--pages 8192] [--rounds 3] [--short]

The real CacheManager and Mover with Flash's geometry in fp8 (492,832 bytes a page, 4 GB a session) over frames of
random bytes; there is no model. Down to the host is everything that evicting the whole session costs, 256 objects at
a time, with planning and checksums; to the disk what the end of its request sets off, until the last copy was
reported. Up is what a request with the same prompt waits for, from hashing its tokens until its pages are pinned, also
with planning and checksums. After each way up every byte is compared by checksum with what was there before, and the
device was overwritten in between.

Against it, in the same rounds and in turns: numpy copies of the same frames by one thread, by two and by as many as the
mover has, and bare pwrite and pread of them to one file by one and by two; fio where it is installed. Ratios are taken
within a round. The first round of each kind is measured and kept apart (`first`): memory is touched and disk blocks are
allocated for the first time there. Cold means after /proc/sys/vm/drop_caches (needs root) or, without that right, after
POSIX_FADV_DONTNEED.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import xxhash

from benchmarks import rows
from triptych.cache.geometry import CacheCapacity, CacheGeometry
from triptych.cache.manager import CacheManager
from triptych.cache.policies import Below, Policies
from triptych.cache.prefix import page_keys
from triptych.cache.store import ObjectKey, SegmentStore, Store
from triptych.cache.tiers import key_of
from triptych.config import PAGE, SHAPES
from triptych.engine.mover import Mover

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Values = dict[str, float]

SHAPE = SHAPES["flash"]
GEOMETRY = CacheGeometry.of(SHAPE, "fp8")
SIZE = GEOMETRY.page_bytes
CHUNK = 32 * PAGE
QUOTA = 64 << 30
SNAPSHOTS = 8  # room for so many
COPIERS = sorted({1, 2, min(4, os.cpu_count() or 1)})  # threads of the floor; the mover has as many as the last
PIECE = 256  # objects that are given up at once


class Trip:
    """One device's frames, a manager and a mover over them, and a session that fills the frames."""

    def __init__(self, frames: Bytes, tokens: int, host: bool, stores: Sequence[Store] = ()) -> None:
        self.frames = frames
        host_frames = len(frames) if host else 0
        capacity = CacheCapacity(len(frames), slots=2)
        self.cache = CacheManager(
            GEOMETRY, capacity, SHAPE.num_layers, policies=Policies(), below=Below(host_frames, tuple(stores))
        )
        pools: Any = SimpleNamespace(frames=torch.from_numpy(frames))
        self.mover = Mover(pools, GEOMETRY, host_frames, tuple(stores))
        self.tokens = np.random.default_rng(1).integers(0, SHAPE.vocab_size, tokens).astype(np.int32)
        self.question = np.concatenate([self.tokens, np.arange(5, dtype=np.int32)])
        self.sums: dict[Any, bytes] = {}

    def fill(self) -> None:
        """Run the session without a model: what the frames hold is what its pages are."""
        cache, tokens = self.cache, self.tokens
        plan = cache.admit("first", tokens, "", len(tokens) + 1)
        assert plan is not None and plan.kind == "cold"
        for start in range(0, len(tokens), CHUNK):
            end = min(start + CHUNK, len(tokens))
            assert cache.grow("first", end)
            cache.snapshot_writes("first", start, end)
            cache.advance("first", tokens, end)
        write = cache.boundary_snapshot("first")
        if write is not None:
            cache.publish_snapshot("first", write)
        cache.due()  # the step that would write that snapshot's rows
        self.sums = {key_of(item): self.checksum(item) for item in self.items()}

    def items(self) -> Iterator[Any]:
        """Every page and snapshot on the device."""
        yield from self.cache.memory.tree.nodes.values()
        yield from self.cache.memory.snapshots.values()

    def checksum(self, item: Any) -> bytes:
        """Of an object where it lies on the device."""
        key, state = key_of(item), xxhash.xxh3_128()
        places = (item.page,) if key.kind == "page" else item.frames
        for part in self.mover._parts(self.frames, key, places):
            state.update(part.data)
        return state.digest()

    def settle(self) -> None:
        """Carry out copies until none is due or under way, as EngineLoop.settle does."""
        while self.cache.tiers.busy:
            self.mover.run(self.cache.due())
            for done in self.mover.poll(0.05):
                self.cache.end(done)

    def give_up(self, most: int = 1 << 30) -> float:
        """Seconds of giving up so many objects on the device, or all; what the host takes is copied there."""
        memory = self.cache.memory
        with timed() as seconds:
            while memory.evictable and most:
                memory.evict(next(iter(memory.candidates())))
                most -= 1
            self.mover.run(self.cache.due())
        return seconds()

    def to_stores(self) -> float:
        """Seconds from the end of the session's request until all of it is stored."""
        with timed() as seconds:
            self.cache.release("first")
            self.settle()
        return seconds()

    def up(self, tier: str) -> float:
        """Seconds that a request with the same prompt waits; it must find all of it."""
        cache, question = self.cache, self.question
        with timed() as seconds:
            while not cache.ready("again", question, ""):
                self.mover.run(cache.due())
                for done in self.mover.poll(0.05):
                    cache.end(done)
            plan = cache.admit("again", question, "", len(question) + 1)
        assert plan is not None and plan.kind == "snapshot", plan
        assert plan.by_tier == {tier: len(self.tokens) - 4} and plan.cached_tokens == len(self.tokens) - 4, plan
        wrong = [key_of(item) for item in self.items() if self.checksum(item) != self.sums[key_of(item)]]
        assert not wrong, f"{len(wrong)} objects came back with other bytes"
        cache.release("again")
        cache.check_integrity()
        return seconds()

    def scribble(self) -> None:
        """Nothing of what was on the device is left there."""
        assert not self.cache.stats().pages_cached
        self.frames[:] = 0xA5

    def close(self) -> None:
        """Let go of threads and files."""
        self.mover.close()


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """The seconds between the block's begin and end, to be asked for afterwards."""
    start = time.perf_counter()
    end: list[float] = []
    yield lambda: end[0]
    end.append(time.perf_counter() - start)


def main(argv: list[str]) -> int:
    """Measure both trips, print them and append one row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks tier_trip", description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--pages", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="a session of 256 pages, one round, no row")
    args = parser.parse_args(argv)
    pages, rounds = (256, 1) if args.short else (args.pages, args.rounds)
    frames = np.empty((pages + SNAPSHOTS * GEOMETRY.snapshot_frames, SIZE), np.uint8)
    values: dict[str, Any] = {"pages": pages, "session_bytes": pages * SIZE, "load": rows.load_average()}
    values["host"] = host_trip(frames, pages, rounds)
    values["disk"] = disk_trip(frames, pages, rounds, args.directory)
    del frames
    values["fio"] = fio(args.directory, pages)
    values["load_after"] = rows.load_average()
    print(json.dumps(values, indent=1))
    if not args.short:
        print(rows.append("tier_trip", values, kv_bytes={"page": SIZE, "session": pages * SIZE}, threads=2))
    return 0


def randomize(frames: Bytes) -> None:
    """Other bytes in every frame; as good as random for a checksum and a file system, and much quicker to make."""
    rng = np.random.default_rng(0)
    block = np.frombuffer(rng.bytes(SIZE), np.uint8)
    for number, frame in enumerate(frames):
        np.copyto(frame, block)
        frame[:: SIZE // 64] += np.uint8(number & 255)
        frame[:8] = np.frombuffer(number.to_bytes(8, "little"), np.uint8)


def rates(seconds: Sequence[Values], size: int) -> dict[str, Any]:
    """GB/s of every round by name, the first one apart, and medians."""
    out: dict[str, Any] = {}
    for name in seconds[0]:
        every = [round(size / one[name] / 1e9, 2) for one in seconds]
        out[name] = {"first": every[0], "rounds": every[1:], "median": round(statistics.median(every[1:]), 2)}
    return out


def of_floor(seconds: Sequence[Values], ours: str, floor: str) -> dict[str, Any]:
    """Our rate over the floor's of the same round, and the median of these; the first round is left out."""
    ratios = [round(one[floor] / one[ours], 2) for one in seconds[1:]]
    return {"rounds": ratios, "median": round(statistics.median(ratios), 2)}


def in_turns(number: int, work: dict[str, Callable[[], float]]) -> Values:
    """Seconds of each, in an order that rotates from round to round."""
    names = list(work)
    order = names[number % len(names) :] + names[: number % len(names)]
    return {name: work[name]() for name in sorted(names, key=order.index)}


# ---- host


def host_trip(frames: Bytes, pages: int, rounds: int) -> dict[str, Any]:
    """Down to the host and up again, between copies of the same frames to memory of the same kind."""
    randomize(frames)
    trip = Trip(frames, pages * PAGE, host=True)
    trip.fill()
    trip.cache.release("first")
    other = np.empty_like(frames)
    seconds: list[Values] = []
    for number in range(rounds + 1):
        one = there(trip, other, pages)
        trip.scribble()
        one["up"] = trip.up("host")
        one["round_trip"] = (one["down"] + one["up"]) / 2
        seconds.append(one)
        print("host", number, {name: round(pages * SIZE / s / 1e9, 2) for name, s in one.items()}, flush=True)
    trip.close()
    out = rates(seconds, pages * SIZE)
    for way in ("down", "up", "round_trip"):
        for threads in COPIERS:
            out[f"{way}_of_memcpy_{threads}"] = of_floor(seconds, way, f"memcpy_{threads}")
    out["demotion_us"] = round(statistics.median(one["down"] for one in seconds[1:]) / pages * 1e6, 1)
    return out


def there(trip: Trip, other: Bytes, pages: int) -> Values:
    """Down in pieces, as steps would do it, and after each piece copies of as many frames: all meet the same noise."""
    total: Values = {"down": 0.0} | {f"memcpy_{threads}": 0.0 for threads in COPIERS}
    for at in range(0, pages, PIECE):
        total["down"] += trip.give_up(PIECE)
        for threads in COPIERS if at // PIECE % 2 else reversed(COPIERS):
            part = slice(at, min(at + PIECE, pages))
            total[f"memcpy_{threads}"] += copied(trip.frames[part], other[part], threads)
    total["down"] += trip.give_up()  # snapshots are objects, too
    return total


def copied(source: Bytes, target: Bytes, threads: int) -> float:
    """Seconds of copying frame by frame."""

    def work(numbers: range) -> None:
        for number in numbers:
            np.copyto(target[number], source[number])

    return split(work, len(source), threads)


def split(work: Callable[[range], None], count: int, threads: int) -> float:
    """Seconds of `work` over all numbers below `count`, in runs of 64 spread over threads."""
    runs = [range(at, min(at + 64, count)) for at in range(0, count, 64)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(len, runs))  # the threads are there
        with timed() as seconds:
            list(pool.map(work, runs))
    return seconds()


# ---- disk


def disk_trip(frames: Bytes, pages: int, rounds: int, parent: Path) -> dict[str, Any]:
    """Down to a fresh store and up again, warm and cold, and restarts; between the same with one bare file."""
    seconds: list[Values] = []
    restarts: list[dict[str, float]] = []
    cold = ""
    for number in range(rounds + 1):
        directory = Path(tempfile.mkdtemp(prefix="tier-trip-", dir=parent))
        try:
            work: dict[str, Callable[[], Any]] = {
                "store": lambda directory=directory: store_round(frames, pages, directory / "store"),
            }
            for threads in (1, 2):
                path = directory / f"flat{threads}"
                work[f"file_{threads}"] = lambda path=path, threads=threads: file_round(frames[:pages], path, threads)
            parts = in_turns(number, work)
            restarts.append(parts["store"].pop("restarts"))
            cold = parts["store"].pop("cold")
            seconds.append({**parts["store"], **parts["file_1"], **parts["file_2"]})
        finally:
            shutil.rmtree(directory)
            os.sync()
        print("disk", number, {name: round(pages * SIZE / s / 1e9, 2) for name, s in seconds[-1].items()}, flush=True)
        print("restart", number, restarts[-1], flush=True)
    out = rates(seconds, pages * SIZE)
    for ours, floor in (("save", "pwrite"), ("fetch_warm", "pread_warm"), ("fetch_cold", "pread_cold")):
        for threads in (1, 2):
            out[f"{ours}_of_{floor}_{threads}"] = of_floor(seconds, ours, f"{floor}_{threads}")
    return out | {"restart_s": restarts, "cold_by": cold}


def store_round(frames: Bytes, pages: int, directory: Path) -> dict[str, Any]:
    """Save a session, fetch it warm, then in new processes' shoes: open, find, fetch cold."""
    randomize(frames)
    trip = Trip(frames, pages * PAGE, host=False, stores=[SegmentStore(directory, b"bench", QUOTA)])
    trip.fill()
    out: dict[str, Any] = {"save": trip.to_stores()}
    with timed() as seconds:
        os.sync()
    out["save_synced"] = out["save"] + seconds()
    sums = trip.sums

    def fetch() -> float:
        trip.give_up()  # nothing is kept: there is no host tier
        trip.scribble()
        return trip.up("disk")

    out["fetch_warm"] = fetch()
    trip.close()
    out["cold"] = drop_caches(directory)
    trip, with_index = restarted(frames, pages, directory)
    trip.sums = sums
    drop_caches(directory)
    out["fetch_cold"] = trip.up("disk")
    trip.close()
    for path in directory.glob("*.index"):
        path.unlink()
    drop_caches(directory)
    trip, without = restarted(frames, pages, directory)
    trip.close()
    out["restarts"] = {"cold_with_index": with_index, "cold_without_index": without}
    shutil.rmtree(directory)
    return out


def restarted(frames: Bytes, pages: int, directory: Path) -> tuple[Trip, float]:
    """A new manager over what is on the disk, and the seconds until it knows that it has every page of the session."""
    with timed() as opening:
        store = SegmentStore(directory, b"bench", QUOTA)
    trip = Trip(frames, pages * PAGE, host=False, stores=[store])
    with timed() as finding:
        found = sum(trip.cache.tiers.where(key) == "disk" for key in page_keys_of(trip))
    assert found == pages, found
    trip.frames[:] = 0
    return trip, round(opening() + finding(), 4)


def page_keys_of(trip: Trip) -> Iterator[ObjectKey]:
    """The names of the session's pages, hashed anew from its tokens."""
    return (ObjectKey("page", name) for name in page_keys(trip.cache.root(""), trip.tokens))


def file_round(frames: Bytes, path: Path, threads: int) -> Values:
    """One file, every page at its place."""
    randomize(frames)
    out: Values = {}
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    out[f"pwrite_{threads}"] = split(writer(fd, frames), len(frames), threads)
    with timed() as seconds:
        os.sync()
    out[f"pwrite_synced_{threads}"] = out[f"pwrite_{threads}"] + seconds()
    out[f"pread_warm_{threads}"] = split(reader(fd, frames), len(frames), threads)
    drop_caches(path.parent)
    out[f"pread_cold_{threads}"] = split(reader(fd, frames), len(frames), threads)
    os.close(fd)
    path.unlink()
    return out


def writer(fd: int, frames: Bytes) -> Callable[[range], None]:
    """Writes frames to their places."""

    def work(numbers: range) -> None:
        for number in numbers:
            assert os.pwrite(fd, frames[number].data, number * SIZE) == SIZE

    return work


def reader(fd: int, frames: Bytes) -> Callable[[range], None]:
    """Reads frames from their places."""

    def work(numbers: range) -> None:
        for number in numbers:
            assert os.preadv(fd, [frames[number].data], number * SIZE) == SIZE

    return work


def drop_caches(directory: Path) -> str:
    """Make the next reads come from the disk; says how that was done."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1\n", encoding="ascii")
        return "drop_caches"
    except OSError:
        for path in directory.rglob("*"):
            if path.is_file():
                fd = os.open(path, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)
        return "fadvise"


def fio(parent: Path, pages: int) -> dict[str, float]:
    """GB/s that fio reaches with blocks of a page: written, read cold, read warm, by one job and by two."""
    if shutil.which("fio") is None:
        return {}
    out = {}
    with tempfile.TemporaryDirectory(prefix="tier-trip-fio-", dir=parent) as name:
        for jobs in (1, 2):
            for what, kind in (("write", "write"), ("read_cold", "read"), ("read_warm", "read")):
                if what == "read_cold":
                    drop_caches(Path(name))
                out[f"{what}_{jobs}"] = fio_rate(Path(name), kind, pages // jobs, jobs)
    return out


def fio_rate(directory: Path, kind: str, pages: int, jobs: int) -> float:
    """GB/s of one run over `jobs` files of `pages` pages."""
    command = ["fio", "--name=pages", f"--rw={kind}", f"--bs={SIZE}", f"--size={pages * SIZE}", f"--numjobs={jobs}"]
    command += ["--ioengine=psync", "--invalidate=0", "--group_reporting", "--output-format=json"]
    command += [f"--directory={directory}", "--fallocate=none"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)["jobs"][0]["write" if kind == "write" else "read"]
    return round(result["bw_bytes"] / 1e9, 2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
