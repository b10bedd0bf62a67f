"""The remote store against a real server."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from store_faults import fetch, key_of, object_of
from store_server import Server, find_server

from triptych.cache.store import RemoteStore
from triptych.cache.store.remote import RETRY_S
from triptych.errors import ConfigError

valkey = pytest.importorskip("valkey", reason="the extra `remote` is not installed")
SIZE = 3000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    found = find_server()
    if isinstance(found, str):
        pytest.skip(found)
    server = Server(*found, tmp_path)
    server.start()
    yield server
    server.remove()


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def remote(server: Server, fingerprint: bytes = b"weights", **options: object) -> closing[RemoteStore]:
    return closing(RemoteStore(server.url, fingerprint, **options))  # type: ignore[arg-type]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("size", [0, 1, 79, 80, 81, 100_001, 3_600_000])
def test_what_was_put_comes_back(server: Server, size: int) -> None:
    data = object_of(1, size)
    with remote(server) as store:
        assert store.put(key_of(1), [data[: size // 3], data[size // 3 :]])
        assert key_of(1) in store and fetch(store, key_of(1), size) == data
    with remote(server) as store:
        assert key_of(1) in store, "another engine, or the same one after a restart, knows it"
        parts = [bytearray(size // 2), bytearray(size - size // 2)]
        assert store.get(key_of(1), parts) and b"".join(parts) == data


def test_absent_discarded_and_other_kinds_are_misses(server: Server) -> None:
    with remote(server) as store:
        assert fetch(store, key_of(1), SIZE) is None and key_of(1) not in store
        store.put(key_of(1), [object_of(1, SIZE)])
        assert fetch(store, key_of(1, "snapshot"), SIZE) is None
        store.discard(key_of(1))
        store.discard(key_of(1))
        assert fetch(store, key_of(1), SIZE) is None and key_of(1) not in store
        assert store.stats().damaged == 0


def test_what_another_engine_puts_is_found_by_get_and_after_a_refresh(server: Server) -> None:
    with remote(server) as one, remote(server) as two:
        one.put(key_of(1), [object_of(1, SIZE)])
        one.put(key_of(2), [object_of(2, SIZE)])
        assert key_of(1) not in two
        assert fetch(two, key_of(1), SIZE) == object_of(1, SIZE) and key_of(1) in two
        assert key_of(2) not in two
        two.refresh()
        assert key_of(2) in two


def test_other_fingerprints_share_the_server_unseen(server: Server) -> None:
    with remote(server, b"one") as one, remote(server, b"two") as two:
        one.put(key_of(1), [object_of(1, SIZE)])
        two.refresh()
        assert key_of(1) not in two and fetch(two, key_of(1), SIZE) is None


@pytest.mark.parametrize("offset", [0, 9, 20, 60, 75, 80, 81, 80 + SIZE - 1])
def test_damage_is_a_miss_and_removed(server: Server, offset: int, caplog: pytest.LogCaptureFixture) -> None:
    with remote(server) as store, closing(valkey.Valkey.from_url(server.url)) as client:
        store.put(key_of(1), [object_of(1, SIZE)])
        [name] = client.keys()
        value = bytearray(client.get(name))
        value[offset] ^= 4
        client.set(name, bytes(value))
        assert fetch(store, key_of(1), SIZE) is None
        assert key_of(1) not in store and client.keys() == []
        assert store.stats().damaged == 1 and len(warnings(caplog)) == 1
        assert store.put(key_of(1), [object_of(1, SIZE)]) and fetch(store, key_of(1), SIZE) == object_of(1, SIZE)


def test_values_that_are_cut_strange_or_anothers_are_misses(server: Server) -> None:
    with remote(server) as store, closing(valkey.Valkey.from_url(server.url)) as client:
        store.put(key_of(1), [object_of(1, SIZE)])
        [name] = client.keys()
        value = client.get(name)
        store.put(key_of(2), [object_of(2, SIZE)])
        [other] = set(client.keys()) - {name}
        for wrong in (b"", b"x", value[:79], value[:80], value[:-1], value + b"x", client.get(other)):
            client.set(name, wrong)
            assert fetch(store, key_of(1), SIZE) is None
        client.delete(name)
        client.rpush(name, "a list")
        assert fetch(store, key_of(1), SIZE) is None


def test_objects_live_for_their_time_after_the_last_use(server: Server) -> None:
    clock = Clock()
    with remote(server, ttl_s=100.0, clock=clock) as store, closing(valkey.Valkey.from_url(server.url)) as client:
        store.put(key_of(1), [object_of(1, SIZE)])
        [name] = client.keys()
        for use in (
            lambda: fetch(store, key_of(1), SIZE),
            lambda: store.touch(key_of(1)),
            lambda: store.put(key_of(1), [object_of(1, SIZE)]),
        ):
            client.pexpire(name, 5000)
            use()
            assert 90_000 < client.pttl(name) <= 100_000
        clock.now += 101.0
        assert key_of(1) not in store
        client.delete(name)  # what the server does when the time is over
        assert fetch(store, key_of(1), SIZE) is None and store.stats().damaged == 0
        assert store.put(key_of(1), [object_of(1, SIZE)]) and key_of(1) in store


def test_a_server_that_goes_is_misses_one_line_and_tried_again(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    with remote(server, clock=clock) as store:
        store.put(key_of(1), [object_of(1, SIZE)])
        server.stop()
        for _ in range(3):
            assert fetch(store, key_of(1), SIZE) is None
            assert not store.put(key_of(2), [object_of(2, SIZE)])
            store.discard(key_of(3))
            store.touch(key_of(1))
        assert len(warnings(caplog)) == 1 and "does not answer" in warnings(caplog)[0]
        server.start()
        assert not store.put(key_of(2), [object_of(2, SIZE)]), "left alone for a while"
        clock.now += RETRY_S + 0.1
        assert store.put(key_of(2), [object_of(2, SIZE)])
        assert fetch(store, key_of(2), SIZE) == object_of(2, SIZE)
        assert key_of(1) not in store, "the server came back empty, and the index knows"
        assert len(warnings(caplog)) == 2 and "answers again" in warnings(caplog)[1]


def test_a_server_that_is_not_there_at_the_start_is_no_error(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.stop()
    clock = Clock()
    with remote(server, clock=clock) as store:
        assert not store.put(key_of(1), [object_of(1, SIZE)])
        assert len(warnings(caplog)) == 1
        server.start()
        clock.now += RETRY_S + 0.1
        assert store.put(key_of(1), [object_of(1, SIZE)])


def test_a_full_server_refuses_and_still_serves(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.stop()
    server.start("--maxmemory", "4mb", "--maxmemory-policy", "noeviction")
    with remote(server) as store:
        kept = [n for n in range(10) if store.put(key_of(n), [object_of(n, 1_000_000)])]
        assert 0 < len(kept) < 10 and store.stats().refused == 10 - len(kept)
        assert all(fetch(store, key_of(n), 1_000_000) == object_of(n, 1_000_000) for n in kept)
        assert len(warnings(caplog)) == 1 and "refuses" in warnings(caplog)[0]


def test_threads_share_one_store(server: Server) -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in range(60):
            number = (i * 7 + seed * 3) % 20
            store.put(key_of(number), [object_of(number, SIZE + number)])
            found = fetch(store, key_of(number), SIZE + number)
            if found != object_of(number, SIZE + number):
                wrong.append(number)

    with remote(server) as store:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong and store.stats().objects == 20


def test_everything_is_a_miss_after_close(server: Server) -> None:
    with remote(server) as store:
        store.put(key_of(1), [object_of(1, SIZE)])
    store.close()
    assert key_of(1) not in store and fetch(store, key_of(1), SIZE) is None
    assert not store.put(key_of(1), [object_of(1, SIZE)])


def test_a_wrong_address_is_an_error_without_its_password() -> None:
    with pytest.raises(ConfigError, match="address of the remote cache") as caught:
        RemoteStore("htp://user:secret@host", b"weights")
    assert "secret" not in str(caught.value)
