"""What generators share: draws of lengths, starts of sessions, and merging endless sessions by time."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Iterator

from triptych.workload.sessions import SessionRequest


def geometric(rng: random.Random, mean: float) -> int:
    """1, 2, ... with this mean."""
    count = 1
    while rng.random() > 1 / mean:
        count += 1
    return count


def lognormal(rng: random.Random, median: float, sigma: float, least: int, most: int) -> int:
    """A whole number around `median`, cut at `least` and `most`."""
    return min(most, max(least, round(rng.lognormvariate(0, sigma) * median)))


def poisson_starts(rng: random.Random, rate: float) -> Iterator[float]:
    """Times in seconds at which sessions begin, `rate` of them per second."""
    time = 0.0
    while True:
        time += rng.expovariate(rate)
        yield time


def merged(sessions: Iterable[tuple[float, Iterator[SessionRequest]]]) -> Iterator[SessionRequest]:
    """The requests of sessions (start, requests), which come in order of start, in order of time."""
    running: list[tuple[float, int, SessionRequest, Iterator[SessionRequest]]] = []

    def advance(number: int, session: Iterator[SessionRequest]) -> None:
        request = next(session, None)
        if request is not None:
            heapq.heappush(running, (request.time, number, request, session))

    for number, (start, session) in enumerate(sessions):
        while running and running[0][0] <= start:
            _, other, request, rest = heapq.heappop(running)
            yield request
            advance(other, rest)
        advance(number, session)
    while running:
        _, other, request, rest = heapq.heappop(running)
        yield request
        advance(other, rest)
