"""kill -9 at any point: what was promised is there, what was not is whole or absent."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from store_faults import FaultyFiles, Killed, fetch, key_of, object_of
from store_writer import NUMBERS, SIZE
from test_store_segments import LARGE, copy_of, opened, present

from triptych.cache.store import SegmentStore

WRITER = Path(__file__).with_name("store_writer.py")


def write_and_kill(directory: Path, quota: int, seed: int, seconds: float, capacity: int | None) -> list[str]:
    """Lines that the process printed before it was killed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(WRITER), str(directory), str(quota), str(seed), str(capacity or "")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        time.sleep(seconds)
        process.kill()
        return process.stdout.read().decode().split("\n")


def promised(lines: list[str], known: set[int], unsure: set[int]) -> None:
    """Apply the lines of one life: `known` must be there, `unsure` may be."""
    for line in lines:
        if not line[1:].isdigit():
            continue
        number = int(line[1:])
        known.discard(number)
        unsure.discard(number)
        if line[0] == "+":
            known.add(number)
        elif line[0] == "?":
            unsure.add(number)


def check_after_kills(directory: Path, quota: int, rounds: int, capacity: int | None = None) -> None:
    """`quota` or `capacity` of the file system below LARGE: objects are given up."""
    most, evicts = min(quota, capacity or LARGE), min(quota, capacity or LARGE) < LARGE
    rng = random.Random(rounds)
    known: set[int] = set()
    unsure: set[int] = set()
    for seed in range(rounds):
        promised(write_and_kill(directory, quota, seed, rng.uniform(0.0, 0.06), capacity), known, unsure)
        with closing(SegmentStore(directory, b"weights", quota, 400_000)) as store:
            held = {n for n in range(NUMBERS) if key_of(n) in store}
            found = {n for n in range(NUMBERS) if fetch(store, key_of(n), SIZE) == object_of(n, SIZE)}
            assert store.stats().damaged == 0, "a torn record was visible"
            assert found <= held
            if not evicts:
                # the last put may have been finished and not yet reported
                assert known <= found and len(found - known - unsure) <= 1
            assert store.stats().bytes_used <= most
        known, unsure = set(found), set()


def test_a_killed_process_keeps_its_promises(tmp_path: Path) -> None:
    check_after_kills(tmp_path, LARGE, rounds=8)


def test_a_process_killed_while_it_reclaims_leaves_no_wrong_byte(tmp_path: Path) -> None:
    check_after_kills(tmp_path, 3_000_000, rounds=8)


def test_a_process_killed_on_a_full_disk_leaves_no_wrong_byte(tmp_path: Path) -> None:
    check_after_kills(tmp_path, LARGE, rounds=8, capacity=3_000_000)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_hundreds_of_kills(tmp_path: Path) -> None:
    check_after_kills(tmp_path / "a", LARGE, rounds=300)
    check_after_kills(tmp_path / "b", 3_000_000, rounds=300)
    check_after_kills(tmp_path / "c", LARGE, rounds=300, capacity=3_000_000)


@pytest.mark.parametrize("full", ["quota", "disk", "unreported"])
def test_death_in_every_single_system_call(tmp_path: Path, full: str) -> None:
    """A fixed history is cut short at its nth change of the disk, half-way through where that is a write."""
    died = 0
    for number in range(10_000):
        files = FaultyFiles()
        files.capacity, files.reports = None if full == "quota" else 50_000, full == "disk"
        files.die_at = number
        directory = tmp_path / str(number)
        kept: set[int] = set()
        maybe: set[int] = set()
        discarding: list[bool] = [False]
        survived = survives(directory, files, 50_000 if full == "quota" else LARGE, kept, maybe, discarding)
        with opened(copy_of(directory, tmp_path / f"{number}-after"), quota=50_000) as store:
            assert kept <= present(store, range(60)) <= kept | maybe
            # the mark of a discard may be torn itself; then the object is as gone as it should be
            assert store.stats().damaged <= discarding[0]
        if survived:
            break
        died += 1
    assert died > 100


def survives(
    directory: Path, files: FaultyFiles, quota: int, kept: set[int], maybe: set[int], discarding: list[bool]
) -> bool:
    """Put and discard with little room; `kept`: must be there afterwards; `maybe`: may. True: lived to the end."""
    directory.mkdir()
    store = None
    try:
        store = SegmentStore(directory, b"weights", quota, 10_000, files=files)
        for number in range(40):
            # a segment may be reclaimed during the put: what it holds is then in doubt
            maybe |= kept | {number}
            kept.clear()
            store.put(key_of(number), [object_of(number, 2000)])
            if number % 5 == 4:
                kept.discard(number - 2)
                discarding[0] = True
                store.discard(key_of(number - 2))
                discarding[0] = False
                maybe.discard(number - 2)
            for hot in range(0, number, 6):
                store.touch(key_of(hot))
            kept |= {n for n in maybe if key_of(n) in store}
            maybe &= kept
        store.close()
        store = None
    except Killed:
        return False
    finally:
        if store is not None:
            abandon(store)
    return True


def abandon(store: SegmentStore) -> None:
    """Give back what the kernel would give back: descriptors, and with them the lock."""
    for segment in store._segments.values():
        os.close(segment.fd)
    os.close(store._lock_fd)
