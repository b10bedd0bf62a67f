"""Tiers below a GPU: the same jobs as engine/mover.py, over streams, so that steps neither wait nor are overtaken.

    demotion   frames --gather--> stage --copies--> pinned host frames     gathered in the step's stream, then in `down`
    fetch      host frames --one call--> frames                            in `rise`
               stores --> pinned staging --copies--> frames                in `up`
    save       frames --copies--> pinned staging --> store                 in `down`

Order. What a step writes is enqueued in the compute stream, all steps in order. A demotion is gathered there before the
step that overwrites its frames, so the step does not wait for the link. Copies of fetches and saves first wait for
events that `run` records behind everything enqueued so far, demotions included: frames that were given up a moment
ago are not overwritten before their last readers and writers have run. A fetch is reported when its copies have
ended, so that whatever is enqueued afterwards sees them.

Checksums are the GPU's work: they are made where frames are gathered and compared where they come back, at a small part
of the copy's time. From Python a copy costs as long as its page takes over the link. So demotions that are neighbours
on the host go together, and a fetch comes up by one call (kernels/frames). `run` enqueues it and `poll` asks for its
end: no thread is woken, which took longer than small fetches, and the next is enqueued while one is on its way.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from operator import attrgetter, eq, itemgetter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from triptych.cache.geometry import CacheGeometry
from triptych.cache.jobs import DEVICE, HOST, Demotion, Done, FetchPart, Jobs, Save
from triptych.cache.store.protocol import ObjectKey, Store
from triptych.engine.batching import to_device
from triptych.engine.mover import Bytes, Ended, Mover, host_memory, not_superseded
from triptych.engine.pools import Pools
from triptych.kernels.frames import bringer
from triptych.kernels.frames.ref import checksums, factors_of

logger = logging.getLogger(__name__)

_BATCH = 64  # frames gathered at once
_STAGES = 4  # buffers of that many frames


class _Stage:
    """Device memory that frames pass through on their way down, and when it is free again."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.frames = torch.empty(_BATCH, size, dtype=torch.uint8, device=device)
        self.filled, self.free = torch.cuda.Event(), torch.cuda.Event()


@dataclass(frozen=True, slots=True)
class _Rise:
    """Parts of a fetch that the GPU brings from the host, and who is told of them.

    left: pinned int64, for each of their frames in turn what its checksum lacks, once `ended` has come. Until all of a
    fetch has been reported nobody sees its frames, right or not.
    """

    parts: Sequence[FetchPart]
    end: Ended
    left: Tensor
    begun: torch.cuda.Event
    ended: torch.cuda.Event


class GpuMover(Mover):
    """A mover whose device frames are a GPU's. Host frames are pinned."""

    def __init__(
        self,
        pools: Pools,
        geometry: CacheGeometry,
        host_frames: int = 0,
        stores: Sequence[Store] = (),
        threads: int = min(4, os.cpu_count() or 1),
    ) -> None:
        super().__init__(pools, geometry, host_frames, stores, threads)
        self._frames = pools.frames.view(torch.uint8)
        self._pinned = torch.from_numpy(self._host)
        self._where = pools.device
        self._down, self._up, self._rise = (torch.cuda.Stream(pools.device) for _ in range(3))
        size = self._frames.shape[1]
        self._falling = [_Stage(size, pools.device) for _ in range(_STAGES if host_frames else 0)]
        self._turn = 0
        self._rising: deque[_Rise] = deque()  # in the order of their stream
        self._factors = factors_of(size).to(pools.device)
        self._bring_frames = bringer(self._pinned, pools.device)
        self._table = torch.zeros(host_frames, dtype=torch.int64, device=pools.device)  # checksums of host frames
        self._names: list[ObjectKey | None] = [None] * host_frames  # what begins in a host frame
        self._fences = torch.cuda.Event(), torch.cuda.Event()
        self._own = threading.local()
        if host_frames:
            self._enqueue((), lambda *_: None).ended.synchronize()  # compiles what brings them

    def run(self, jobs: Jobs) -> None:
        """Gather what is demoted, mark where the streams are, start the rest."""
        if not jobs:
            return
        self._demote_all(jobs.demotions)
        fences = torch.cuda.Event(), torch.cuda.Event()
        fences[0].record(torch.cuda.current_stream(self._where))
        fences[1].record(self._down)
        self._fences = fences  # a job that reads later ones waits longer, never too short
        super().run(Jobs((), jobs.fetches, jobs.saves, jobs.touches))

    def close(self) -> None:
        """See Mover.close."""
        self._rise.synchronize()
        self._report_risen()
        super().close()

    def poll(self, timeout: float = 0.0) -> list[Done]:
        """See Mover.poll. With time to wait it waits for the oldest fetch from the host, some milliseconds at most."""
        wait = bool(timeout and self._rising)
        self._report_risen(wait)
        return super().poll(0.0 if wait else timeout)

    # ---- down

    def _demote_all(self, demotions: Sequence[Demotion]) -> None:
        current = not_superseded(demotions)
        for demotion in current:
            self._names[demotion.host_frames[0]] = demotion.key
        pairs = sorted(pair for one in current for pair in zip(one.host_frames, one.frames, strict=True))
        for at in range(0, len(pairs), _BATCH):
            host, device = zip(*pairs[at : at + _BATCH], strict=True)
            self._send_down(host, device)

    def _send_down(self, host_frames: Sequence[int], frames: Sequence[int]) -> None:
        """Gather frames in the compute stream and copy them to the host behind it."""
        stage = self._falling[self._turn]
        self._turn = (self._turn + 1) % _STAGES
        compute = torch.cuda.current_stream(self._where)
        compute.wait_event(stage.free)
        held = stage.frames[: len(frames)]
        torch.index_select(self._frames, 0, self._index(frames), out=held)
        self._table.index_copy_(0, self._index(host_frames), checksums(held, self._factors))
        stage.filled.record(compute)
        with torch.cuda.stream(self._down):
            self._down.wait_event(stage.filled)
            runs = _runs(host_frames)
            host = [self._pinned[first : first + count] for first, count in runs]
            torch._foreach_copy_(host, list(held.split([count for _, count in runs])), non_blocking=True)
            stage.free.record(self._down)

    def _index(self, frames: Sequence[int]) -> Tensor:
        return to_device(torch.tensor(frames).numpy(), self._where)

    # ---- up

    def _slices(self, parts: Sequence[FetchPart]) -> list[Sequence[FetchPart]]:
        """As many as follow each other from the host in one, others as usual."""
        out: list[Sequence[FetchPart]] = []
        for tier, group in groupby(parts, attrgetter("tier")):
            some = list(group)
            out += [some] if tier == HOST else super()._slices(some)
        return out

    def _start_slice(self, parts: Sequence[FetchPart], end: Ended) -> None:
        if parts[0].tier != HOST:
            return super()._start_slice(parts, end)
        try:
            self._rising.append(self._enqueue(parts, end))
        except Exception:
            logger.exception("fetching %d objects from the host failed; they are computed again", len(parts))
            self._rise.synchronize()  # what was enqueued must not write into frames that others get
            end((False,) * len(parts), 0.0)

    def _enqueue(self, parts: Sequence[FetchPart], end: Ended) -> _Rise:
        """Copy host frames into frames behind the fences."""
        frames = [_all_of(parts, "host_frames"), _all_of(parts, "frames")]
        shared = torch.empty(3, len(frames[0]), dtype=torch.int64, pin_memory=self._where.type == "cuda")
        places, left = shared[:2], shared[2]
        np.stack(frames, out=places.numpy())
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._rise):
            for fence in self._fences:
                self._rise.wait_event(fence)
            begun.record(self._rise)
            found = self._bring_frames(self._pinned, self._frames, places, self._factors, self._table)
            left.copy_(found, non_blocking=True)
            ended.record(self._rise)
        return _Rise(parts, end, left, begun, ended)

    def _report_risen(self, wait: bool = False) -> None:
        """Say of each fetch whose copies have ended what has arrived; `wait`: not before the oldest has ended."""
        while self._rising:
            rise = self._rising[0]
            try:
                if wait:
                    rise.ended.synchronize()
                    wait = False
                if not rise.ended.query():
                    return
                ok, took = self._judged(rise), rise.begun.elapsed_time(rise.ended) / 1e3
            except Exception:
                logger.exception("fetching %d objects from the host failed; they are computed again", len(rise.parts))
                ok, took = (False,) * len(rise.parts), 0.0
            self._rising.popleft()
            rise.end(ok, took)

    def _judged(self, rise: _Rise) -> tuple[bool, ...]:
        """Which parts are what once came down under their names."""
        first = map(itemgetter(0), map(attrgetter("host_frames"), rise.parts))
        named = list(map(eq, map(self._names.__getitem__, first), map(attrgetter("key"), rise.parts)))
        if all(named) and not rise.left.numpy().any():
            return (True,) * len(named)
        each = rise.left.split([len(part.frames) for part in rise.parts])
        ok = tuple(fine and not left.any() for fine, left in zip(named, each, strict=True))
        for part, fine in zip(rise.parts, ok, strict=True):
            if not fine:
                self._tell_damage(part.key)
        return ok

    def _bring_from_store(self, part: FetchPart) -> bool:
        staging, memory = self._staging(len(part.frames))
        if not self._stores[part.tier].get(part.key, self._views(memory, part.key, range(len(part.frames)))):
            return False
        ended = torch.cuda.Event()
        with torch.cuda.stream(self._up):
            self._up.wait_event(self._fences[0])
            for row, frame in enumerate(part.frames):
                self._frames[frame].copy_(staging[row], non_blocking=True)
            ended.record(self._up)
        ended.synchronize()  # the staging is used again
        return True

    # ---- to stores

    def _put(self, save: Save) -> bool:
        if save.source != DEVICE:
            self._fences[1].synchronize()  # it may still be on its way to the host
            return super()._put(save)
        staging, memory = self._staging(len(save.frames))
        ended = torch.cuda.Event()
        with torch.cuda.stream(self._down):
            self._down.wait_event(self._fences[0])
            for row, frame in enumerate(save.frames):
                staging[row].copy_(self._frames[frame], non_blocking=True)
            ended.record(self._down)
        ended.synchronize()
        return self._stores[save.tier].put(save.key, self._views(memory, save.key, range(len(save.frames))))

    def _staging(self, frames: int) -> tuple[Tensor, Bytes]:
        """Pinned memory of this thread for an object of so many frames, as torch and as numpy see it."""
        memory: Bytes | None = getattr(self._own, "memory", None)
        if memory is None or len(memory) < frames:
            memory = self._own.memory = host_memory(frames, self._frames.shape[1])
        return torch.from_numpy(memory), memory


def _all_of(parts: Sequence[FetchPart], field: str) -> npt.NDArray[np.int64]:
    """The frames that parts have in `field`, one after the other; no Python runs for each, prompts have hundreds."""
    return np.fromiter(chain.from_iterable(map(attrgetter(field), parts)), np.int64)


def _runs(frames: Sequence[int]) -> list[tuple[int, int]]:
    """Stretches of ascending frames that follow each other: (first frame, count)."""
    out: list[tuple[int, int]] = []
    for frame in frames:
        if out and frame == sum(out[-1]):
            out[-1] = (out[-1][0], out[-1][1] + 1)
        else:
            out.append((frame, 1))
    return out
