"""SmallEngine over real lower tiers: where its stores live, how they are opened again, what a resume must look like."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_engine import Answer, SmallEngine, accounted, agree, text

from triptych.cache.geometry import LOOKBACK
from triptych.cache.store import RemoteStore, SegmentStore, Store
from triptych.words import Usage

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from store_server import Server, find_server

QUOTA = 64 << 20
CONTINUED = 44
QUESTION = text(2, 5)


@dataclass
class Ground:
    """What outlives an engine: a directory for the disk tier, a server for the remote one."""

    directory: Path
    server: Server | None = None

    def stores(self, *tiers: str, fingerprint: bytes = b"small") -> list[Store]:
        """The stores called `tiers`, opened as a new process would."""
        makers = {
            "disk": lambda: SegmentStore(self.directory, fingerprint, QUOTA),
            "remote": lambda: RemoteStore(self.server.url, fingerprint, timeout_s=60.0),  # type: ignore[union-attr]
        }
        return [makers[tier]() for tier in tiers if tier != "host"]

    @contextmanager
    def engine(self, *tiers: str, fingerprint: bytes = b"small", **options: object) -> Iterator[SmallEngine]:
        """An engine over these tiers for as long as the block lasts."""
        if "host" in tiers:
            options.setdefault("host_pages", 160)
        with engine_over(self.stores(*tiers, fingerprint=fingerprint), **options) as engine:
            yield engine


@contextmanager
def engine_over(stores: Sequence[Store], **options: object) -> Iterator[SmallEngine]:
    """An engine over given stores, which it closes, whatever happens."""
    engine = SmallEngine(stores=stores, **options)  # type: ignore[arg-type]
    try:
        yield engine
        engine.cache.check_integrity()
    finally:
        engine.loop.close()


def server_or_skip(directory: Path) -> Iterator[Server]:
    """A running Valkey or Redis server; skips the test where there is none."""
    valkey = pytest.importorskip("valkey", reason="the extra `remote` is not installed")
    found = find_server()
    if isinstance(found, str):
        pytest.skip(found)
    server = Server(*found, directory)
    server.start()
    for _ in range(600):  # its socket is there a moment before it listens, and a store leaves one that refuses alone
        with valkey.Valkey.from_url(server.url) as client, suppress(valkey.exceptions.ConnectionError):
            if client.ping():
                break
        time.sleep(0.05)
    yield server
    server.remove()


def boundary_of(length: int) -> int:
    """Tokens of a prompt's whole pages."""
    return length // 128 * 128


def leave(engine: SmallEngine, length: int, salt: str = "") -> Answer:
    """Run a prompt of `length`, let all copies end, and push everything off the device."""
    answer = engine.ask(text(1, length), 1, salt=salt)
    assert engine.loop.settle(30.0), "some copy never ended"
    engine.spoil_device()
    assert not engine.cache.stats().pages_cached
    engine.cache.check_integrity()
    return answer


def come_back(engine: SmallEngine, length: int, tokens: int = CONTINUED, salt: str = "") -> Usage:
    """Ask the prompt of `leave` again with five tokens more; the answer must be that of the text alone."""
    answer = engine.ask((*text(1, length), *QUESTION), tokens, salt=salt)
    engine.cache.check_integrity()
    agree(answer)
    return accounted(answer)


def resumed_from(usage: Usage, tier: str, length: int) -> None:
    """All that can be used of a prompt of `length` came from `tier`."""
    cached = max(0, boundary_of(length) - LOOKBACK)
    assert usage.cached_tokens == cached
    assert usage.cached_by_tier == ({tier: cached} if cached else {})
    assert usage.resume == ("snapshot" if cached else "cold")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Messages of warnings and errors so far."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
