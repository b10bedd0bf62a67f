"""Generated chat: conversations of a few turns, most of their length in the first message.

Calibrated on Mooncake's conversation trace (FAST'25 release, 12,031 requests in an hour, statistics computed from the
file): 12,035 tokens a prompt on average and 6,909 in the median, 343 tokens out, 38.7 % of the requests find more
than the shared beginning, and what comes back does so after a lognormal pause: 18 % within one minute, 93 % within
ten. Later messages are as long as those of WildChat (296 tokens, arXiv 2405.01470).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from triptych.workload.sessions import Part, SessionRequest
from triptych.workload.streams import geometric, lognormal, merged, poisson_starts


@dataclass(frozen=True, slots=True)
class ChatTraffic:
    """Parameters. Lengths in tokens, times in seconds; `rate`: conversations that begin per second."""

    rate: float = 2.1  # 3.4 requests a second in turns of 1.63
    turns: float = 1.63  # 1 / (1 - 0.387)
    systems: int = 8
    system: int = 600  # the median hit is one block of 512: what everybody shares
    first_median: float = 5_800.0
    first_sigma: float = 1.17
    first_most: int = 120_000
    message: float = 296.0
    output: float = 343.0
    output_sigma: float = 0.5
    output_most: int = 2_000
    pause_median: float = 147.0
    pause_sigma: float = 0.97


def chat_requests(seed: int, traffic: ChatTraffic | None = None) -> Iterator[SessionRequest]:
    """Requests of all conversations in order of time, without end; the same for the same seed."""
    given = traffic or ChatTraffic()
    rng = random.Random(f"chat {seed}")
    return merged(
        (time, _conversation(given, f"c{number}", random.Random(rng.random()), time))
        for number, time in enumerate(poisson_starts(rng, given.rate))
    )


def _conversation(given: ChatTraffic, name: str, rng: random.Random, time: float) -> Iterator[SessionRequest]:
    context = [Part(f"chat-system{rng.randrange(given.systems)}", given.system, "system")]
    first = lognormal(rng, given.first_median, given.first_sigma, 16, given.first_most)
    for turn in range(geometric(rng, given.turns)):
        if turn:
            time += rng.lognormvariate(0, given.pause_sigma) * given.pause_median
        length = first if not turn else max(4, round(rng.expovariate(1 / given.message)))
        context.append(Part(f"{name}u{turn}", length, "user"))
        median = given.output / math.exp(given.output_sigma**2 / 2)  # so that the mean is `output`
        output = Part(f"{name}o{turn}", lognormal(rng, median, given.output_sigma, 1, given.output_most))
        yield SessionRequest(time, name, "", tuple(context), output)
        context.append(output)
