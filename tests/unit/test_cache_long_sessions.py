"""Sessions of a million tokens in DeepSeek-V4-Flash's geometry, ids only: what a turn has to run again."""

from __future__ import annotations

import numpy as np
import pytest

from triptych.cache import CacheCapacity, CacheGeometry, CacheManager, ResumePlan
from triptych.cache.geometry import trapezoid_start
from triptych.cache.places import snapshot_policy_named
from triptych.cache.policies import Policies
from triptych.config import PAGE, SHAPES
from triptych.words import TokenIds

FLASH = CacheGeometry.of(SHAPES["flash"], "fp8")
LONG = 1_000_000
TURN, ANSWER = 2_000, 500
CHUNK = 8_192
BOUND = LONG - trapezoid_start(LONG, FLASH.layers)
"""Tokens that a trapezoid runs again; in the outer layers only a few of them."""


class Clock:
    """A minute passes between requests."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def manager(frames: int, policy: str = "adaptive") -> CacheManager:
    clock = Clock()
    cache = CacheManager(
        FLASH, CacheCapacity(frames, 4), FLASH.layers, policies=Policies(snapshot_policy_named(policy)), clock=clock
    )
    cache.clock = clock
    return cache


def text(seed: int, length: int) -> TokenIds:
    return np.random.default_rng(seed).integers(0, 129_280, length).astype(np.int32)


def serve(cache: CacheManager, name: str, prompt: TokenIds, answer: TokenIds) -> ResumePlan:
    """A request from admission to its end, in chunks; the last token of an answer never runs."""
    cache.clock.now += 60.0
    whole = np.concatenate([prompt, answer])
    plan = cache.admit(name, prompt, "", len(whole))
    assert plan is not None, "it does not fit"
    for start in range(plan.start, len(prompt), CHUNK):
        end = min(len(prompt), start + CHUNK)
        assert cache.grow(name, end)
        cache.snapshot_writes(name, start, end)
        cache.advance(name, prompt, end)
    assert cache.grow(name, len(whole))
    cache.advance(name, whole, len(whole) - 1)
    write = cache.boundary_snapshot(name)
    if write is not None:
        cache.publish_snapshot(name, write)
    cache.release(name)
    return plan


def turns(cache: CacheManager, between: TokenIds | None = None) -> list[ResumePlan]:
    """Two sessions in turns, four times each. Plans of the later turns.

    When they have shown that they are sessions, another prompt of the length of `between` comes after each turn.
    """
    sessions = [text(seed, LONG) for seed in (1, 2)]
    plans = []
    for turn in range(4):
        for who, history in enumerate(sessions):
            answer = text(100 * who + turn + 10, ANSWER)
            plan = serve(cache, f"{who}.{turn}", history, answer)
            if turn:
                plans.append(plan)
            sessions[who] = np.concatenate([history, answer, text(100 * who + turn + 50, TURN)])
            if between is not None and turn:
                serve(cache, f"{who}.{turn}.between", between + (2 * turn + who), text(7, ANSWER))
    cache.check_integrity()
    return plans


ROOM = 2 * (LONG + 5 * (TURN + ANSWER)) // PAGE


def test_two_sessions_that_fit_run_only_what_is_new() -> None:
    """Serving.md's complaint: each turn of one session throws the other's window state away."""
    for plan in turns(manager(ROOM + 20 * FLASH.snapshot_frames)):
        assert plan.kind == "snapshot"
        assert plan.computed_tokens <= TURN + ANSWER + PAGE
        assert plan.recomputed_tokens <= PAGE


def test_a_cold_prompt_that_fits_does_not_lower_their_hits() -> None:
    """150,000 tokens of a stranger each time, with room for one: the next displaces it, although the sessions' use is
    longer ago.

    At most what belongs to their last answers goes: whether those will be sent back is not known yet.
    """
    stranger = text(9, 150_000)
    room = ROOM + (len(stranger) + ANSWER) // PAGE + 40 * FLASH.snapshot_frames
    alone = turns(manager(ROOM + 20 * FLASH.snapshot_frames))
    disturbed = turns(manager(room), stranger)
    for plan, undisturbed in zip(disturbed, alone, strict=True):
        assert plan.write_from >= undisturbed.write_from - ANSWER
        assert plan.cached_tokens >= undisturbed.cached_tokens - ANSWER - 5 * PAGE


def test_without_any_snapshot_a_turn_runs_a_trapezoid_and_nothing_more() -> None:
    for plan in turns(manager(ROOM, policy="none")):
        assert plan.kind == "trapezoid"
        assert plan.recomputed_tokens <= BOUND
        assert plan.equivalents <= 0.52 * PAGE * FLASH.layers


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_a_trapezoid_is_about_half_of_the_rectangle(name: str) -> None:
    """Layer-tokens against n_win x L x L, the recompute that DeepSeek's report names (section 3.5)."""
    geometry = CacheGeometry.of(SHAPES[name], "fp8")
    layers = geometry.layers
    counted = sum(LONG // PAGE * PAGE - trapezoid_start(LONG // PAGE * PAGE, layers, layer) for layer in range(layers))
    assert counted <= 0.52 * PAGE * layers * layers


@pytest.mark.parametrize(("name", "limit"), [("flash", 3.7e6), ("pro", 5.3e6)])
def test_a_resumable_position_costs_a_few_megabytes(name: str, limit: float) -> None:
    """With the frames it really takes, not only its bytes."""
    geometry = CacheGeometry.of(SHAPES[name], "fp8")
    assert geometry.snapshot_frames * geometry.page_bytes <= limit
