"""What the scheduler tells about itself, as one value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Running totals of one scheduler; only the scheduler changes them."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    generated_tokens: int = 0
    prefill_rows: int = 0
    preemptions: int = 0
    rerun_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ScheduleStats:
    """Requests now, and totals since start.

    Prompt totals count a request once, at its first admission. `prefill_rows` are rows that ran before
    a request's first token; `rerun_tokens` were run again because their request had been preempted.
    """

    running: int
    waiting: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    recomputed_tokens: int
    generated_tokens: int
    prefill_rows: int
    preemptions: int
    rerun_tokens: int
