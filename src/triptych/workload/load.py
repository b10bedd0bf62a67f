"""The load driver: sends the requests of a trace when they are due, whatever the answering side does.

    intended        sent                 first token                          last token
    |---- late -----|                    |                                    |
    |------------- time to first token --|---- between tokens ----------------|
    |------------- end to end ------------------------------------------------|

Latencies count from the *intended* time, so that a server that stalls is charged for everyone who had to wait (no
coordinated omission). A session's next request is due at its time in the trace, or when its predecessor has ended,
whichever is later: nobody answers what has not been said. In a closed loop it is due a pause after that end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from triptych.workload.clients import AnswerError, Client, Counts
from triptych.workload.sessions import Part, SessionRequest
from triptych.workload.texts import Texts


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """`speed`: the trace runs so many times faster. `closed`: pauses count from the end of the answer before, and so
    many sessions run at once; 0 is an open loop. `clock`: "wall", or "cpu", the processor time of this process, for an
    engine in it on a machine that others use too; it stands still while nothing runs, so pauses mean nothing.
    """

    speed: float = 1.0
    closed: int = 0
    clock: Literal["wall", "cpu"] = "wall"


@dataclass(slots=True)
class Timing:
    """One request, in seconds since the start. `arrivals`: when pieces came, and tokens in each.

    `prompt` names what was asked: requests with the same one are samples of one prompt.
    """

    session: str
    intended: float
    sent: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    end: float = 0.0
    counts: Counts = field(default_factory=Counts)
    error: str | None = None
    prompt: str = ""

    @property
    def first(self) -> float:
        """Seconds from the intended time to the first token."""
        return self.arrivals[0][0] - self.intended if self.arrivals else float("nan")

    @property
    def total(self) -> float:
        """Seconds from the intended time to the end."""
        return self.end - self.intended

    @property
    def per_token(self) -> float:
        """Mean seconds between output tokens; NaN with fewer than two."""
        tokens = max(self.counts.output, sum(count for _, count in self.arrivals))
        if tokens < 2 or not self.arrivals:
            return float("nan")
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / (tokens - 1)


class Load:
    """One run of one list of requests against one client."""

    def __init__(self, client: Client, texts: Texts, settings: LoadSettings) -> None:
        self._client, self._texts, self._settings = client, texts, settings
        self._said: dict[str, Any] = {}  # output part -> what was really answered
        self._made: dict[str, Any] = {}  # part -> its text: later turns repeat it
        self._clock = time.process_time if settings.clock == "cpu" else time.perf_counter
        self._begun = 0.0

    async def run(
        self, requests: Sequence[SessionRequest], on_done: Callable[[Timing], None] = lambda timing: None
    ) -> list[Timing]:
        """Send all; returns their timings in order of intended time.

        `on_done` gets each as it ends: whoever cancels this has no others.
        """
        sessions: dict[str, list[SessionRequest]] = {}
        for request in requests:
            sessions.setdefault(f"{request.tenant}/{request.session}", []).append(request)
        gate = asyncio.Semaphore(self._settings.closed or len(sessions) or 1)
        self._texts.prepare()
        self._begun = self._clock()
        found = await asyncio.gather(*(self._session(one, gate, on_done) for one in sessions.values()))
        return sorted((timing for one in found for timing in one), key=lambda timing: timing.intended)

    def _now(self) -> float:
        return self._clock() - self._begun

    async def _session(
        self, requests: list[SessionRequest], gate: asyncio.Semaphore, on_done: Callable[[Timing], None]
    ) -> list[Timing]:
        found: list[Timing] = []
        async with gate:
            before, ended = requests[0].time, self._now()
            for request in requests:
                intended = request.time / self._settings.speed
                if self._settings.closed:
                    intended = ended + (request.time - before) / self._settings.speed
                intended = max(intended, ended) if found or self._settings.closed else intended
                timing = await self._request(request, intended)
                found.append(timing)
                on_done(timing)
                before, ended = request.time, self._now()
                if timing.error is not None:
                    break  # the rest of the conversation would rest on an answer that never came
        return found

    async def _request(self, request: SessionRequest, intended: float) -> Timing:
        timing = Timing(request.session, intended, prompt=prompt_of(request))
        contents = [self._content(part) for part in request.prompt]
        await asyncio.sleep(max(0.0, intended - self._now()))
        timing.sent = self._now()
        said = []
        try:
            async for piece in self._client.ask(contents, max(1, request.output.tokens), request.session):
                if piece.content is not None:
                    timing.arrivals.append((self._now(), piece.tokens))
                    said.append(piece.content)
                timing.counts = piece.counts or timing.counts
        except AnswerError as error:
            timing.error = str(error)
        timing.end = self._now()
        self._said[request.output.id] = said
        return timing

    def _content(self, part: Part) -> Any:
        """What was really answered, where a prompt repeats an output; text for everything else."""
        said = self._said.get(part.id) if part.kind == "output" else None
        if said:
            return "".join(said) if isinstance(said[0], str) else np.concatenate(said)
        if part.id not in self._made:
            self._made[part.id] = self._client.content(self._texts.ids(part))
        return self._made[part.id]


def prompt_of(request: SessionRequest) -> str:
    """A name for the whole prompt of a request."""
    return "\n".join(f"{request.tenant}/{part.id}" for part in request.prompt)


def are_rollouts(prompts: Sequence[str]) -> bool:
    """Whether prompts, by name, are sampled twice or more on average, as those of RL training are."""
    return len(prompts) >= 2 * len(set(prompts)) > 0


def temperature_of(requests: Sequence[SessionRequest]) -> float:
    """1 for rollouts, as samples of one prompt must differ; everything else is greedy."""
    return 1.0 if are_rollouts([prompt_of(request) for request in requests]) else 0.0


def scaled(requests: Sequence[SessionRequest], scale: float) -> list[SessionRequest]:
    """The same requests with every length multiplied by `scale`, at least one token: for small machines and models."""
    if scale == 1.0:
        return list(requests)

    def smaller(part: Part) -> Part:
        return replace(part, tokens=max(1, round(part.tokens * scale)))

    return [
        replace(request, prompt=tuple(map(smaller, request.prompt)), output=smaller(request.output))
        for request in requests
    ]
