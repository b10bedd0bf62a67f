"""Generated agent traffic: sessions of coding agents with the published statistics of such work.

Calibrated on UW TraceLab (4,265 sessions: 9.2 requests a session, 8.7 steps a request, mean append 6.55K tokens with a
heavy tail, mean output 523) and on SemiAnalysis' traces of Claude Code (initial prompt about 16K tokens: 12.4K of tools
and 3 to 4K of system prompt, shared among users). People pause between requests, often for longer than a cache lasts;
some requests send out a subagent, which begins again from the shared prompt.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from triptych.workload.sessions import Part, SessionRequest, SessionTrace
from triptych.workload.streams import geometric


@dataclass(frozen=True, slots=True)
class AgentTraffic:
    """Parameters. Lengths in tokens, times in seconds; `context` is where an agent starts over with a summary."""

    users: int = 43
    requests: float = 9.2
    steps: float = 8.7
    tools: int = 12_400
    systems: int = 5
    system: tuple[int, int] = (3_000, 4_000)
    append_median: float = 1_900.0
    append_sigma: float = 1.738  # lognormal, cut at append_most: the mean is 6.55K
    append_most: int = 60_000
    output: float = 523.0
    step_pause: float = 6.0
    human_median: float = 180.0
    human_sigma: float = 1.6  # lognormal: a tenth of the pauses exceed 23 minutes
    subagents: float = 0.08
    context: int = 400_000


def agent_trace(requests: int, seed: int = 0, traffic: AgentTraffic | None = None) -> SessionTrace:
    """The first `requests` requests of all users' sessions, in order of time; the same for the same seed."""
    return SessionTrace(f"agents-{seed}", list(islice(agent_requests(seed, traffic), requests)))


def agent_requests(seed: int, traffic: AgentTraffic | None = None) -> Iterator[SessionRequest]:
    """Requests of all users' sessions in order of time, without end; the same for the same seed."""
    given = traffic or AgentTraffic()
    rng = random.Random(seed)
    users = [_user(given, number, random.Random(rng.random())) for number in range(given.users)]
    return heapq.merge(*users, key=lambda request: request.time)


def _user(traffic: AgentTraffic, number: int, rng: random.Random) -> Iterator[SessionRequest]:
    """One user's sessions, one after the other, for ever."""
    time = rng.uniform(0, 2 * traffic.human_median)
    serial = 0
    while True:
        for request in _session(traffic, f"u{number}s{serial}", rng, time):
            time = request.time
            yield request
        serial += 1
        time += rng.lognormvariate(0, traffic.human_sigma) * traffic.human_median


def _session(traffic: AgentTraffic, name: str, rng: random.Random, time: float) -> Iterator[SessionRequest]:
    """Requests of a person, each worked on in several steps; the context grows from step to step."""
    variant = rng.randrange(traffic.systems)
    low, high = traffic.system
    begin = [
        Part("tools", traffic.tools, "tools"),
        Part(f"system{variant}", low + (high - low) * variant // traffic.systems, "system"),
    ]
    context = list(begin)
    serial = 0
    for turn in range(geometric(rng, traffic.requests)):
        if turn:
            time += rng.lognormvariate(0, traffic.human_sigma) * traffic.human_median
        kind = "user"
        for _ in range(geometric(rng, traffic.steps)):
            serial += 1
            append = round(rng.lognormvariate(0, traffic.append_sigma) * traffic.append_median)
            append = min(traffic.append_most, max(16, append))
            if sum(part.tokens for part in context) + append > traffic.context:
                context = [*begin, Part(f"{name}c{serial}", 4_000, "user")]
            context.append(Part(f"{name}i{serial}", append, kind))
            output = Part(f"{name}o{serial}", max(1, round(rng.expovariate(1 / traffic.output))))
            yield SessionRequest(time, name, "", tuple(context), output)
            context.append(output)
            kind = "tool"
            time += rng.expovariate(1 / traffic.step_pause) + output.tokens / 80
        if rng.random() < traffic.subagents:
            task = Part(f"{name}t{turn}", 600, "user")
            answer = Part(f"{name}r{turn}", round(traffic.output))
            yield SessionRequest(time, f"{name}a{turn}", "", (*begin, task), answer)
            time += traffic.step_pause
