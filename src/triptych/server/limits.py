"""What one API key may ask for: requests and tokens per minute, and how many requests at once.

A rate is a bucket that holds one minute's worth and refills steadily. Tokens are spent when they are known, so a bucket
may go into debt, which the next request then has to wait for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from triptych.errors import RateLimited

_CONCURRENT_RETRY = 1.0  # seconds; nobody knows when one of the running requests will end


@dataclass(frozen=True, slots=True)
class Quota:
    """Limits of a key; None means none. Rates are per minute."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None


class _Bucket:
    """`per_minute` units that refill steadily; never more than a minute's worth."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._most = float(per_minute)
        self._rate = per_minute / 60.0
        self._clock = clock
        self._level = self._most
        self._at = clock()

    def lack(self, wanted: float) -> float:
        """Seconds until `wanted` units are there; 0 if they are."""
        now = self._clock()
        self._level = min(self._most, self._level + (now - self._at) * self._rate)
        self._at = now
        return max(0.0, (wanted - self._level) / self._rate)

    def spend(self, units: float) -> None:
        """Take `units`, into debt if need be."""
        self._level -= units


class Limits:
    """The running account of one key."""

    def __init__(self, quota: Quota, clock: Callable[[], float] = time.monotonic) -> None:
        self.running = 0
        self._quota = quota
        self._requests = _Bucket(quota.requests_per_minute, clock) if quota.requests_per_minute else None
        self._tokens = _Bucket(quota.tokens_per_minute, clock) if quota.tokens_per_minute else None

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count one request while it runs. RateLimited, naming the limit and when to come back, if it may not."""
        most = self._quota.concurrent
        if most is not None and self.running >= most:
            raise RateLimited(f"This API key may run {most} requests at once, and so many run.", _CONCURRENT_RETRY)
        if self._tokens is not None and (wait := self._tokens.lack(1.0)) > 0.0:
            raise RateLimited(f"This API key has used its {self._quota.tokens_per_minute} tokens per minute.", wait)
        if self._requests is not None:
            if (wait := self._requests.lack(1.0)) > 0.0:
                raise RateLimited(
                    f"This API key has used its {self._quota.requests_per_minute} requests per minute.", wait
                )
            self._requests.spend(1.0)
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    def spend(self, tokens: int) -> None:
        """Charge tokens of a prompt or of an answer."""
        if self._tokens is not None:
            self._tokens.spend(tokens)
