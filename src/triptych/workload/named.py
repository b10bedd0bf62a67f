"""Workloads by name, and when their sessions arrive.

Names: chat, coding-agent (also: agents), research-agent, rl-rollout, mixed. All are deterministic by seed, and what
they generate is a session trace like any from a file.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from triptych.errors import ConfigError, nearest
from triptych.workload.agents import agent_requests
from triptych.workload.chat import ChatTraffic, chat_requests
from triptych.workload.research import ResearchTraffic, research_requests
from triptych.workload.rollouts import rollout_requests
from triptych.workload.sessions import SessionRequest, SessionTrace

_MIXED_CHAT = ChatTraffic(rate=0.32)
_MIXED_RESEARCH = ResearchTraffic(rate=0.06)
"""Sessions a second at which chat and research bring as many requests as the coding agents do, one in two seconds."""


def mixed_requests(seed: int) -> Iterator[SessionRequest]:
    """Chat, coding and research agents at once, with as many requests of each.

    No published mix is known: equal shares are a choice.
    """
    streams = chat_requests(seed, _MIXED_CHAT), agent_requests(seed), research_requests(seed, _MIXED_RESEARCH)
    return heapq.merge(*streams, key=lambda request: request.time)


WORKLOADS: dict[str, Callable[[int], Iterator[SessionRequest]]] = {
    "chat": chat_requests,
    "coding-agent": agent_requests,
    "agents": agent_requests,
    "research-agent": research_requests,
    "rl-rollout": rollout_requests,
    "mixed": mixed_requests,
}


def workload(name: str, requests: int, seed: int = 0, arrivals: str = "trace") -> SessionTrace:
    """The first `requests` requests of the workload `name`. ConfigError names the nearest.

    `arrivals`: "trace" keeps the generator's times; "poisson:RATE" and "closed:USERS" are those of `retimed`.
    """
    if name not in WORKLOADS:
        raise ConfigError(f"There is no workload {name!r}.", nearest(name, WORKLOADS))
    found = list(islice(WORKLOADS[name](seed), requests))
    return SessionTrace(f"{name}-{seed}", retimed(found, arrivals, seed))


def retimed(requests: Sequence[SessionRequest], arrivals: str, seed: int = 0) -> list[SessionRequest]:
    """The same requests with other starts of sessions; the pauses inside a session stay. ConfigError for a wrong name.

    trace          as they are
    poisson:RATE   RATE sessions begin per second, independently
    closed:USERS   USERS people, each of whom begins a session when the one before has ended
    """
    kind, _, text = arrivals.partition(":")
    if arrivals == "trace":
        return list(requests)
    if kind not in ("poisson", "closed"):
        raise ConfigError(f"--arrivals {arrivals!r} is not known.", nearest(kind, ("trace", "poisson", "closed")))
    amount = _amount(text, arrivals, whole=kind == "closed")
    sessions: dict[str, list[SessionRequest]] = {}
    for request in requests:
        sessions.setdefault(request.session, []).append(request)
    starts = _poisson(amount, seed) if kind == "poisson" else None
    users = [0.0] * min(int(amount), len(sessions)) if kind == "closed" else []
    moved: list[SessionRequest] = []
    for session in sessions.values():
        begin = session[0].time
        start = next(starts) if starts is not None else heapq.heappop(users)
        moved += [replace(request, time=start + (request.time - begin)) for request in session]
        if starts is None:
            heapq.heappush(users, moved[-1].time)
    return sorted(moved, key=lambda request: request.time)


def users(arrivals: str) -> int:
    """How many sessions run at once, 0 for an open loop."""
    kind, _, amount = arrivals.partition(":")
    return int(float(amount)) if kind == "closed" else 0


def _amount(text: str, arrivals: str, whole: bool) -> float:
    try:
        amount = float(text)
    except ValueError:
        amount = 0.0
    if not 0 < amount < 1e9 or (whole and amount != int(amount)):
        known = "closed:USERS with a number of people" if whole else "poisson:RATE with sessions per second"
        raise ConfigError(f"--arrivals {arrivals!r} has no usable number.", f"Write it as {known}.")
    return amount


def _poisson(rate: float, seed: int) -> Iterator[float]:
    rng, time = random.Random(f"arrivals {seed}"), 0.0
    while True:
        time += rng.expovariate(rate)
        yield time
