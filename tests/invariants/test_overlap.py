"""A step is planned while the last one runs: no wrong token, nothing lost, and rows beyond a stop are dropped."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import small_engine
import torch
from small_engine import SmallEngine, alone, events_of, text

from triptych.engine.gpu_mover import GpuMover
from triptych.engine.loop import TokenEvent
from triptych.words import FinishReason, SamplingParams


def _engine(overlap: bool = True, **options: int) -> SmallEngine:
    return SmallEngine(overlap=overlap, deterministic=False, **options)


def _tokens(events: list[list[TokenEvent]]) -> list[list[int | None]]:
    return [[event.token_id for event in some] for some in events]


PROMPTS = [text(1, 3), text(2, 127), text(3, 129), text(4, 300), text(3, 129) + text(5, 40)]


def test_overlapped_steps_give_the_tokens_of_single_ones() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    want = events_of(_engine(overlap=False), PROMPTS, params)
    got = events_of(_engine(slots=3), PROMPTS, params)
    assert _tokens(got) == _tokens(want)
    assert [some[-1].reason for some in got] == [FinishReason.LENGTH] * len(PROMPTS)


def test_who_finds_no_room_is_preempted_when_nothing_is_under_way() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    prompts = [text(i, 250) for i in range(2)]
    want = events_of(_engine(overlap=False), prompts, params)
    engine = _engine(pages=6, spare=0, slots=3)
    assert _tokens(events_of(engine, prompts, params)) == _tokens(want)
    assert engine.loop.scheduler.stats().preemptions > 0


def test_a_stop_token_ends_a_text_at_once_although_a_row_more_has_run() -> None:
    free = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    want = _tokens(events_of(_engine(overlap=False), PROMPTS, free))
    stops = {row[17] for row in want}
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, stop_token_ids=tuple(stops))
    engine = _engine()
    got = events_of(engine, PROMPTS, params)
    for one, whole in zip(got, want, strict=True):
        at = next(i for i, token in enumerate(whole) if token in stops)
        assert [event.token_id for event in one] == whole[: at + 1]
        assert one[-1].reason is FinishReason.STOP and one[-1].hidden
    # the superfluous rows wrote into nothing that was kept: everything resumes from the cache with the same tokens
    again = events_of(engine, PROMPTS, free)
    assert _tokens(again) == want
    assert engine.loop.stats().cached_tokens > 0


@pytest.mark.parametrize("after", (1, 2, 3, 9))
def test_an_abort_while_its_rows_run_leaves_nothing_behind(after: int) -> None:
    engine = _engine(step_tokens=128)
    prompt = text(7, 500)
    name = engine.add(prompt, 30)
    for _ in range(after):
        engine.step()
    engine.abort(name)
    engine.drain()
    engine.cache.check_integrity()
    assert len(engine.cache.free_slots) == 4
    assert engine.ask(prompt, 20).tokens == _engine(overlap=False).ask(prompt, 20).tokens


def test_drawn_tokens_are_those_of_the_host() -> None:
    params = SamplingParams(
        temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, max_tokens=30, ignore_eos=True, seed=7,
        repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.1, logit_bias={5: 2.0, 9: -1.5}, logprobs=3,
    )  # fmt: skip
    want = events_of(_engine(overlap=False), PROMPTS, params)
    got = events_of(_engine(), PROMPTS, params)
    assert _tokens(got) == _tokens(want)
    for one, other in zip(chain(*got), chain(*want), strict=True):
        assert one.logprob is not None and other.logprob is not None
        assert one.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-4)
        assert [i for i, _ in one.logprob.top] == [i for i, _ in other.logprob.top]


def test_a_row_that_cannot_be_sampled_fails_alone() -> None:
    engine = _engine()
    first, second = (engine.add(text(i, 200), 30) for i in (11, 12))
    for _ in range(4):
        engine.step()
    runner = engine.loop._runner
    slot = engine.cache.slot(first)
    runner.pools.window[slot] = float("nan")  # type: ignore[attr-defined]
    events = []
    while engine.loop.busy:
        events += engine.loop.step()
    assert [e.reason for e in events if e.request_id == first and e.reason] == [FinishReason.ERROR]
    assert [e.reason for e in events if e.request_id == second and e.reason] == [FinishReason.LENGTH]
    engine.cache.check_integrity()


@pytest.fixture
def gpu_mover(monkeypatch: pytest.MonkeyPatch, streams_on_processor: None) -> None:
    """The mover of a GPU, on the processor."""
    monkeypatch.setattr(small_engine, "Mover", GpuMover)


@pytest.mark.usefixtures("gpu_mover")
@pytest.mark.parametrize("seed", range(3))
def test_random_histories_give_what_each_text_gives_alone(seed: int) -> None:
    """Requests that share prefixes come, stop early and are aborted at random, in pools that do not hold them all."""
    random = np.random.default_rng(seed)
    engine = _engine(pages=9, spare=1, slots=3, step_tokens=int(random.integers(40, 300)), host_pages=6)
    base = text(seed, 700)
    answers = []
    for _ in range(90):
        if random.random() < 0.25 and len(engine.live) < 5:
            cut = int(random.integers(1, 600))
            engine.add(base[:cut] + text(int(random.integers(1 << 30)), int(random.integers(1, 60))), 30)
        if engine.live and random.random() < 0.08:
            engine.abort(str(random.choice(list(engine.live))))
        answers += engine.step()
        engine.cache.check_integrity()
    answers += engine.drain()
    engine.cache.check_integrity()
    assert len(answers) > 3
    moved = engine.loop.stats().cache
    assert moved["host_bytes_in"] > 0 and moved["fetches_failed"] == 0
    for answer in answers:
        assert len(answer.tokens) == 30
        logits = alone((*answer.prompt, *answer.tokens))[len(answer.prompt) - 1 : -1]
        best = logits.max(dim=1).values
        chosen = logits.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        assert float((best - chosen).max()) < 1e-3  # float32 sums in another order may turn near-ties over


@pytest.mark.usefixtures("gpu_mover")
def test_a_page_that_is_damaged_on_the_host_is_computed_again() -> None:
    engine = _engine(pages=40, host_pages=40)
    prompt = text(3, 700)
    want = engine.ask(prompt, 20).tokens
    engine.spoil_device()
    host = engine.loop._mover._host  # type: ignore[attr-defined]
    host[: len(host) // 2, 100] ^= 1
    assert engine.ask(prompt, 20).tokens == want
    assert engine.loop.stats().cache["fetches_failed"] > 0
    engine.cache.check_integrity()


@pytest.mark.usefixtures("gpu_mover")
def test_what_the_gpu_has_no_room_to_bring_up_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would ever be told of a fetch whose copies were not enqueued."""
    engine = _engine(pages=40, host_pages=40)
    prompt = text(3, 700)
    want = engine.ask(prompt, 20).tokens
    engine.spoil_device()

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(engine.loop._mover, "_bring_frames", no_room)
    assert engine.ask(prompt, 20).tokens == want
    assert engine.loop.stats().cache["fetches_failed"] > 0
    engine.cache.check_integrity()
