"""Tiers below a GPU: the same jobs as engine/mover.py, over streams, so that steps neither wait nor are overtaken.

    demotion   frames --gather--> stage --copies--> pinned host frames     gathered in the step's stream, then in `down`
    fetch      host frames --copies--> stage --scatter--> frames           in the stage's stream, beside other stages'
               stores --> pinned staging --copies--> frames                in `up`
    save       frames --copies--> pinned staging --> store                 in `down`

Order. What a step writes is enqueued in the compute stream, all steps in order. A demotion is gathered there before the
step that overwrites its frames, so the step does not wait for the link. Copies of fetches and saves first wait for
events that `run` records behind everything enqueued so far, demotions included: frames that were given up a moment
ago are not overwritten before their last readers and writers have run. A fetch is reported when its copies have
ended, so that whatever is enqueued afterwards sees them.

Checksums are the GPU's work: the sum of a frame's words, each times a random odd number, modulo 2**64, is made where
frames are gathered and compared where they come back, at a small part of the copy's time. One wrong word always changes
it. From Python a copy costs as long as its page takes over the link, and several times as long where threads ask by
turns, since each waits for the interpreter again. So one thread brings all that comes from the host; a batch is asked
for in one call, sorted, and pages that are neighbours on the host go together.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import torch
from torch import Tensor

from triptych.cache.geometry import CacheGeometry
from triptych.cache.jobs import DEVICE, HOST, Demotion, FetchPart, Jobs, Save
from triptych.cache.store.protocol import ObjectKey, Store
from triptych.engine.batching import to_device
from triptych.engine.mover import Bytes, Mover, host_memory, not_superseded
from triptych.engine.pools import Pools

_BATCH = 64  # frames gathered or scattered at once
_STAGES = 4  # buffers of that many frames, for each direction


class _Stage:
    """Device memory that frames pass through, when it is free again, and for the way up a stream and an answer."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.frames = torch.empty(_BATCH, size, dtype=torch.uint8, device=device)
        self.filled, self.free = torch.cuda.Event(), torch.cuda.Event()
        self.stream = torch.cuda.Stream(device)
        self.same = torch.empty(_BATCH, dtype=torch.bool, pin_memory=device.type == "cuda")


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
        self._down, self._up = (torch.cuda.Stream(pools.device) for _ in range(2))
        size, count = self._frames.shape[1], _STAGES if host_frames else 0
        self._falling = [_Stage(size, pools.device) for _ in range(count)]
        self._turn = 0
        self._rising = [_Stage(size, pools.device) for _ in range(count)]
        self._riser = ThreadPoolExecutor(1, thread_name_prefix="triptych-rise")  # several would not share a link better
        self._word = torch.int64 if size % 8 == 0 else torch.int32 if size % 4 == 0 else torch.uint8
        words = torch.empty(0, dtype=self._word).element_size()
        generator = torch.Generator().manual_seed(0)
        factors = torch.randint(-(1 << 62), 1 << 62, (size // words,), generator=generator) * 2 + 1
        self._factors = factors.to(pools.device)
        self._table = torch.zeros(host_frames, dtype=torch.int64, device=pools.device)  # checksums of host frames
        self._names: list[ObjectKey | None] = [None] * host_frames  # what begins in a host frame
        self._fences = torch.cuda.Event(), torch.cuda.Event()
        self._own = threading.local()

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
        self._riser.shutdown()
        super().close()

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
        self._table.index_copy_(0, self._index(host_frames), self._sums_of(held))
        stage.filled.record(compute)
        with torch.cuda.stream(self._down):
            self._down.wait_event(stage.filled)
            torch._foreach_copy_(*self._pieces(host_frames, held), non_blocking=True)
            stage.free.record(self._down)

    def _sums_of(self, frames: Tensor) -> Tensor:
        """Checksums [n] int64 of frames [n, bytes], which are contiguous."""
        words = frames.view(self._word)
        # narrow words become eight times as wide, so only some at a time
        return torch.cat(
            [(some * self._factors).sum(dim=1) for some in words.split(_BATCH * words.element_size() // 8)]
        )

    def _pieces(self, host_frames: Sequence[int], held: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Stretches of host frames, and the frames of `held` that belong to them."""
        runs = _runs(host_frames)
        host = [self._pinned[first : first + count] for _, first, count in runs]
        return host, list(held.split([count for *_, count in runs]))

    def _index(self, frames: Sequence[int]) -> Tensor:
        return to_device(torch.tensor(frames).numpy(), self._where)

    # ---- up

    def _slices(self, parts: Sequence[FetchPart]) -> list[tuple[ThreadPoolExecutor, Sequence[FetchPart]]]:
        """As many as follow each other from the host by the one thread for it, others as usual."""
        out: list[tuple[ThreadPoolExecutor, Sequence[FetchPart]]] = []
        for from_host, group in groupby(parts, lambda part: part.tier == HOST):
            some = list(group)
            out += [(self._riser, some)] if from_host else super()._slices(some)
        return out

    def _bring_slice(self, parts: Sequence[FetchPart]) -> tuple[bool, ...]:
        pairs = sorted(
            pair for part in parts if part.tier == HOST for pair in zip(part.host_frames, part.frames, strict=True)
        )
        self._own.good = self._bring_up(pairs)
        return super()._bring_slice(parts)

    def _bring_from_host(self, part: FetchPart) -> bool:
        whole = self._names[part.host_frames[0]] == part.key and all(self._own.good[at] for at in part.host_frames)
        if not whole:
            self._tell_damage(part.key)
        return whole

    def _bring_up(self, pairs: Sequence[tuple[int, int]]) -> dict[int, bool]:
        """Copy host frames into frames, by ascending (host frame, frame), batches on their way while others are asked
        for. Says of each host frame whether it is what once came down."""
        good: dict[int, bool] = {}
        asked: deque[tuple[_Stage, Sequence[int]]] = deque()
        for turn, at in enumerate(range(0, len(pairs), _BATCH)):
            if len(asked) == _STAGES:
                good |= _answer(*asked.popleft())
            host_frames, frames = zip(*pairs[at : at + _BATCH], strict=True)
            stage = self._rising[turn % _STAGES]
            self._send_up(stage, host_frames, frames)
            asked.append((stage, host_frames))
        for one in asked:
            good |= _answer(*one)
        return good

    def _send_up(self, stage: _Stage, host_frames: Sequence[int], frames: Sequence[int]) -> None:
        """Ask for a batch. Until all of a fetch has been reported nobody sees its frames, right or not."""
        count = len(frames)
        held, stream = stage.frames[:count], stage.stream
        with torch.cuda.stream(stream):
            for fence in self._fences:
                stream.wait_event(fence)
            host, device = self._pieces(host_frames, held)
            torch._foreach_copy_(device, host, non_blocking=True)
            places = self._index([*host_frames, *frames])
            same = self._sums_of(held) == self._table.index_select(0, places[:count])
            self._frames.index_copy_(0, places[count:], held)
            stage.same[:count].copy_(same, non_blocking=True)
            stage.free.record(stream)

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


def _runs(frames: Sequence[int]) -> list[tuple[int, int, int]]:
    """Stretches of ascending frames that follow each other: (place of the first, first frame, count)."""
    out: list[tuple[int, int, int]] = []
    for at, frame in enumerate(frames):
        if out and frame == out[-1][1] + out[-1][2]:
            out[-1] = (out[-1][0], out[-1][1], out[-1][2] + 1)
        else:
            out.append((at, frame, 1))
    return out


def _answer(stage: _Stage, host_frames: Sequence[int]) -> dict[int, bool]:
    """Wait for a batch that came up: whether each frame is what it was."""
    stage.free.synchronize()
    return dict(zip(host_frames, stage.same[: len(host_frames)].tolist(), strict=True))
