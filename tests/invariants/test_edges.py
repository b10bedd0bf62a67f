"""Invariant 1 at the positions where something changes: pages, groups and windows begin, the indexer starts to matter.

Each prompt is continued by 44 tokens after its prefix was found in the cache: a lost CSA overlap shows
only from the fourth token on (reference section 3.3, rule R2), a lost HCA tail at the next multiple of 128.
"""

from __future__ import annotations

import pytest
from small_engine import SHAPE, Answer, SmallEngine, accounted, agree, text

from triptych.cache.geometry import LOOKBACK, trapezoid_start

EDGES = (1, 3, 4, 5, 127, 128, 129, 255, 256, 257, 511, 512, 8191, 8192, 8193)
CONTINUED = 44


def pages_for(tokens: int) -> int:
    return -(-tokens // 128)


def resumed(engine: SmallEngine, length: int) -> Answer:
    """Run a prompt of `length`, then the same one with five tokens more, which finds the first one's pages."""
    engine.ask(text(1, length), 1)
    engine.cache.check_integrity()
    longer = (*text(1, length), *text(2, 5))
    answer = engine.ask(longer, CONTINUED)
    engine.cache.check_integrity()
    agree(answer)
    return answer


@pytest.mark.parametrize("length", EDGES)
def test_resumed_through_a_snapshot(length: int) -> None:
    engine = SmallEngine(pages=pages_for(length) + 4)
    usage = accounted(resumed(engine, length))
    boundary = length // 128 * 128
    if boundary:
        assert engine.cache.stats().snapshot_resumes == 1
        assert usage.cached_tokens == boundary - LOOKBACK and usage.recomputed_tokens == LOOKBACK
    else:
        assert usage.cached_tokens == 0


@pytest.mark.parametrize("length", EDGES)
def test_resumed_through_a_trapezoid(length: int) -> None:
    engine = SmallEngine(pages=pages_for(length) + 4, policy="none")
    usage = accounted(resumed(engine, length))
    boundary = length // 128 * 128
    assert engine.cache.stats().trapezoid_resumes == (boundary > 132)
    assert usage.cached_tokens == trapezoid_start(boundary, SHAPE.num_layers)
    assert usage.cached_tokens + usage.recomputed_tokens == boundary


@pytest.mark.parametrize("step_tokens", [1 + 3, 64, 127, 128, 129, 1000])
@pytest.mark.parametrize("length", [130, 1024, 2000])
def test_a_trapezoid_in_chunks(length: int, step_tokens: int) -> None:
    engine = SmallEngine(pages=pages_for(length) + 4, policy="none", step_tokens=step_tokens)
    agree(resumed(engine, length))


@pytest.mark.parametrize("length", [257, 512, 2000])
def test_a_snapshot_taken_at_the_end_of_a_trapezoid_is_exact(length: int) -> None:
    engine = SmallEngine(pages=2 * pages_for(length) + 8)
    engine.ask(text(1, length), 1)
    engine.drop_snapshots()
    boundary = length // 128 * 128
    first = engine.ask((*text(1, boundary), *text(2, 5)), 1)
    assert accounted(first).resume == "trapezoid" and engine.cache.stats().snapshots_cached
    again = engine.ask((*text(1, boundary), *text(3, 7)), CONTINUED)
    assert accounted(again).cached_tokens == boundary - LOOKBACK and again.usage.resume == "snapshot"
    agree(again)


@pytest.mark.parametrize("length", EDGES)
def test_cold_in_chunks(length: int) -> None:
    engine = SmallEngine(pages=pages_for(length) + 4, step_tokens=333, prefix_cache=False)
    usage = accounted(resumed(engine, length))
    assert usage.cached_tokens == usage.recomputed_tokens == 0


@pytest.mark.parametrize("length", [128, 129, 512, 8192])
def test_resumed_at_the_end_of_an_output(length: int) -> None:
    """The next turn of a conversation: prompt, answer and a new question."""
    engine = SmallEngine(pages=pages_for(length) + 8)
    first = engine.ask(text(1, length), 140)
    second = (*first.prompt, *first.tokens, *text(3, 9))
    answer = engine.ask(second, CONTINUED)
    agree(answer)
    # the last token of an answer never ran, so the boundary is that of the tokens before it
    assert accounted(answer).cached_tokens == (length + 139) // 128 * 128 - LOOKBACK


@pytest.mark.parametrize("fork", [256, 700, 1024])
def test_another_question_about_the_same_document(fork: int) -> None:
    """A prompt that leaves a cached one somewhere in the middle."""
    engine = SmallEngine()
    engine.ask(text(1, 1500), 1)
    other = (*text(1, fork), *text(4, 60))
    answer = engine.ask(other, CONTINUED)
    agree(answer)
    usage = accounted(answer)
    # how much is run again depends on where a snapshot was kept; the entries of all common pages are used
    assert usage.cached_tokens + usage.recomputed_tokens == fork // 128 * 128


@pytest.mark.parametrize("length", [127, 128, 129, 256, 300])
def test_an_identical_prompt_runs_its_last_token_again(length: int) -> None:
    engine = SmallEngine()
    for _ in range(3):
        answer = engine.ask(text(5, length), CONTINUED)
        agree(answer)
    assert accounted(answer).cached_tokens == max(0, length // 128 * 128 - LOOKBACK)


def test_fast_mode_gives_the_same_tokens() -> None:
    """Without deterministic mode logits may differ in their last bits; the greedy text must not."""
    engine = SmallEngine(deterministic=False, step_tokens=200)
    for length in (129, 257, 512):
        longer = (*text(1, length), *text(2, 5))
        engine.ask(text(1, length), 1)
        agree(engine.ask(longer, CONTINUED), bitwise=False)


@pytest.mark.parametrize("step_tokens", [64, 1000])
def test_a_trapezoid_runs_the_rows_it_says(step_tokens: int) -> None:
    """Rows times layers, counted in the model: what `equivalents` promises, in one chunk or in many."""
    layers, boundary, tail = SHAPE.num_layers, 1024, 5
    engine = SmallEngine(policy="none", step_tokens=step_tokens)
    engine.ask(text(1, boundary), 1)
    before = engine.loop.model.layer_rows
    engine.ask((*text(1, boundary), *text(2, tail)), 1)
    counted = engine.loop.model.layer_rows - before
    starts = [trapezoid_start(boundary, layers, layer) for layer in range(layers)]
    assert counted == sum(boundary - start for start in starts) + tail * layers
    assert counted < 0.7 * (boundary - starts[0]) * layers, "a rectangle ran"
