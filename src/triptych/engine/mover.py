"""Carries out what cache/tiers.py decided: copies between device frames, host frames and stores.

Demotions run at once and are waited for, because their frames are reused by the coming step; where there are many,
threads help. Fetches and saves run in threads of their own, apart because somebody waits for a fetch and nobody for a
save; their frames belong to nobody else until `poll` has reported the job.

What lies on the host has a checksum, made while it was copied there and compared while it is copied back. xxh3 of a
frame that the copy has just left in the processor's cache costs a seventh to a quarter of the copy's time; crc32 took
more than three times the copy's (measured, see the log).
"""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from triptych.cache.geometry import CacheGeometry
from triptych.cache.jobs import DEVICE, HOST, Demotion, Done, Fetch, FetchPart, Jobs, Save
from triptych.cache.store.faultlog import FaultLog
from triptych.cache.store.protocol import ObjectKey, Store
from triptych.config import WINDOW
from triptych.engine.pools import Pools

logger = logging.getLogger(__name__)
Bytes = npt.NDArray[np.uint8]
Ended = Callable[[tuple[bool, ...], float], None]  # told which parts of a slice have arrived, and what that took

_SLICE = 64  # objects of one fetch that one thread brings; longer fetches are spread over the threads
_BATCH = 16  # saves that are reported together: waking an idle engine for each slows them down by a sixth (measured)
_FEW = 16  # demotions that one thread takes at once; with fewer it is not worth while to wake another


class Mover:
    """Owns the host's frames, as large as the device's, and the threads: `threads` each for fetches and saves."""

    def __init__(
        self,
        pools: Pools,
        geometry: CacheGeometry,
        host_frames: int = 0,
        stores: Sequence[Store] = (),
        threads: int = min(4, os.cpu_count() or 1),
    ) -> None:
        # numpy does not see the frames of a GPU, which gpu_mover.py copies in its own way
        frames = pools.frames if pools.frames.device.type == "cpu" else pools.frames[:0].cpu()
        self._device = frames.view(torch.uint8).numpy()
        self._host = host_memory(host_frames, self._device.shape[1])
        # what lies in the frames that begin with this one; a fetch reads it while `HostTier.use` keeps them as they are
        self._sums: list[tuple[ObjectKey, bytes] | None] = [None] * host_frames
        self._faults = FaultLog(logger, time.monotonic)
        self._geometry = geometry
        self._row_sections = pools.row_sections
        self._stores = {store.name: store for store in stores}
        self._helpers = threads - 1
        self._fetchers = ThreadPoolExecutor(threads, thread_name_prefix="triptych-fetch")  # started when needed
        self._savers = ThreadPoolExecutor(threads, thread_name_prefix="triptych-save")
        self._done: queue.SimpleQueue[list[Done]] = queue.SimpleQueue()
        self._under_way = 0
        self._lock = threading.Lock()  # guards the next two
        self._saved: list[Done] = []
        self._saving = 0

    def run(self, jobs: Jobs) -> None:
        """Demote now; start the rest."""
        self._demote_all(jobs.demotions)
        for fetch in jobs.fetches:
            self._start_fetch(fetch)
        with self._lock:
            self._saving += len(jobs.saves)
        self._under_way += len(jobs.saves)
        for save in jobs.saves:
            self._savers.submit(self._save_and_report, save)
        if jobs.touches:
            self._savers.submit(self._touch, jobs.touches)

    def poll(self, timeout: float = 0.0) -> list[Done]:
        """Background jobs that have ended since the last call; waits up to `timeout` seconds for the first."""
        out: list[Done] = []
        while self._under_way:
            try:
                done = self._done.get(timeout=timeout) if timeout and not out else self._done.get_nowait()
            except queue.Empty:
                break
            out += done
            self._under_way -= len(done)
        return out

    def close(self) -> None:
        """Wait for the copies under way, then close the stores."""
        self._fetchers.shutdown()
        self._savers.shutdown()
        for store in self._stores.values():
            store.close()

    # ---- copies

    def _demote_all(self, demotions: Sequence[Demotion]) -> None:
        """All demotions of a step, in any order."""
        current = not_superseded(demotions)
        if len(current) <= _FEW:
            return self._demote_some(current)
        slices = iter([current[at : at + _FEW] for at in range(0, len(current), _FEW)])

        def work() -> None:
            for some in slices:
                self._demote_some(some)

        helpers = [self._fetchers.submit(work) for _ in range(min(self._helpers, len(current) // _FEW))]
        work()
        for helper in helpers:
            if not helper.cancel():  # those that were busy with fetches until now are not waited for
                helper.result()

    def _demote_some(self, demotions: Sequence[Demotion]) -> None:
        for demotion in demotions:
            self._demote(demotion)

    def _demote(self, demotion: Demotion) -> None:
        source = self._parts(self._device, demotion.key, demotion.frames)
        target = self._parts(self._host, demotion.key, demotion.host_frames)
        self._sums[demotion.host_frames[0]] = demotion.key, _copy(source, target)

    def _parts(self, memory: Bytes, key: ObjectKey, frames: Sequence[int]) -> list[Bytes]:
        """The bytes of an object in its frames; a snapshot leaves the end of each section of its last frame unused."""
        if key.kind == "page":
            return [memory[frames[0]]]
        left = self._geometry.layers * WINDOW
        parts = []
        for frame in frames:
            rows = min(self._geometry.rows_per_frame, left)
            parts += [memory[frame, part] for part in self._pieces_of_frame(rows)]
            left -= rows
        return parts

    def _pieces_of_frame(self, rows: int) -> list[slice]:
        """Where the first `rows` window rows lie in a frame: the scales of packed ones come behind all values."""
        most, begin, out = self._geometry.rows_per_frame, 0, []
        for size in self._row_sections:
            out.append(slice(begin, begin + rows * size))
            begin += most * size
        return [slice(0, begin)] if rows == most else out

    def _views(self, memory: Bytes, key: ObjectKey, frames: Sequence[int]) -> list[memoryview]:
        return [part.data for part in self._parts(memory, key, frames)]

    # ---- in the background

    def _start_fetch(self, fetch: Fetch) -> None:
        """Split a fetch into slices, which end in any order."""
        slices = self._slices(fetch.parts)
        arrival = _Arrival(fetch.job, len(slices), self._done)
        self._under_way += 1
        for index, parts in enumerate(slices):
            self._start_slice(parts, partial(arrival.end, index))

    def _slices(self, parts: Sequence[FetchPart]) -> list[Sequence[FetchPart]]:
        """Parts that follow each other, as many as one thread is to bring."""
        return [parts[at : at + _SLICE] for at in range(0, len(parts), _SLICE)]

    def _start_slice(self, parts: Sequence[FetchPart], end: Ended) -> None:
        def bring() -> None:
            began = time.perf_counter()  # waiting for other fetches says nothing about the tier
            brought = tuple(self._bring(part) for part in parts)
            end(brought, time.perf_counter() - began)

        self._fetchers.submit(bring)

    def _bring(self, part: FetchPart) -> bool:
        try:
            if part.tier == HOST:
                return self._bring_from_host(part)
            return self._bring_from_store(part)
        except Exception:
            logger.exception("fetching a %s from tier %s failed; it is computed again", part.key.kind, part.tier)
            return False

    def _bring_from_store(self, part: FetchPart) -> bool:
        return self._stores[part.tier].get(part.key, self._views(self._device, part.key, part.frames))

    def _bring_from_host(self, part: FetchPart) -> bool:
        source = self._parts(self._host, part.key, part.host_frames)
        target = self._parts(self._device, part.key, part.frames)
        if self._sums[part.host_frames[0]] == (part.key, _copy(source, target)):
            return True
        self._tell_damage(part.key)
        return False

    def _tell_damage(self, key: ObjectKey) -> None:
        self._faults.report("damage", f"A {key.kind} in host memory does not match its checksum; it is computed again.")

    def _touch(self, keys: Sequence[ObjectKey]) -> None:
        for store in self._stores.values():
            if store.name != "remote":  # a round trip for each: its objects live by the time of their last fetch
                for key in keys:
                    store.touch(key)

    def _save_and_report(self, save: Save) -> None:
        done = Done(save.job, (self._save(save),))
        with self._lock:
            self._saved.append(done)
            self._saving -= 1
            if self._saving and len(self._saved) < _BATCH:
                return
            batch, self._saved = self._saved, []
        self._done.put(batch)

    def _put(self, save: Save) -> bool:
        memory = self._device if save.source == DEVICE else self._host
        return self._stores[save.tier].put(save.key, self._views(memory, save.key, save.frames))

    def _save(self, save: Save) -> bool:
        try:
            return self._put(save)
        except Exception:
            logger.exception("saving a %s to tier %s failed; it stays where it is", save.key.kind, save.tier)
            return False


class _Arrival:
    """A fetch under way: the last of its slices to end reports it. Slices may end in several threads."""

    def __init__(self, job: int, slices: int, done: queue.SimpleQueue[list[Done]]) -> None:
        self._job, self._missing, self._done = job, slices, done
        self._ok: dict[int, tuple[bool, ...]] = {}
        self._began = math.inf
        self._lock = threading.Lock()

    def end(self, index: int, ok: tuple[bool, ...], seconds: float) -> None:
        """Slice `index` has just ended; ok: which of its parts arrived; seconds: what that took."""
        now = time.perf_counter()
        with self._lock:
            self._ok[index] = ok
            self._began = min(self._began, now - seconds)
            self._missing -= 1
            if self._missing:
                return
        whole = sum((self._ok[at] for at in sorted(self._ok)), ())
        self._done.put([Done(self._job, whole, now - self._began)])


def not_superseded(demotions: Sequence[Demotion]) -> list[Demotion]:
    """Those that still lie on the host when the step begins: the host may have given some up for later ones."""
    out: list[Demotion] = []
    taken: set[int] = set()
    for demotion in reversed(demotions):
        if taken.isdisjoint(demotion.host_frames):
            out.append(demotion)
        taken.update(demotion.host_frames)
    return out


def _copy(source: Sequence[Bytes], target: Sequence[Bytes]) -> bytes:
    """Copy an object part by part and return the checksum of what arrived."""
    state = xxhash.xxh3_128()
    for one, other in zip(source, target, strict=True):
        np.copyto(other, one)
        state.update(other.data)  # at once: it is still in the processor's cache
    return state.digest()


def host_memory(frames: int, size: int) -> Bytes:
    """Memory for `frames` frames of `size` bytes, pinned where a GPU copies to and from it."""
    if frames and torch.cuda.is_available():
        try:
            return torch.empty((frames, size), dtype=torch.uint8, pin_memory=True).numpy()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            logger.warning("%d MiB of host memory cannot be pinned: %s", frames * size >> 20, reason)
    # numpy asks for huge pages, through which copies run a fifth faster (measured)
    return np.empty((frames, size), np.uint8)
