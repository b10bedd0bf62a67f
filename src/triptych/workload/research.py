"""Generated research agents: few sessions, each of which reads page after page into a very long context.

Calibrated on published figures: 55K tokens of context in the median, 280K at the 90th percentile and 504K at most
(V4-Flash agents in production, vLLM issue 45350); nine tenths of search sessions have at most ten steps, 89 % of the
pauses between steps are under a minute (14.4 M searches, arXiv 2601.17617); 523 tokens out a step (UW TraceLab). Not
published, so assumed: tools and system prompt of 6K tokens, reports of 2K, follow-up questions after some minutes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from triptych.workload.sessions import Part, SessionRequest
from triptych.workload.streams import geometric, lognormal, merged, poisson_starts


@dataclass(frozen=True, slots=True)
class ResearchTraffic:
    """Parameters. Lengths in tokens, times in seconds; `rate`: sessions that begin per second."""

    rate: float = 0.02
    questions: float = 2.0
    steps: float = 4.9  # geometric: 90 % have at most ten
    tools: int = 4_500
    system: int = 1_500
    question: float = 300.0
    page_median: float = 3_200.0
    page_sigma: float = 1.9
    page_most: int = 200_000
    output: float = 523.0
    report: int = 2_000
    step_pause: float = 27.0  # exponential: 89 % are under a minute
    human_median: float = 240.0
    human_sigma: float = 1.2
    context: int = 500_000


def research_requests(seed: int, traffic: ResearchTraffic | None = None) -> Iterator[SessionRequest]:
    """Requests of all sessions in order of time, without end; the same for the same seed."""
    given = traffic or ResearchTraffic()
    rng = random.Random(f"research {seed}")
    return merged(
        (time, _session(given, f"r{number}", random.Random(rng.random()), time))
        for number, time in enumerate(poisson_starts(rng, given.rate))
    )


def _session(given: ResearchTraffic, name: str, rng: random.Random, time: float) -> Iterator[SessionRequest]:
    context = [Part("research-tools", given.tools, "tools"), Part("research-system", given.system, "system")]
    length = given.tools + given.system
    for question in range(geometric(rng, given.questions)):
        if question:
            time += rng.lognormvariate(0, given.human_sigma) * given.human_median
        added = Part(f"{name}q{question}", max(8, round(rng.expovariate(1 / given.question))), "user")
        steps = geometric(rng, given.steps)
        for step in range(steps):
            tokens = given.report if step == steps - 1 else max(1, round(rng.expovariate(1 / given.output)))
            if length + added.tokens + tokens > given.context:
                return  # the context is full: whoever goes on begins anew
            context.append(added)
            output = Part(f"{name}o{question}.{step}", tokens)
            yield SessionRequest(time, name, "", tuple(context), output)
            context.append(output)
            length += added.tokens + tokens
            page = lognormal(rng, given.page_median, given.page_sigma, 200, given.page_most)
            added = Part(f"{name}p{question}.{step}", page, "tool")
            time += rng.expovariate(1 / given.step_pause) + tokens / 80
