"""The mover of a GPU, on the processor: what is told of a fetch, and when, while its stream is behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from triptych.cache.geometry import CacheCapacity, CacheGeometry
from triptych.cache.jobs import DEVICE, HOST, Demotion, Done, Fetch, FetchPart, Jobs, Save
from triptych.cache.store.protocol import ObjectKey
from triptych.cache.store.segments import SegmentStore
from triptych.config import SHAPES
from triptych.engine.gpu_mover import GpuMover
from triptych.engine.pools import Pools

COUNT = 12
GEOMETRY = CacheGeometry.of(SHAPES["flash"], "fp8")
KEYS = [ObjectKey("page", at.to_bytes(32, "little")) for at in range(COUNT)]
SNAPSHOT = ObjectKey("snapshot", bytes(32))


class Behind:
    """Events of a stream that ends so many pieces of work as it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ended = 0
        self.broken = False
        self._asked: list[object] = []
        monkeypatch.setattr(torch.cuda.Event, "query", lambda event: self._query(event))

    def _query(self, event: object) -> bool:
        if self.broken:
            raise RuntimeError("CUDA error")
        if event not in self._asked:
            self._asked.append(event)
        return self._asked.index(event) < self.ended


@pytest.fixture
def behind(monkeypatch: pytest.MonkeyPatch, streams_on_processor: None) -> Behind:
    return Behind(monkeypatch)


@pytest.fixture
def mover(behind: Behind, tmp_path: Path) -> Iterator[GpuMover]:
    """Over pages that have gone down to the host, and of which the device's frames hold nothing any more."""
    pools = Pools(SHAPES["flash"], GEOMETRY, CacheCapacity(COUNT, 1), torch.device("cpu"))
    pools.frames.view(torch.uint8).random_(0, 256, generator=torch.Generator().manual_seed(0))
    moving = GpuMover(pools, GEOMETRY, COUNT, [SegmentStore(tmp_path, bytes(32), 1 << 30)])
    moving.run(Jobs(tuple(Demotion(key, (at,), (COUNT - 1 - at,)) for at, key in enumerate(KEYS))))
    yield moving
    behind.ended, behind.broken = COUNT, False
    moving.close()


def part(at: int) -> FetchPart:
    return FetchPart(KEYS[at], HOST, (at,), (COUNT - 1 - at,))


def until(mover: GpuMover, count: int) -> list[Done]:
    done: list[Done] = []
    while len(done) < count:
        done += mover.poll(1.0)
    return done


def test_fetches_are_told_of_one_by_one_as_their_copies_end(mover: GpuMover, behind: Behind) -> None:
    before = mover._frames.clone()
    mover._frames.fill_(0xFF)
    mover.run(Jobs((), tuple(Fetch(job, tuple(map(part, range(job * 4, job * 4 + 4)))) for job in range(3))))
    assert torch.equal(mover._frames, before), "all of them are enqueued at once"
    assert mover.poll() == mover.poll(0.01) == []
    behind.ended = 2
    assert [(done.job, done.ok) for done in until(mover, 2)] == [(0, (True,) * 4), (1, (True,) * 4)]
    assert mover.poll() == []
    behind.ended = 3
    [last] = mover.poll()
    assert last.job == 2 and last.seconds == pytest.approx(1e-3, rel=0.01), "as long as the copies, not as the wait"


def test_only_what_is_damaged_or_has_another_name_is_computed_again(mover: GpuMover, behind: Behind) -> None:
    behind.ended = 1
    mover._host[COUNT - 1 - 5, -1] ^= 1
    mover._names[COUNT - 1 - 7] = SNAPSHOT
    mover.run(Jobs((), (Fetch(1, tuple(map(part, range(COUNT)))),)))
    [done] = mover.poll()
    assert [at for at, fine in enumerate(done.ok) if not fine] == [5, 7]


def test_a_frame_in_the_middle_of_a_snapshot_is_missed(mover: GpuMover, behind: Behind) -> None:
    behind.ended = 2
    frames = tuple(range(4))
    mover.run(Jobs((Demotion(SNAPSHOT, frames, frames),)))
    fetch = (part(7), FetchPart(SNAPSHOT, HOST, frames, frames), part(6))
    mover._host[2, 100] ^= 1
    mover.run(Jobs((), (Fetch(1, fetch),)))
    assert [done.ok for done in mover.poll()] == [(True, False, True)]


def test_parts_of_several_tiers_are_told_of_in_their_order(mover: GpuMover, behind: Behind) -> None:
    mover.run(Jobs(saves=(Save(1, KEYS[0], "disk", DEVICE, (0,)),)))
    assert until(mover, 1)[0].ok == (True,)
    stored, missing = (FetchPart(KEYS[at], "disk", (at,)) for at in (0, 1))
    mover.run(Jobs((), (Fetch(2, (part(2), stored, missing, part(3))),)))
    assert mover.poll(0.05) == []
    behind.ended = 2
    assert [done.ok for done in until(mover, 1)] == [(True, True, False, True)]


def test_copies_that_fail_are_told_of(mover: GpuMover, behind: Behind) -> None:
    """Nobody would compute the pages of a fetch that is never told of."""
    mover.run(Jobs((), (Fetch(1, (part(0), part(1))), Fetch(2, (part(2),)))))
    behind.broken = True
    assert [done.ok for done in mover.poll()] == [(False, False), (False,)]
