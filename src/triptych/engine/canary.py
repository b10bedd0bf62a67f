"""The canary: resumed requests computed again from nothing, in idle time, and their logits compared.

A wrong window or a lost overlap shows only from the fourth token after a resume on, so what is compared is the last
row that a resumed request sampled from, not its first.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from triptych.words import Request, SamplingParams, TokenIds

logger = logging.getLogger(__name__)

PREFIX = "canary."
_PENDING = 8  # sampled requests that wait for idle time; older ones are forgotten first
_PARAMS = SamplingParams(max_tokens=1, temperature=0.0)


@dataclass(slots=True)
class Sighting:
    """A resumed request: its `tokens` up to the row whose `logits` [V] were sampled from, and where it resumed."""

    tokens: TokenIds
    salt: str
    resumed: int
    logits: Tensor


class Canary:
    """Chooses a `share` of resumed requests and judges them. `tolerance`: largest difference of any logit."""

    def __init__(self, share: float, tolerance: float) -> None:
        self.checked = 0
        self.failed = 0
        self.tokens = 0  # prompt tokens of the checks that were started
        self._share = share
        self._tolerance = tolerance
        self._credit = 0.0
        self._passed: set[str] = set()
        self._watched: dict[str, Sighting] = {}
        self._waiting: deque[Sighting] = deque(maxlen=_PENDING)
        self._running: tuple[str, Sighting] | None = None

    @property
    def running(self) -> str | None:
        """The name of the check that runs now."""
        return self._running[0] if self._running else None

    @property
    def waiting(self) -> bool:
        """True if something could be checked in idle time."""
        return bool(self._waiting) and self._running is None

    def saw(self, request_id: str, salt: str, tokens: TokenIds, resumed: int, logits: Tensor) -> None:
        """A request that resumed at token `resumed` sampled from `logits`, the row after `tokens`."""
        if self._running is not None and request_id == self._running[0]:
            return
        if request_id not in self._watched and (request_id in self._passed or not self._chosen(request_id)):
            return
        self._watched[request_id] = Sighting(tokens, salt, resumed, logits.clone())

    def _chosen(self, request_id: str) -> bool:
        self._credit += self._share
        if self._credit < 1.0:
            self._passed.add(request_id)
            return False
        self._credit -= 1.0
        return True

    def ended(self, request_id: str) -> None:
        """A request is over: what was seen of it can be checked. A check that ended unjudged is not tried again."""
        if request_id == self.running:
            self._running = None
            return
        self._passed.discard(request_id)
        sighting = self._watched.pop(request_id, None)
        if sighting is not None:
            self._waiting.append(sighting)

    def next(self) -> Request:
        """The next check as a request that shares nothing with anyone."""
        sighting = self._waiting.popleft()
        name = f"{PREFIX}{self.checked}"
        self._running = (name, sighting)
        self.tokens += len(sighting.tokens)
        return Request(name, np.asarray(sighting.tokens, np.int32), _PARAMS, salt=f"\0{name}")

    def judge(self, logits: Tensor) -> Sighting | None:
        """`logits` are those of the running check. If they differ, returns what must not be used any more.

        That is all of its tokens, not only those it resumed from: the pages that it computed itself follow from
        them, and would be found again, on a disk also after a restart, once the pages before them are good.
        """
        assert self._running is not None
        _, sighting = self._running
        self._running = None
        self.checked += 1
        difference = float((logits - sighting.logits).abs().max())
        if difference <= self._tolerance:  # NaN is a difference
            return None
        self.failed += 1
        logger.error(
            "canary: %d tokens resumed at %d give logits that differ by %.3g from computing them again; "
            "nothing that is cached of them is used any more",
            len(sighting.tokens),
            sighting.resumed,
            difference,
        )
        return replace(sighting, resumed=len(sighting.tokens))

    def forget(self) -> None:
        """What was seen came from weights that are no more. A running check must have been ended."""
        self._watched.clear()
        self._waiting.clear()
        self._running = None

    def give_up(self) -> None:
        """The running check was ended because work came."""
        if self._running is not None:
            self._waiting.append(self._running[1])
            self._running = None
