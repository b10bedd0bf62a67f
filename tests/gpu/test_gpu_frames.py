"""Frames that come up from pinned host memory: every byte of them, beside others and under damage."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from triptych.cache.geometry import CacheCapacity, CacheGeometry
from triptych.cache.jobs import HOST, Demotion, Fetch, FetchPart, Jobs
from triptych.cache.store.protocol import ObjectKey
from triptych.config import SHAPES
from triptych.engine.gpu_mover import GpuMover
from triptych.engine.pools import Pools
from triptych.kernels.frames import bringer, engines, triton

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from frames_cases import SIZES, comes_up

CUDA = torch.device("cuda")
PAGE = 492_832
COUNT, SPAN = 300, 70
KEYS = [ObjectKey("page", at.to_bytes(32, "little")) for at in range(COUNT)]
ORDER = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("size", (*SIZES, PAGE))
@pytest.mark.parametrize("count", (0, 1, 8))
@pytest.mark.parametrize("way", (engines, triton))
def test_frames_come_up(way: ModuleType, size: int, count: int) -> None:
    assert comes_up(way.bring_up, size, count, "cuda")


def test_the_copy_engines_are_asked_where_the_driver_can() -> None:
    chosen = bringer(torch.empty(1, 16, dtype=torch.uint8, pin_memory=True), CUDA)
    assert chosen is (triton.bring_up if engines.driver_copies() is None else engines.bring_up)


@pytest.fixture(params=[engines, triton])
def mover(request: pytest.FixtureRequest) -> Iterator[GpuMover]:
    """Over pages of V4-Flash, all of which have gone down to scattered frames of the host; what is up is no more."""
    shape = SHAPES["flash"]
    geometry = CacheGeometry.of(shape, "fp8")
    pools = Pools(shape, geometry, CacheCapacity(COUNT, 1), CUDA)
    moving = GpuMover(pools, geometry, COUNT)
    moving._bring_frames = request.param.bring_up
    assert pools.frames.shape[1] == PAGE
    pools.frames.random_(0, 256, generator=torch.Generator("cuda").manual_seed(0))
    moving.run(Jobs(tuple(Demotion(KEYS[at], (at,), (ORDER[at],)) for at in range(COUNT))))
    yield moving
    moving.close()


def fetched(mover: GpuMover, frames: list[int]) -> list[bool]:
    """Whether each page has come, into `frames`, by several fetches at once."""
    parts = [FetchPart(KEYS[at], HOST, (frame,), (ORDER[at],)) for at, frame in enumerate(frames)]
    fetches = tuple(Fetch(at, tuple(parts[at : at + SPAN])) for at in range(0, COUNT, SPAN))
    mover.run(Jobs((), fetches))
    done = {}
    while len(done) < len(fetches):
        done |= {one.job: one.ok for one in mover.poll(1.0)}
    return [ok for _, some in sorted(done.items()) for ok in some]


def test_fetches_at_once_bring_every_byte(mover: GpuMover) -> None:
    before = mover._frames.clone()
    for places in (list(range(COUNT)), torch.randperm(COUNT).tolist()):
        mover._frames.fill_(0xFF)
        assert all(fetched(mover, places))
        assert torch.equal(mover._frames[places], before)


def test_fetches_wait_for_what_was_enqueued_before_them(mover: GpuMover) -> None:
    """A step that is still to read and to write the frames that pages come into does so first."""
    before = mover._frames.clone()
    torch.cuda._sleep(50_000_000)
    read = mover._frames.clone()
    mover._frames.fill_(0xFF)
    assert all(fetched(mover, list(range(COUNT))))
    assert torch.equal(read, before) and torch.equal(mover._frames, before)


def test_a_flipped_bit_on_the_host_is_told_of_its_page_alone(mover: GpuMover) -> None:
    mover._down.synchronize()
    wrong = {3: 0, 70: PAGE // 2, 299: PAGE - 1}
    for page, byte in wrong.items():
        mover._host[ORDER[page], byte] ^= 16
    good = fetched(mover, list(range(COUNT)))
    assert [at for at, fine in enumerate(good) if not fine] == list(wrong)
