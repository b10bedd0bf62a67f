"""Carries out what cache/tiers.py decided: copies between device frames, host frames and stores.

Demotions run at once, in the caller's thread, because their frames are reused by the coming step. Fetches and saves
run in threads of their own; their frames belong to nobody else until `poll` has reported the job.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from triptych.cache.geometry import CacheGeometry
from triptych.cache.jobs import DEVICE, HOST, Demotion, Done, Fetch, FetchPart, Jobs, Save
from triptych.cache.store.protocol import ObjectKey, Store
from triptych.engine.pools import Pools

logger = logging.getLogger(__name__)

_SLICE = 64  # objects of one fetch that one thread brings; longer fetches are spread over the threads


class Mover:
    """Owns the host's frames and the threads. `host_frames` as large as the device's; `stores` by name."""

    def __init__(
        self,
        pools: Pools,
        geometry: CacheGeometry,
        host_frames: int = 0,
        stores: Sequence[Store] = (),
        threads: int = 2,
    ) -> None:
        self._device = pools.frames.view(torch.uint8).numpy()
        host = torch.empty(host_frames, pools.frames.shape[1], dtype=pools.frames.dtype)
        self._host = host.view(torch.uint8).numpy()
        self._sums: dict[ObjectKey, int] = {}
        self._geometry = geometry
        self._stores = {store.name: store for store in stores}
        self._threads = (
            ThreadPoolExecutor(threads, thread_name_prefix="triptych-mover") if host_frames or stores else None
        )
        self._done: queue.SimpleQueue[Done] = queue.SimpleQueue()
        self._under_way = 0

    @property
    def idle(self) -> bool:
        """True when no background copy is under way or waits to be reported."""
        return not self._under_way

    def run(self, jobs: Jobs) -> None:
        """Demote now; start the rest."""
        for demotion in jobs.demotions:
            self._demote(demotion)
        for fetch in jobs.fetches:
            self._start_fetch(fetch)
        for save in jobs.saves:
            self._under_way += 1
            self._submit(partial(self._save_and_report, save))

    def poll(self, timeout: float = 0.0) -> list[Done]:
        """Background jobs that have ended since the last call; waits up to `timeout` seconds for the first."""
        out: list[Done] = []
        while self._under_way:
            try:
                out.append(self._done.get(timeout=timeout) if timeout and not out else self._done.get_nowait())
            except queue.Empty:
                break
            self._under_way -= 1
        return out

    def close(self) -> None:
        """Wait for the copies under way, then close the stores."""
        if self._threads is not None:
            self._threads.shutdown()
        for store in self._stores.values():
            store.close()

    # ---- copies

    def _demote(self, demotion: Demotion) -> None:
        for source, target in zip(demotion.frames, demotion.host_frames, strict=True):
            self._host[target] = self._device[source]
        self._sums[demotion.key] = self._checksum(demotion.key, demotion.host_frames)

    def _checksum(self, key: ObjectKey, host_frames: Sequence[int]) -> int:
        total = 0
        for view in self._views(HOST, key, host_frames):
            total = zlib.crc32(view, total)
        return total

    def _views(self, source: str, key: ObjectKey, frames: Sequence[int]) -> list[memoryview]:
        """The bytes of an object in its frames; a snapshot leaves the end of each frame unused."""
        memory = self._device if source == DEVICE else self._host
        if key.kind == "page":
            return [memoryview(memory[frames[0]])]
        left, per_frame = self._geometry.snapshot_bytes, self._geometry.rows_per_frame * self._geometry.window_row_bytes
        views = []
        for frame in frames:
            views.append(memoryview(memory[frame])[: min(per_frame, left)])
            left -= len(views[-1])
        return views

    # ---- in the background

    def _start_fetch(self, fetch: Fetch) -> None:
        """Split a fetch over the threads; the last slice to end reports it."""
        slices = [fetch.parts[at : at + _SLICE] for at in range(0, len(fetch.parts), _SLICE)]
        results: dict[int, tuple[bool, ...]] = {}
        lock = threading.Lock()
        started = time.perf_counter()

        def bring(index: int) -> None:
            brought = tuple(self._bring(part) for part in slices[index])
            with lock:
                results[index] = brought
                last = len(results) == len(slices)
            if last:
                ok = tuple(fine for i in range(len(slices)) for fine in results[i])
                self._report(fetch.job, ok, time.perf_counter() - started)

        self._under_way += 1
        for index in range(len(slices)):
            self._submit(partial(bring, index))

    def _submit(self, work: Callable[[], None]) -> None:
        assert self._threads is not None
        self._threads.submit(work)

    def _report(self, job: int, ok: tuple[bool, ...], seconds: float) -> None:
        self._done.put(Done(job, ok, seconds))

    def _bring(self, part: FetchPart) -> bool:
        try:
            views = self._views(DEVICE, part.key, part.frames)
            if part.tier != HOST:
                return self._stores[part.tier].get(part.key, views)
            for source, target in zip(part.host_frames, part.frames, strict=True):
                self._device[target] = self._host[source]
            whole = 0
            for view in views:
                whole = zlib.crc32(view, whole)
            if whole != self._sums.get(part.key):
                logger.error("a %s on the host does not match its checksum; it is computed again", part.key.kind)
                return False
            return True
        except Exception:
            logger.exception("fetching a %s from tier %s failed; it is computed again", part.key.kind, part.tier)
            return False

    def _save_and_report(self, save: Save) -> None:
        self._report(save.job, (self._save(save),), 0.0)

    def _save(self, save: Save) -> bool:
        try:
            return self._stores[save.tier].put(save.key, self._views(save.source, save.key, save.frames))
        except Exception:
            logger.exception("saving a %s to tier %s failed; it stays where it is", save.key.kind, save.tier)
            return False
