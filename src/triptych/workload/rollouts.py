"""Generated RL rollouts: every question is sampled many times, all samples of a training step at once.

Sizes from the DeepSeek-R1 report (arXiv 2501.12948): 32 questions a step, 16 samples a question, at most 32,768 tokens.
Answers have 8K tokens on average, about where that report's grow to, with a heavy tail; the length of questions is not
published and assumed as for competition mathematics.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from triptych.workload.sessions import Part, SessionRequest
from triptych.workload.streams import lognormal


@dataclass(frozen=True, slots=True)
class RolloutTraffic:
    """Parameters. Lengths in tokens, times in seconds; `pause`: between the starts of two training steps."""

    questions: int = 32
    samples: int = 16
    system: int = 120
    question_median: float = 200.0
    question_sigma: float = 0.6
    question_most: int = 4_000
    answer_median: float = 6_700.0
    answer_sigma: float = 0.7
    answer_most: int = 32_768
    pause: float = 600.0


def rollout_requests(seed: int, traffic: RolloutTraffic | None = None) -> Iterator[SessionRequest]:
    """Requests of all training steps in order of time, without end; the same for the same seed."""
    given = traffic or RolloutTraffic()
    rng = random.Random(f"rollouts {seed}")
    system = Part("rollout-system", given.system, "system")
    step = 0
    while True:
        for question in range(given.questions):
            name = f"s{step}q{question}"
            length = lognormal(rng, given.question_median, given.question_sigma, 16, given.question_most)
            prompt = (system, Part(name, length, "user"))
            for sample in range(given.samples):
                answer = lognormal(rng, given.answer_median, given.answer_sigma, 16, given.answer_most)
                yield SessionRequest(
                    step * given.pause, f"{name}n{sample}", "", prompt, Part(f"{name}n{sample}o", answer)
                )
        step += 1
