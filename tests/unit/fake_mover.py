"""Copies between tiers for the model without numbers, late, in any order, and with faults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fake_model import FakeModel

from triptych.cache.jobs import DEVICE, Done, Fetch, FetchPart, Jobs, Save
from triptych.cache.store.protocol import ObjectKey, StoreStats

Choose = Callable[[Sequence[Any]], Any]


class FakeStore:
    """Contents by key. It forgets when told, and refuses when full."""

    def __init__(self, name: str, limit: int = 10**9) -> None:
        self.name = name
        self.limit = limit
        self.contents: dict[ObjectKey, Any] = {}

    def __contains__(self, key: object) -> bool:
        return key in self.contents

    def discard(self, key: ObjectKey) -> None:
        self.contents.pop(key, None)

    def touch(self, key: ObjectKey) -> None: ...

    def close(self) -> None: ...

    def put(self, key: ObjectKey, payload: Any) -> bool:
        if len(self.contents) >= self.limit:
            return False
        self.contents[key] = payload
        return True

    def get(self, key: ObjectKey, into: Any) -> bool:
        raise NotImplementedError

    def stats(self) -> StoreStats:
        return StoreStats()


class FakeMover:
    """Demotes at once; fetches and saves end when `some_end` says so."""

    def __init__(self, model: FakeModel, stores: Sequence[FakeStore]) -> None:
        self.model = model
        self.stores = {store.name: store for store in stores}
        self.host: dict[tuple[int, ...], Any] = {}
        self.pending: list[Fetch | tuple[Save, Any]] = []

    def run(self, jobs: Jobs) -> None:
        """Begin everything. What is being fetched is poisoned: whoever looks too early must notice."""
        for demotion in jobs.demotions:
            for held in [held for held in self.host if set(held) & set(demotion.host_frames)]:
                del self.host[held]
            self.host[demotion.host_frames] = self.model.content(demotion.key.kind, demotion.frames)
        for fetch in jobs.fetches:
            for part in fetch.parts:
                self.model.poison(list(part.frames))
            self.pending.append(fetch)
        for save in jobs.saves:
            self.pending.append((save, self._source(save)))

    def _source(self, save: Save) -> Any:
        if save.source == DEVICE:
            return self.model.content(save.key.kind, save.frames)
        return self.host[save.frames]

    def some_end(self, choose: Choose, faults: Sequence[bool]) -> list[Done]:
        """Some of what is under way has ended by now, well or not."""
        ended = []
        for job in list(self.pending):
            if choose([True, True, False]):
                self.pending.remove(job)
                ended.append(self._end(job, lambda: bool(choose(faults))))
        return ended

    def _end(self, job: Fetch | tuple[Save, Any], fault: Callable[[], bool]) -> Done:
        if isinstance(job, Fetch):
            return Done(job.job, tuple(self._bring(part, fault()) for part in job.parts))
        save, content = job
        assert self._source(save) == content, f"{save} changed while it was being saved"
        ok = not fault() and self.stores[save.tier].put(save.key, content)
        return Done(save.job, (ok,))

    def _bring(self, part: FetchPart, fault: bool) -> bool:
        if fault:
            return False
        if part.host_frames:
            content = self.host[part.host_frames]
        else:
            content = self.stores[part.tier].contents.get(part.key)
            if content is None:
                return False
        self.model.place(part.key.kind, part.frames, content)
        return True
