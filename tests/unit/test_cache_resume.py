"""Resume plans: which is chosen, and the arithmetic of each at every kind of boundary."""

from __future__ import annotations

import pytest

from triptych.cache.resume import ResumePlan, cheapest, replay_tokens, snapshot_is_exact

EDGES = (1, 3, 4, 5, 127, 128, 129, 255, 256, 257, 511, 512)


def counts(plan: ResumePlan) -> tuple[int, int, int]:
    return plan.cached_tokens, plan.recomputed_tokens, plan.computed_tokens


@pytest.mark.parametrize("length", EDGES)
def test_nothing_cached_is_a_cold_start(length: int) -> None:
    plan = cheapest(length, 0, 43, None)
    assert (plan.kind, plan.start, plan.read_from, plan.write_from) == ("cold", 0, 0, 0)
    assert counts(plan) == (0, 0, length)


@pytest.mark.parametrize("length", [n for n in EDGES if n >= 128])
@pytest.mark.parametrize("behind", [0, 1, 2])
def test_a_snapshot_starts_four_tokens_before_its_boundary(length: int, behind: int) -> None:
    end = length // 128 * 128
    c = end - 128 * behind
    if c <= 0:
        return
    plan = cheapest(length, end, 43, (c, 7))
    assert (plan.kind, plan.snapshot, plan.start, plan.write_from) == ("snapshot", 7, c - 4, end)
    assert plan.read_from == plan.exact_from == max(0, c - 132)
    assert counts(plan) == (c - 4, end - c + 4, length - end)


@pytest.mark.parametrize("layers", [1, 2, 4, 5, 43, 61, 127, 128, 129])
def test_a_replay_starts_on_a_page_and_covers_the_bound(layers: int) -> None:
    span = replay_tokens(layers)
    assert span % 128 == 0 and layers * 127 <= span < layers * 127 + 128
    plan = cheapest(span + 300, span + 256, layers, None)
    assert (plan.kind, plan.start, plan.read_from, plan.write_from) == ("replay", 256, 256, span + 256)
    assert counts(plan) == (256, span, 44)
    # the window rows of the 127 positions before the end are exact in the last layer
    assert plan.exact_from <= plan.write_from - 127


def test_flash_and_pro_replay_lengths() -> None:
    assert (replay_tokens(43), replay_tokens(61)) == (5504, 7808)


def test_a_chain_shorter_than_a_replay_is_read_from_the_start() -> None:
    plan = cheapest(1000, 384, 3, None)
    assert (plan.kind, plan.start, plan.read_from, plan.write_from) == ("cold", 0, 0, 384)
    assert counts(plan) == (0, 384, 616)


def test_the_cheapest_plan_runs_the_fewest_tokens() -> None:
    far, near = (1024, 1), (8192, 2)
    assert cheapest(10_000, 9984, 43, far).kind == "replay"
    assert cheapest(10_000, 9984, 43, near).kind == "snapshot"
    # a snapshot that costs exactly what the replay does wins; its tokens before the look-back are no cheaper
    assert cheapest(10_000, 9984, 2, (9984 - 256, 3)).kind == "replay"


def test_a_prompt_that_is_cached_whole_still_runs_its_last_token() -> None:
    plan = cheapest(512, 512, 43, (512, 0))
    assert (plan.start, plan.cost) == (508, 4)
    assert counts(plan) == (508, 4, 0)


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 6])
def test_a_replay_may_snapshot_only_where_all_rows_are_exact(layers: int) -> None:
    """Rows of layer l are exact 127 l tokens after the start; a snapshot at b needs [b - 132, b - 4) in all."""
    start = 1280
    plan = cheapest(4096, start + replay_tokens(layers), layers, None)
    assert plan.start == start
    for boundary in range(start + 128, 4096, 128):
        exact = boundary - 132 >= start + 127 * (layers - 1)
        assert snapshot_is_exact(boundary, plan.exact_from) == exact
    assert snapshot_is_exact(plan.write_from, plan.exact_from) == (layers >= 5)


def test_a_cold_run_may_snapshot_everywhere() -> None:
    plan = cheapest(512, 0, 43, None)
    assert all(snapshot_is_exact(boundary, plan.exact_from) for boundary in (128, 256, 512))
