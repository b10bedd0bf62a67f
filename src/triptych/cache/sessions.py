"""Which conversations could be resumed, for people who watch: remembered when a request ends, looked at when asked.

    keys of its pages   |==== on the device ====|== host ==|= disk =|....... gone .......|
                                                        ^ the deepest boundary with a snapshot

A long conversation has thousands of pages, and whoever looks does so between two steps. So where a stretch ends is
found by bisection: exactly on the device, where parents outlive children; below it that is nearly always so.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from triptych.cache.holding import Holding
from triptych.cache.jobs import DEVICE
from triptych.cache.prefix import Branch
from triptych.cache.store.protocol import ObjectKey
from triptych.config import PAGE
from triptych.words import SessionFacts

if TYPE_CHECKING:
    from triptych.cache.manager import CacheManager

_STRETCHES = 8  # changes of tier that are followed along one conversation


@dataclass(eq=False, slots=True)
class Session:
    """The pages of one conversation as it last ended. `anchor`: the last page of its prompt. `title` stays when it is
    continued."""

    keys: list[bytes]
    anchor: bytes
    title: str
    name: tuple[str, str] | None
    branch: Branch
    facts: SessionFacts | None = None
    looked: float = 0.0


class Sessions:
    """The last `limit` conversations, of `pages` pages together. Those that were continued count once."""

    def __init__(self, limit: int = 128, pages: int = 1 << 17) -> None:
        self._limit = limit
        self._room = pages
        self._sessions: OrderedDict[Session, None] = OrderedDict()
        self._index: dict[bytes, Session] = {}  # by the last page, and by the last of the prompt
        self._names: dict[tuple[str, str], Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def ended(self, holding: Holding) -> None:
        """A request ended that holds at least one sealed page: it is a conversation, or continues one."""
        keys = holding.keys[: len(holding.chain)]
        prompt = min(len(keys), max(1, holding.plan.length // PAGE))
        hint, salt = holding.hints.session, holding.branch.tenant.salt
        name = (salt, hint) if hint is not None else None
        older = self._names.get(name) if name is not None else None
        if older is None:
            older = next((self._index[key] for key in reversed(keys) if key in self._index), None)
        if older is not None:
            self._forget(older)
        title = hint or (older.title if older is not None else keys[-1].hex())
        new = Session(keys, keys[prompt - 1], title, name, holding.branch)
        self._sessions[new] = None
        self._index[keys[-1]] = self._index[new.anchor] = new
        if name is not None:
            self._names[name] = new
        self._room -= len(keys)
        while len(self._sessions) > self._limit or (self._room < 0 and len(self._sessions) > 1):
            self._forget(next(iter(self._sessions)))

    def _forget(self, session: Session) -> None:
        self._room += len(session.keys)
        del self._sessions[session]
        for key in (session.keys[-1], session.anchor):
            if self._index.get(key) is session:
                del self._index[key]
        if session.name is not None and self._names.get(session.name) is session:
            del self._names[session.name]

    def clear(self) -> None:
        """Nothing that was cached is served any more."""
        while self._sessions:
            self._forget(next(iter(self._sessions)))

    def look(
        self, manager: CacheManager, label: Callable[[str], str], *, most: int = 64, budget: float = 1e-3
    ) -> tuple[SessionFacts, ...]:
        """The newest `most`, newest first. After `budget` seconds the rest is told as it was when last looked at."""
        shown = [session for session, _ in zip(reversed(self._sessions), range(most), strict=False)]
        pins, now = manager.leases.pinned_until, manager.clock()
        deadline = time.perf_counter() + budget
        for session in sorted(shown, key=lambda one: one.looked):
            session.facts = _facts(session, manager, label, pins, now)
            session.looked = now
            if time.perf_counter() > deadline:
                break
        return tuple(session.facts for session in shown if session.facts is not None)


def _facts(
    session: Session, manager: CacheManager, label: Callable[[str], str], pins: dict[bytes, float], now: float
) -> SessionFacts:
    branch = session.branch
    by_tier, reach = _where(session.keys, manager)
    rebuild = int(manager.planner.rebuild_tokens(reach * PAGE))
    boundary, tier = _boundary(session.keys, reach, rebuild, manager)
    until = pins.get(session.keys[-1])
    return SessionFacts(
        session=label(session.title),
        tenant=label(branch.tenant.salt) if branch.tenant.salt else "",
        turns=branch.turn + 1,
        tokens=len(session.keys) * PAGE,
        by_tier=by_tier,
        resumes_at=boundary,
        resumes_from=tier,
        rebuild=reach * PAGE - boundary if boundary else rebuild,
        idle=now - branch.used,
        ttl=None if branch.ttl is None else max(0.0, branch.used + branch.ttl - now),
        pin=None if until is None else max(0.0, until - now),
        expired=branch.expired,
    )


def _where(keys: list[bytes], manager: CacheManager) -> tuple[dict[str, int], int]:
    """Tokens by tier of the unbroken beginning of `keys`, and its length in pages."""
    nodes, tiers, count = manager.memory.tree.nodes, manager.tiers, len(keys)
    at = bisect_left(range(count), True, key=lambda index: keys[index] not in nodes)
    by_tier = {DEVICE: at * PAGE} if at else {}
    for _ in range(_STRETCHES if tiers.enabled else 0):
        tier = tiers.where(ObjectKey("page", keys[at])) if at < count else None
        if tier is None:
            break
        end = bisect_left(
            range(count),
            True,
            lo=at + 1,
            key=lambda index, tier=tier: tiers.where(ObjectKey("page", keys[index])) != tier,  # type: ignore[misc]
        )
        by_tier[tier] = by_tier.get(tier, 0) + (end - at) * PAGE
        at = end
    return by_tier, at


def _boundary(keys: list[bytes], reach: int, rebuild: int, manager: CacheManager) -> tuple[int, str]:
    """The deepest boundary with a snapshot, in tokens, and its tier. Further back than `rebuild` tokens none pays."""
    nodes, tiers = manager.memory.tree.nodes, manager.tiers
    for depth in range(reach, max(0, reach - rebuild // PAGE - 1), -1):
        node = nodes.get(keys[depth - 1])
        if node is not None and node.snapshot is not None:
            return depth * PAGE, DEVICE
        tier = tiers.where(ObjectKey("snapshot", keys[depth - 1])) if tiers.enabled else None
        if tier is not None:
            return depth * PAGE, tier
    return 0, ""
