"""Snapshots below the device, byte by byte: all that a slot needs of one comes back, in every format, by every way.

What a frame held before is 0xFF, which is NaN in every format of values and of scales.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from triptych.cache.geometry import LOOKBACK, RESTORED, SLOT_ROWS, CacheCapacity, CacheGeometry
from triptych.cache.jobs import DEVICE, HOST, Demotion, Fetch, FetchPart, Jobs, Save
from triptych.cache.store.protocol import ObjectKey
from triptych.cache.store.segments import SegmentStore
from triptych.config import SHAPES, WINDOW, KvFormat, ModelShape
from triptych.engine.gpu_mover import GpuMover
from triptych.engine.mover import Mover
from triptych.engine.pools import Pools

BOUNDARY = 1152
KEY = ObjectKey("snapshot", bytes(32))
SMALL = ModelShape(
    vocab_size=16, hidden_size=8, ratios=(0, 4, 128, 4), num_heads=2, head_dim=96, rope_dim=16,
    q_lora_rank=4, o_groups=2, o_lora_rank=2, index_heads=2, index_head_dim=32, index_topk=4, num_experts=2,
    experts_per_token=1, moe_intermediate_size=4, num_hash_layers=1, routed_scaling=1.0, num_mtp_layers=0,
)  # fmt: skip


@pytest.fixture(params=[Mover, GpuMover])
def mover(request: pytest.FixtureRequest, streams_on_processor: None) -> type[Mover]:
    """Both movers, that of a GPU on the processor."""
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["host", "disk", "host, then disk"])
@pytest.mark.parametrize("form", ["fp8", "bfloat16", "float32"])
def test_a_snapshot_comes_back_whole(mover: type[Mover], tmp_path: Path, form: KvFormat, way: str) -> None:
    _comes_back(SMALL, form, way, mover, tmp_path)


@pytest.mark.parametrize("shape", ["flash", "pro"])
def test_a_snapshot_of_a_released_model_comes_back_whole(shape: str, tmp_path: Path) -> None:
    _comes_back(SHAPES[shape], "fp8", "host, then disk", Mover, tmp_path)


def _comes_back(shape: ModelShape, form: KvFormat, way: str, kind: type[Mover], directory: Path) -> None:
    geometry = CacheGeometry.of(shape, form)
    count = geometry.snapshot_frames
    assert geometry.layers * WINDOW % geometry.rows_per_frame, "the last frame is to be full only in part"
    pools = Pools(shape, geometry, CacheCapacity(frames=2 * count, slots=2))
    rings = pools.window.view(torch.uint8)
    rings.copy_(torch.randint(0, 256, rings.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8))
    pools.frames.view(torch.uint8).fill_(0xFF)
    here, there = tuple(range(count)), tuple(range(count, 2 * count))
    moving = kind(pools, geometry, count, [SegmentStore(directory, bytes(32), 1 << 30)])
    moving._host[:] = 0xFF
    pools.save(0, BOUNDARY, here)
    if way != "disk":
        moving.run(Jobs(demotions=(Demotion(KEY, here, here),)))
    if way != "host":
        source = DEVICE if way == "disk" else HOST
        _run(moving, Jobs(saves=(Save(1, KEY, "disk", source, here),)))
    tier, host_frames = (HOST, here) if way == "host" else ("disk", ())
    _run(moving, Jobs(fetches=(Fetch(2, (FetchPart(KEY, tier, there, host_frames),)),)))
    pools.restore(1, BOUNDARY, there)
    moving.close()
    needed = torch.arange(BOUNDARY - RESTORED, BOUNDARY - LOOKBACK) % SLOT_ROWS
    for one, other in zip(pools._rings(0), pools._rings(1), strict=True):
        assert torch.equal(one[:, needed].view(torch.uint8), other[:, needed].view(torch.uint8))


def _run(moving: Mover, jobs: Jobs) -> None:
    moving.run(jobs)
    [done] = moving.poll(30.0)
    assert all(done.ok)
