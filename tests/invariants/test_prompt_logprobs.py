"""Log-probabilities of prompts: those of the text alone, however it was cut, cached, batched or preempted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from small_engine import SmallEngine, alone, text

from triptych.engine.sampler import token_logprob
from triptych.words import PromptLogprobs, Request, SamplingParams

LENGTHS = (1, 2, 3, 4, 31, 32, 33, 34, 127, 128, 129, 257, 600)


def score(engine: SmallEngine, prompts: Sequence[tuple[int, ...]], likeliest: int = 2) -> list[PromptLogprobs]:
    """The log-probabilities of some prompts, asked for together."""
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, prompt_logprobs=likeliest)
    for i, prompt in enumerate(prompts):
        engine.loop.add(Request(f"s{i}", np.asarray(prompt, np.int32), params))
    found: dict[str, PromptLogprobs] = {}
    while engine.loop.busy:
        for event in engine.loop.step():
            assert event.error is None, event.error
            if event.request_id.startswith("s"):
                assert (event.prompt is not None) == (event.request_id not in found), "with the first token, and once"
                if event.prompt is not None:
                    found[event.request_id] = event.prompt
            else:
                engine.take([event])
        engine.cache.check_integrity()
    return [found[f"s{i}"] for i in range(len(prompts))]


def check(scored: PromptLogprobs, prompt: tuple[int, ...], likeliest: int = 2, *, bitwise: bool = True) -> None:
    """Every line is that of the text alone."""
    rows = alone(prompt).numpy()
    assert scored.lines.shape == (len(prompt) - 1, 2 + 2 * likeliest)
    for line, row, token in zip(scored.lines, rows, prompt[1:], strict=False):
        want = token_logprob(row, token, likeliest)
        got = (line[0], *line[2 : 2 + likeliest])
        assert np.allclose(got, (want.logprob, *(one for _, one in want.top)), rtol=0, atol=0 if bitwise else 1e-4)
        if bitwise:
            assert line[1] == 1 + (row > row[token]).sum()
            assert line[2 + likeliest :].tolist() == [token for token, _ in want.top]
    assert [one.token_id for one in scored.entries()] == list(prompt[1:])


@pytest.mark.parametrize("step_tokens", [64, 512])
def test_each_line_is_that_of_the_text_alone(step_tokens: int) -> None:
    engine = SmallEngine(step_tokens=step_tokens)
    prompts = [text(seed, length) for seed, length in enumerate(LENGTHS)]
    for prompt, scored in zip(prompts, score(engine, prompts), strict=True):
        check(scored, prompt)


@pytest.mark.parametrize("policy", ["adaptive", "none"])
def test_what_is_cached_runs_again_and_is_not_written(policy: str) -> None:
    engine = SmallEngine(policy=policy, step_tokens=100)
    engine.ask(text(1, 600), 4)
    [scored] = score(engine, [text(1, 700)])
    check(scored, text(1, 700))
    engine.ask(text(1, 700), 4)
    usage = engine.ask(text(1, 900), 4).usage
    assert usage is not None and usage.cached_tokens + usage.recomputed_tokens >= 640, "what was scored is cached"


def test_scores_share_steps_with_prompts_that_resume_and_with_decodes() -> None:
    engine = SmallEngine(slots=6, step_tokens=90, policy="none")  # windows are rebuilt by trapezoids, which narrow
    engine.ask(text(1, 500), 4)
    for seed, length in ((1, 640), (2, 90), (1, 520)):
        engine.add(text(seed, length), 30)
    prompts = [text(3, 300), text(1, 450)]
    for prompt, scored in zip(prompts, score(engine, prompts, likeliest=0), strict=True):
        check(scored, prompt, likeliest=0)
    assert engine.cache.stats().trapezoid_resumes >= 2 and not engine.live


def test_prompts_may_want_different_numbers_of_likeliest() -> None:
    engine = SmallEngine()
    for name, likeliest in (("s0", 0), ("s1", 5), ("s2", 1)):
        params = SamplingParams(max_tokens=1, prompt_logprobs=likeliest)
        engine.loop.add(Request(name, np.asarray(text(7, 140), np.int32), params))
    events = []
    while engine.loop.busy:
        events += engine.loop.step()
    for event, likeliest in zip(sorted(events, key=lambda event: event.request_id), (0, 5, 1), strict=True):
        assert event.prompt is not None
        check(event.prompt, text(7, 140), likeliest)


def test_the_runner_of_a_gpu_gives_the_same() -> None:
    engine = SmallEngine(overlap=True, deterministic=False, slots=3, step_tokens=128)
    engine.ask(text(3, 300), 4)
    engine.add(text(2, 50), 40)
    prompts = [text(seed, length) for seed, length in enumerate(LENGTHS)]
    for prompt, scored in zip(prompts, score(engine, prompts), strict=True):
        check(scored, prompt, bitwise=False)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_preempted_prompt_is_scored_anew(overlap: bool) -> None:
    engine = SmallEngine(pages=7, spare=0, slots=3, step_tokens=64, overlap=overlap, deterministic=not overlap)
    first = engine.add(text(1, 250), 200)
    while len(engine.live[first].tokens) < 130:  # soon it needs the page that the other's prompt counts on
        engine.step()
    [scored] = score(engine, [text(2, 500)])
    check(scored, text(2, 500), bitwise=not overlap)
    assert engine.loop.scheduler.stats().preemptions > 0 and not engine.live


def test_a_prompt_that_weights_change_under_is_scored_by_the_new_ones() -> None:
    engine = SmallEngine(step_tokens=64)
    params = SamplingParams(max_tokens=1, prompt_logprobs=1)
    engine.loop.add(Request("s0", np.asarray(text(1, 300), np.int32), params))
    engine.loop.step()
    engine.loop.step()
    engine.loop.halt()
    state = engine.loop._samplers["s0"]
    assert state.prompt is not None
    state.prompt.lines[:64] = 0.0  # what the old weights said
    assert engine.loop.replace_weights(lambda: b"new") == 1
    events = []
    while engine.loop.busy:
        events += engine.loop.step()
    assert events[0].prompt is not None
    check(events[0].prompt, text(1, 300), likeliest=1)
