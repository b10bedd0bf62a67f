"""Tiers below a GPU: the same jobs as engine/mover.py, over streams, so that steps neither wait nor are overtaken.

    demotion   frames --gather--> staging --copies--> pinned host frames   gathered in the step's stream, then in `down`
    fetch      host frames --copies--> frames                              in `up`; stores fill pinned staging first
    save       frames --copies--> pinned staging --> store                 in `down`

Order. What a step writes is enqueued in the compute stream, all steps in order. A demotion is gathered there before the
step that overwrites its frames, so the step does not wait for the link. Copies of fetches and saves first wait for
an event that `run` records behind everything enqueued so far, demotions included: frames that were given up a moment
ago are not overwritten before their last readers and writers have run. A fetch is reported when its copies have
ended, so that whatever is enqueued afterwards sees them.

Checksums are made when a copy has arrived on the host, in a thread; a fetch of the same object waits for that.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future

import torch
import xxhash
from torch import Tensor

from triptych.cache.geometry import CacheGeometry
from triptych.cache.jobs import DEVICE, HOST, Demotion, FetchPart, Jobs, Save
from triptych.cache.store.protocol import ObjectKey, Store
from triptych.engine.batching import to_device
from triptych.engine.mover import Bytes, Mover, host_memory, not_superseded
from triptych.engine.pools import Pools

_BATCH = 64  # frames gathered at once
_STAGES = 4  # buffers of that many frames


class _Stage:
    """Device memory that demoted frames pass through, and when it is free again."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.frames = torch.empty(_BATCH, size, dtype=torch.uint8, device=device)
        self.filled, self.free = torch.cuda.Event(), torch.cuda.Event()


class GpuMover(Mover):
    """A mover whose device frames are a GPU's. Host frames are pinned."""

    def __init__(
        self,
        pools: Pools,
        geometry: CacheGeometry,
        host_frames: int = 0,
        stores: Sequence[Store] = (),
        threads: int = 0,
    ) -> None:
        # a checksum takes four to six times as long as the link's copy, so more threads than on a processor
        super().__init__(pools, geometry, host_frames, stores, threads or min(8, os.cpu_count() or 1))
        self._frames = pools.frames.view(torch.uint8)
        self._pinned = torch.from_numpy(self._host)
        self._where = pools.device
        self._down, self._up = (torch.cuda.Stream(pools.device) for _ in range(2))
        self._stages = [_Stage(self._frames.shape[1], pools.device) for _ in range(_STAGES if host_frames else 0)]
        self._turn = 0
        self._fence = torch.cuda.Event()
        self._arriving: dict[int, Future[None]] = {}  # by first host frame: demotions on their way
        self._latest: dict[int, ObjectKey] = {}  # by first host frame: what was last sent there
        self._guard = threading.Lock()
        self._own = threading.local()

    def run(self, jobs: Jobs) -> None:
        """Gather what is demoted, mark where the compute stream is, start the rest."""
        if not jobs:
            return
        self._demote_all(jobs.demotions)
        fence = torch.cuda.Event()
        fence.record()
        self._fence = fence  # a job that reads a later one waits longer, never too short
        super().run(Jobs((), jobs.fetches, jobs.saves, jobs.touches))

    def _demote_all(self, demotions: Sequence[Demotion]) -> None:
        current = not_superseded(demotions)
        batch: list[Demotion] = []
        size = 0
        for demotion in current:
            if size + len(demotion.frames) > _BATCH and batch:
                self._send_down(batch)
                batch, size = [], 0
            batch.append(demotion)
            size += len(demotion.frames)
        if batch:
            self._send_down(batch)

    def _send_down(self, demotions: Sequence[Demotion]) -> None:
        """Gather the frames in the compute stream and copy them to the host behind it."""
        frames = [frame for demotion in demotions for frame in demotion.frames]
        targets = [frame for demotion in demotions for frame in demotion.host_frames]
        compute = torch.cuda.current_stream(self._where)
        arrived = torch.cuda.Event()
        for at in range(0, len(frames), _BATCH):
            some = frames[at : at + _BATCH]
            stage = self._stages[self._turn]
            self._turn = (self._turn + 1) % _STAGES
            compute.wait_event(stage.free)
            held = stage.frames[: len(some)]
            index = to_device(torch.tensor(some).numpy(), self._where)
            torch.index_select(self._frames, 0, index, out=held)
            stage.filled.record(compute)
            with torch.cuda.stream(self._down):
                self._down.wait_event(stage.filled)
                _copy_all([self._pinned[target] for target in targets[at : at + _BATCH]], list(held.unbind()))
                stage.free.record(self._down)
        arrived.record(self._down)
        with self._guard:
            self._latest.update((demotion.host_frames[0], demotion.key) for demotion in demotions)
        future = self._fetchers.submit(self._sum, arrived, tuple(demotions))
        with self._guard:
            self._arriving = {frame: f for frame, f in self._arriving.items() if not f.done()}
            self._arriving.update((demotion.host_frames[0], future) for demotion in demotions)

    def _sum(self, arrived: torch.cuda.Event, demotions: tuple[Demotion, ...]) -> None:
        """Checksums of what has arrived on the host."""
        arrived.synchronize()
        for key, host_frames in ((demotion.key, demotion.host_frames) for demotion in demotions):
            digest = self._digest(key, host_frames)
            with self._guard:
                if self._latest.get(host_frames[0]) == key:  # else something else is on its way there
                    self._sums[host_frames[0]] = key, digest

    def _digest(self, key: ObjectKey, host_frames: Sequence[int]) -> bytes:
        state = xxhash.xxh3_128()
        for part in self._parts(self._host, key, host_frames):
            state.update(part.data)
        return state.digest()

    def _await(self, host_frames: Sequence[int]) -> None:
        """Until a demotion into these frames is complete."""
        with self._guard:
            future = self._arriving.get(host_frames[0])
        if future is not None:
            future.result()

    def _bring_slice(self, parts: Sequence[FetchPart]) -> tuple[bool, ...]:
        held = [part for part in parts if part.tier == HOST]
        for part in held:
            self._await(part.host_frames)
        # nobody sees these frames before the checksums, which are made while the copies run, have been compared
        self._send_up([row for part in held for row in part.host_frames], [row for p in held for row in p.frames])
        brought = super()._bring_slice(parts)
        self._up_to_here()
        return brought

    def _bring_from_host(self, part: FetchPart) -> bool:
        return self._is_whole(part, self._digest(part.key, part.host_frames))

    def _bring_from_store(self, part: FetchPart) -> bool:
        staging, memory = self._staging(len(part.frames))
        if not self._stores[part.tier].get(part.key, self._views(memory, part.key, range(len(part.frames)))):
            return False
        with torch.cuda.stream(self._up):
            self._up.wait_event(self._fence)
            _copy_all([self._frames[frame] for frame in part.frames], list(staging[: len(part.frames)].unbind()))
        self._up_to_here()  # the staging is used again
        return True

    def _put(self, save: Save) -> bool:
        if save.source != DEVICE:
            self._await(save.frames)
            return super()._put(save)
        staging, memory = self._staging(len(save.frames))
        ended = torch.cuda.Event()
        with torch.cuda.stream(self._down):
            self._down.wait_event(self._fence)
            _copy_all(list(staging[: len(save.frames)].unbind()), [self._frames[frame] for frame in save.frames])
            ended.record(self._down)
        ended.synchronize()
        return self._stores[save.tier].put(save.key, self._views(memory, save.key, range(len(save.frames))))

    def _send_up(self, host_frames: Sequence[int], frames: Sequence[int]) -> None:
        """Enqueue copies of host frames into frames."""
        if frames:
            with torch.cuda.stream(self._up):
                self._up.wait_event(self._fence)
                _copy_all([self._frames[frame] for frame in frames], [self._pinned[row] for row in host_frames])

    def _up_to_here(self) -> None:
        """Wait for the copies enqueued so far."""
        ended = torch.cuda.Event()
        ended.record(self._up)
        ended.synchronize()

    def _staging(self, frames: int) -> tuple[Tensor, Bytes]:
        """Pinned memory of this thread for an object of so many frames, as torch and as numpy see it."""
        memory: Bytes | None = getattr(self._own, "memory", None)
        if memory is None or len(memory) < frames:
            memory = self._own.memory = host_memory(frames, self._frames.shape[1])
        return torch.from_numpy(memory), memory


def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Enqueue many copies by one call: from Python, each would take as long as its bytes take over the link."""
    torch._foreach_copy_(targets, sources, non_blocking=True)
