"""What holds for every store: exact bytes or a miss, counted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_faults import FaultyStore, fetch, key_of, object_of

from triptych.cache.store import MemoryStore, SegmentStore, Store
from triptych.cache.store.faultlog import FaultLog


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    made: Store = MemoryStore() if request.param == "memory" else SegmentStore(tmp_path, b"weights", 1 << 24)
    yield made
    made.close()


@pytest.mark.parametrize("size", [0, 1, 47, 48, 49, 4095, 4096, 100_001])
def test_what_was_put_comes_back(store: Store, size: int) -> None:
    data = object_of(1, size)
    assert store.put(key_of(1), [data])
    assert key_of(1) in store
    assert fetch(store, key_of(1), size) == data


def test_payloads_are_gathered_and_scattered(store: Store) -> None:
    data = object_of(1, 1000)
    assert store.put(key_of(1), [data[:1], b"", bytearray(data[1:700]), memoryview(data)[700:]])
    parts = [bytearray(333), bytearray(0), bytearray(667)]
    assert store.get(key_of(1), parts)
    assert b"".join(parts) == data


def test_more_buffers_than_one_system_call_takes(store: Store) -> None:
    data = object_of(1, 5000)
    assert store.put(key_of(1), [data[i : i + 2] for i in range(0, 5000, 2)])
    parts = [bytearray(2) for _ in range(2500)]
    assert store.get(key_of(1), parts)
    assert b"".join(parts) == data


def test_an_absent_object_is_a_miss(store: Store) -> None:
    assert key_of(1) not in store
    assert fetch(store, key_of(1), 10) is None
    store.discard(key_of(1))
    store.touch(key_of(1))
    assert store.stats().damaged == 0


def test_kinds_do_not_share_names(store: Store) -> None:
    assert store.put(key_of(1, "page"), [b"page"])
    assert store.put(key_of(1, "snapshot"), [b"snap"])
    assert fetch(store, key_of(1, "page"), 4) == b"page"
    assert fetch(store, key_of(1, "snapshot"), 4) == b"snap"


def test_a_discarded_object_is_gone_and_can_be_put_again(store: Store) -> None:
    store.put(key_of(1), [b"abcd"])
    store.discard(key_of(1))
    assert key_of(1) not in store and fetch(store, key_of(1), 4) is None
    assert store.put(key_of(1), [b"abcd"])
    assert fetch(store, key_of(1), 4) == b"abcd"


def test_another_length_is_damage_and_forgotten(store: Store) -> None:
    store.put(key_of(1), [b"abcd"])
    assert fetch(store, key_of(1), 5) is None
    assert key_of(1) not in store
    assert store.stats().damaged == 1


def test_a_second_put_writes_nothing_and_another_length_replaces(store: Store) -> None:
    store.put(key_of(1), [b"abcd"])
    written = store.stats().bytes_written
    assert store.put(key_of(1), [b"ab", b"cd"])
    assert store.stats().bytes_written == written
    assert store.put(key_of(1), [b"longer"])
    assert fetch(store, key_of(1), 6) == b"longer"
    assert store.stats().objects == 1


def test_everything_is_a_miss_after_close(store: Store) -> None:
    store.put(key_of(1), [b"abcd"])
    store.close()
    store.close()
    assert key_of(1) not in store and fetch(store, key_of(1), 4) is None
    assert not store.put(key_of(2), [b"abcd"])
    store.discard(key_of(1))
    store.touch(key_of(1))
    assert store.stats().objects == 0


def test_threads_put_get_and_discard_at_once(store: Store) -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in range(120):
            number = (i * 7 + seed * 3) % 40
            size = 500 + number * 97
            if i % 11 == seed:
                store.discard(key_of(number))
            store.put(key_of(number), [object_of(number, size)])
            found = fetch(store, key_of(number), size)
            if found is not None and found != object_of(number, size):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert store.stats().damaged == 0
    assert store.stats().objects == 40


def test_the_memory_store_refuses_beyond_its_quota() -> None:
    store = MemoryStore(quota=10)
    assert store.put(key_of(1), [bytes(8)])
    assert not store.put(key_of(2), [bytes(8)])
    assert store.stats()[:2] == (8, 1) and store.stats().refused == 1


def test_the_faulty_store_does_what_it_is_told() -> None:
    plan = iter(["ok", "fail", "fail", "delay", "corrupt", "ok"])
    store = FaultyStore(MemoryStore(), lambda operation, key: next(plan))
    assert store.put(key_of(1), [b"abcd"])
    assert not store.put(key_of(2), [b"abcd"])
    assert fetch(store, key_of(1), 4) is None
    assert fetch(store, key_of(1), 4) == b"abcd"
    into = bytearray(4)
    assert not store.get(key_of(1), [into]) and into != b"abcd" and into != bytes(4)
    assert fetch(store, key_of(1), 4) is None
    assert store.faults == {"fail": 2, "delay": 1, "corrupt": 1}


def test_the_log_has_one_line_per_kind_and_counts_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    log = FaultLog(logging.getLogger("triptych.test"), lambda: now[0], repeat_s=60.0)
    for _ in range(5):
        log.report("read", "cannot read")
        log.report("write", "cannot write")
    assert [r.getMessage() for r in caplog.records] == ["cannot read", "cannot write"]
    now[0] = 61.0
    log.report("read", "cannot read")
    assert caplog.records[-1].getMessage() == "cannot read (4 more of this kind since the last line)"
