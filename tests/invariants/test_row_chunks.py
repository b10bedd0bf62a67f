"""Deterministic mode with the runner of a GPU: decode rows in buckets are, to the bit, the chunks that they were."""

from __future__ import annotations

import pytest
import torch
from small_engine import SmallEngine, alone, events_of, text

from triptych.engine.loop import TokenEvent
from triptych.words import SamplingParams

PROMPTS = [text(1, 1), text(2, 127), text(3, 129), text(4, 2300), text(3, 129) + text(5, 40), text(6, 6)]
PLAIN = SamplingParams(temperature=0.0, max_tokens=135, ignore_eos=True, logprobs=3)
DRAWN = SamplingParams(
    temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, max_tokens=40, ignore_eos=True, seed=7,
    repetition_penalty=1.2, logprobs=3,
)  # fmt: skip


def _bits(events: list[list[TokenEvent]]) -> list[list[tuple[int | None, object]]]:
    return [[(event.token_id, event.logprob) for event in some] for some in events]


@pytest.mark.parametrize("params", (PLAIN, DRAWN), ids=("greedy", "drawn"))
def test_rows_in_buckets_have_the_bits_of_chunks(params: SamplingParams) -> None:
    want = _bits(events_of(SmallEngine(), PROMPTS, params))
    engine = SmallEngine(overlap=True)
    assert _bits(events_of(engine, PROMPTS, params)) == want
    assert engine.loop._runner.steps.tables.device.any()  # type: ignore[attr-defined]  (decode rows went there)
    assert _bits(events_of(engine, PROMPTS, params)) == want  # resumed: what these rows wrote is read
    assert engine.loop.stats().cached_tokens > 0
    for prompt, answer in zip(PROMPTS, want, strict=True):
        [one] = events_of(SmallEngine(overlap=True), [prompt], params)
        assert _bits([one]) == [answer]


def test_rows_in_buckets_are_the_text_alone() -> None:
    """Entries that rows complete, one after the other, over whole pages."""
    prompt = text(9, 3)
    [events] = events_of(SmallEngine(overlap=True), [prompt], PLAIN)
    tokens = (*prompt, *(int(event.token_id) for event in events if event.token_id is not None))
    likely = alone(tokens[:-1])[len(prompt) - 1 :]
    logprobs = torch.log_softmax(likely.double(), 1)
    for row, event in zip(logprobs, events, strict=True):
        assert event.logprob is not None and event.token_id == int(row.argmax())
        assert event.logprob.logprob == pytest.approx(float(row[event.token_id]), abs=1e-9)
