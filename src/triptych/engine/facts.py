"""What an engine tells people who watch it: who runs and what could be resumed, never a word of a prompt.

Gathered in the engine thread between two steps, and only while somebody asks. Names that callers gave (sessions,
tenants' salts) leave as labels: hashes under a key that this process made up, so they can be told apart and no more.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from triptych.engine.canary import PREFIX
from triptych.words import Facts, Panels, RequestFacts

if TYPE_CHECKING:
    from triptych.cache.manager import CacheManager
    from triptych.config import CacheConfig
    from triptych.engine.loop import EngineLoop
    from triptych.schedule.sequence import Sequence

logger = logging.getLogger(__name__)

LISTED = 256
"""Requests that are listed at most; the others are counted."""

_KINDS = {"csa_main": "csa", "csa_index": "index", "hca": "hca"}


class Watch:
    """Gathers facts about one engine. `born(request_id)` is when a request came, by time.monotonic, if known."""

    def __init__(self, loop: EngineLoop, born: Callable[[str], float | None]) -> None:
        self._loop = loop
        self._born = born
        self._key = os.urandom(16)

    def label(self, name: str) -> str:
        """A short name for `name` that says nothing of it."""
        return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), key=self._key, digest_size=4).hexdigest()

    def gather(self) -> Facts:
        """Facts as of now. Call it in the thread that steps; it never raises, for a look must not end a request."""
        try:
            return self._gather()
        except Exception:
            logger.exception("facts for the dashboard could not be gathered")
            return Facts()

    def _gather(self) -> Facts:
        begin, now = time.perf_counter(), time.monotonic()
        cache = self._loop.cache
        requests: list[RequestFacts] = []
        running = waiting = 0
        for sequence in self._loop.scheduler.sequences():
            if sequence.request_id.startswith(PREFIX):
                continue  # a check of the canary is nobody's request
            running, waiting = running + sequence.running, waiting + (not sequence.running)
            if len(requests) < LISTED:
                requests.append(self._request(sequence, cache, now))
        sessions = cache.sessions.look(cache, self.label)
        seconds = time.perf_counter() - begin
        return Facts(tuple(requests), sessions, running, waiting, len(cache.sessions), seconds)

    def _request(self, sequence: Sequence, cache: CacheManager, now: float) -> RequestFacts:
        request, usage = sequence.request, sequence.usage()
        if sequence.running:
            state = "decode" if sequence.prefilled else "prefill"
        elif cache.prefetcher.fetching(sequence.request_id):
            state = "fetching"
        else:
            state = "held" if cache.inflight.held(sequence.request_id) else "waiting"
        born, hint = self._born(sequence.request_id), request.hints.session
        return RequestFacts(
            request_id=sequence.request_id,
            state=state,
            prompt_tokens=sequence.prompt,
            processed=sequence.processed,
            generated=sequence.generated,
            limit=sequence.limit,
            cached_tokens=usage.cached_tokens,
            recomputed_tokens=usage.recomputed_tokens,
            resume=usage.resume if sequence.admissions else "",
            preempted=max(0, sequence.admissions - sequence.running),
            tenant=self.label(request.salt) if request.salt else "",
            session=self.label(hint) if hint is not None else "",
            seconds=None if born is None else now - born,
        )


def panels(cache: CacheManager, config: CacheConfig) -> Panels:
    """The sizes of what `cache` keeps and the room of its tiers."""
    geometry, capacity = cache.geometry, cache.capacity
    page = dict.fromkeys(_KINDS.values(), 0)
    for segment in geometry.segments:
        page[_KINDS[segment.kind]] += segment.bytes
    page["padding"] = geometry.page_bytes - sum(page.values())
    room = {"device": capacity.bytes(geometry)}
    if cache.tiers.host is not None:
        room["host"] = cache.tiers.host.frames * geometry.page_bytes
    for name in cache.tiers.stores:
        room[name] = config.disk_memory if name == "disk" else 0
    return Panels(page, geometry.snapshot_bytes, geometry.slot_bytes, room)
