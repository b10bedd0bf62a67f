"""The manager's promises one by one; their interplay is proven in test_schedule_machine.py."""

from __future__ import annotations

import numpy as np
import pytest

from triptych.cache import CacheCapacity, CacheGeometry, CacheManager, ResumePlan
from triptych.cache.places import snapshot_policy_named
from triptych.cache.policies import Policies
from triptych.cache.retention import retention_named
from triptych.words import SnapshotWrite, TokenIds

GEOMETRY = CacheGeometry(2, (0,), (1,), 8, 4, 4, "float32", "float32")
SNAPSHOT = GEOMETRY.snapshot_frames


def manager(
    frames: int = 40, slots: int = 4, layers: int = 2, places: str = "full", retention: str = "lru", **more: object
) -> CacheManager:
    policies = Policies(snapshot_policy_named(places), retention_named(retention), **more)
    return CacheManager(GEOMETRY, CacheCapacity(frames, slots), layers, policies=policies)


def text(length: int, seed: int = 0) -> TokenIds:
    return np.random.default_rng(seed).integers(0, 100, length).astype(np.int32)


def admit(cache: CacheManager, name: str, tokens: TokenIds, salt: str = "", limit: int | None = None) -> ResumePlan:
    plan = cache.admit(name, tokens, salt, limit or min(len(tokens) + 128, cache.capacity.tokens))
    cache.check_integrity()
    assert plan is not None
    return plan


def run(cache: CacheManager, name: str, tokens: TokenIds, start: int, end: int) -> tuple[SnapshotWrite, ...]:
    """One step over [start, end)."""
    assert cache.grow(name, end)
    writes = cache.snapshot_writes(name, start, end)
    cache.check_integrity()
    cache.advance(name, tokens, end)
    cache.check_integrity()
    return writes


def serve(cache: CacheManager, name: str, tokens: TokenIds, salt: str = "", keep_end: bool = True) -> ResumePlan:
    """A whole request in one step."""
    plan = admit(cache, name, tokens, salt)
    run(cache, name, tokens, plan.start, len(tokens))
    write = cache.boundary_snapshot(name) if keep_end else None
    if write is not None:
        cache.publish_snapshot(name, write)
    cache.release(name)
    cache.check_integrity()
    return plan


@pytest.mark.parametrize("length", [1, 3, 4, 5, 127, 128, 129, 255, 256, 257, 511, 512])
def test_the_same_prompt_again_resumes_at_its_last_full_page(length: int) -> None:
    cache = manager()
    serve(cache, "a", text(length))
    plan = admit(cache, "b", text(length))
    end = length // 128 * 128
    if not end:
        assert plan.kind == "cold" and plan.write_from == 0
    else:
        assert (plan.kind, plan.start, plan.write_from) == ("snapshot", end - 4, end)
        assert cache.stats().snapshot_resumes == 1


def test_a_question_about_the_same_document_resumes_near_the_fork() -> None:
    """Rungs leave snapshots a little before the end of the first prompt."""
    cache = manager(frames=128, places="adaptive")
    document = text(20 * 128)
    serve(cache, "a", np.concatenate([document, text(200, seed=1)]))
    plan = admit(cache, "b", np.concatenate([document, text(300, seed=2)]))
    assert (plan.write_from, plan.kind) == (20 * 128, "snapshot")
    assert plan.recomputed_tokens <= 128 + 4


def test_where_two_prompts_parted_a_third_resumes() -> None:
    """The junction: nobody asked for a snapshot there before the second prompt left the chain."""
    cache = manager(frames=400, layers=43, places="adaptive")
    system = text(10 * 128)
    serve(cache, "a", np.concatenate([system, text(40 * 128, seed=1)]))
    second = serve(cache, "b", np.concatenate([system, text(500, seed=2)]))
    third = admit(cache, "c", np.concatenate([system, text(500, seed=3)]))
    assert second.kind != "snapshot" and second.write_from == 10 * 128
    assert third.start == third.write_from - 4 == 10 * 128 - 4


def test_without_snapshots_a_long_chain_is_rebuilt_and_a_short_one_read() -> None:
    cache = manager(frames=32, places="none")
    serve(cache, "a", text(1000))
    plan = admit(cache, "b", text(1000))
    assert (plan.kind, plan.start, plan.write_from) == ("trapezoid", 896 - 132 - 127, 896)
    assert admit(cache, "c", text(140)).kind == "cold"
    assert cache.stats().trapezoid_resumes == 1


def test_salts_share_nothing() -> None:
    cache = manager()
    serve(cache, "a", text(512), salt="one")
    assert admit(cache, "b", text(512), salt="two").write_from == 0
    assert admit(cache, "c", text(512), salt="one").write_from == 512


def test_switched_off_nothing_is_kept() -> None:
    cache = manager(prefix_cache=False)
    serve(cache, "a", text(512))
    stats = cache.stats()
    assert stats.frames_free == stats.frames
    assert admit(cache, "b", text(512)).write_from == 0


def test_who_seals_second_adopts_the_page_of_who_sealed_first() -> None:
    cache = manager()
    tokens = text(300)
    for name in ("a", "b"):
        admit(cache, name, tokens)
        assert cache.grow(name, 300)
    seen_by_b = cache.page_table("b")
    before = seen_by_b.tolist()
    cache.advance("a", tokens, 300)
    cache.advance("b", tokens, 300)
    cache.check_integrity()
    assert cache.page_table("a")[:2].tolist() == cache.page_table("b")[:2].tolist()
    assert cache.page_table("a")[2] != cache.page_table("b")[2]
    assert cache.stats().pages_adopted == 2
    # a plan made before still means what it meant
    assert seen_by_b.tolist() == before


def test_a_snapshot_is_seen_only_when_it_is_written() -> None:
    cache = manager(slots=3)
    tokens = text(257)
    serve(cache, "a", tokens, keep_end=False)
    for snapshot in tuple(cache.memory.snapshots.values()):
        cache.memory.drop_snapshot(snapshot)
    plan = admit(cache, "b", tokens)
    assert plan.kind != "snapshot" and cache.grow("b", 257)
    assert [write.position for write in cache.snapshot_writes("b", plan.start, 257)] == [256]
    assert admit(cache, "c", tokens).kind != "snapshot"
    cache.advance("b", tokens, 257)
    assert admit(cache, "d", tokens).kind == "snapshot"


def test_a_snapshot_to_be_restored_is_not_evicted() -> None:
    cache = manager(frames=6 + SNAPSHOT)
    serve(cache, "a", text(256))
    plan = admit(cache, "b", text(256))
    assert plan.kind == "snapshot"
    restored = plan.restore
    admit(cache, "c", text(256, seed=1))
    assert cache.grow("c", 256)
    cache.snapshot_writes("c", 0, 256)
    cache.check_integrity()
    assert restored in cache.memory.snapshots and cache.stats().snapshots_refused == 1
    # once restored it may go like any other
    run(cache, "b", text(256), plan.start, 256)
    assert len(cache.snapshot_writes("c", 0, 256)) == 1
    cache.check_integrity()


def test_one_prompt_takes_at_most_a_quarter_of_the_frames() -> None:
    cache = manager(frames=4 * 5 * SNAPSHOT)
    serve(cache, "a", text(20 * 128), keep_end=False)
    assert cache.stats().snapshots_cached == 5


@pytest.mark.parametrize("beyond", [0, 1, 127])
def test_the_last_boundary_is_saved_at_the_end(beyond: int) -> None:
    cache = manager()
    prompt = text(100)
    tokens = np.concatenate([prompt, text(156 + beyond, seed=1)])
    admit(cache, "a", prompt, limit=512)
    run(cache, "a", tokens, 0, 100)
    for end in range(101, len(tokens) + 1):
        run(cache, "a", tokens, end - 1, end)
    write = cache.boundary_snapshot("a")
    assert write is not None and write.position == 256
    cache.check_integrity()
    cache.publish_snapshot("a", write)
    assert cache.boundary_snapshot("a") is None
    cache.release("a")
    assert admit(cache, "b", np.concatenate([tokens, text(5)])).start == 252


def test_no_boundary_is_saved_before_its_rows_ran_here() -> None:
    cache = manager(frames=64)
    serve(cache, "a", text(512))
    plan = admit(cache, "b", text(512))
    assert plan.start == 508 and cache.boundary_snapshot("b") is None


def test_admission_promises_pages_only_once() -> None:
    cache = manager(frames=6, places="none")
    assert cache.admit("a", text(384), "", 500) is not None
    # three pages and one to decode into are promised to a, though it holds none yet
    assert cache.admit("b", text(256, seed=1), "", 300) is None
    assert cache.admit("c", text(100, seed=1), "", 300) is not None
    assert cache.grow("a", 384) and cache.grow("c", 128)
    cache.check_integrity()


def test_a_lone_request_may_fill_the_pool() -> None:
    cache = manager(frames=4, slots=2)
    tokens = text(512)
    admit(cache, "a", tokens, limit=512)
    run(cache, "a", tokens, 0, 512)
    assert cache.admit("b", text(1, seed=1), "", 10) is None
    cache.release("a")
    assert cache.admit("b", text(1, seed=1), "", 10) is not None


def test_growth_evicts_the_least_recently_used() -> None:
    cache = manager(frames=6, places="none")
    serve(cache, "old", text(256))
    serve(cache, "new", text(256, seed=1))
    admit(cache, "old again", text(200))
    cache.release("old again")
    admit(cache, "c", text(300, seed=2))
    assert cache.grow("c", 300)
    cache.check_integrity()
    cache.release("c")
    # one page was missing: the second of `old`, whose first was used once more, is older than `new`
    assert admit(cache, "d", text(256)).write_from == 128
    assert admit(cache, "e", text(256, seed=1)).write_from == 256


def test_growth_that_cannot_be_changes_nothing() -> None:
    cache = manager(frames=4)
    admit(cache, "a", text(100), limit=512)
    admit(cache, "b", text(100, seed=1), limit=512)
    assert cache.grow("a", 256) and cache.grow("b", 128)
    before = cache.stats()
    assert not cache.grow("a", 512)
    assert cache.stats() == before
    cache.check_integrity()


def test_suspect_pages_are_forgotten() -> None:
    cache = manager()
    serve(cache, "good", text(256))
    tokens = np.concatenate([text(256), text(256, seed=1)])
    plan = admit(cache, "bad", tokens)
    run(cache, "bad", tokens, plan.start, 512)
    cache.release("bad", forget=True)
    cache.check_integrity()
    assert admit(cache, "again", tokens).write_from == 256


def test_reset_forgets_everything_even_what_is_running() -> None:
    cache = manager(frames=64)
    tokens = text(600)
    serve(cache, "a", text(512))
    plan = admit(cache, "b", tokens)
    cache.reset()
    cache.check_integrity()
    assert admit(cache, "c", tokens).write_from == 0
    run(cache, "b", tokens, plan.start, 600)
    assert admit(cache, "d", tokens).write_from == 0
    assert cache.boundary_snapshot("b") is None
    for name in ("b", "c", "d"):
        cache.release(name)
    cache.check_integrity()
    assert cache.stats().frames_free == 64


@pytest.mark.parametrize("stop", range(5))
def test_releasing_at_any_point_leaks_nothing(stop: int) -> None:
    tokens = text(600)
    cache = manager()
    serve(cache, "before", text(256))
    steps = (
        lambda: cache.admit("a", tokens, "", 700),
        lambda: cache.grow("a", 600),
        lambda: cache.snapshot_writes("a", 252, 600),
        lambda: cache.advance("a", tokens, 600),
        lambda: cache.boundary_snapshot("a"),
    )
    for step in steps[: stop + 1]:
        step()
    cache.release("a")
    cache.check_integrity()
    stats = cache.stats()
    assert (stats.pages_held, stats.slots_free) == (0, 4)
    snapshots = stats.snapshots_cached * SNAPSHOT
    assert stats.frames_free + stats.pages_cached + snapshots == stats.frames


def test_a_page_table_cannot_be_written() -> None:
    cache = manager()
    admit(cache, "a", text(10))
    assert cache.grow("a", 10)
    with pytest.raises(ValueError, match="read-only"):
        cache.page_table("a")[0] = 3


def test_integrity_notices_what_is_out_of_place() -> None:
    def broken(harm: object) -> CacheManager:
        cache = manager()
        serve(cache, "a", text(512))
        admit(cache, "b", text(512))
        serve(cache, "c", text(300, seed=1))
        harm(cache)  # type: ignore[operator]
        return cache

    harms = (
        lambda c: c.memory.free.pop(),
        lambda c: c.memory.free.append(c.memory.free[0]),
        lambda c: c.free_slots.pop(),
        lambda c: setattr(next(iter(c.memory.tree.nodes.values())), "children", 7),
        lambda c: setattr(next(iter(c.memory.tree.nodes.values())), "pins", 7),
        lambda c: setattr(c.memory.tree, "protected", 0),
        lambda c: c.memory.tree.nodes.pop(next(iter(c.memory.tree.nodes))),
        lambda c: c.memory._queue.discard(next(iter(c.memory.candidates()))),
        lambda c: c.memory.snapshots.popitem(),
        lambda c: setattr(c.memory, "held", 5),
        lambda c: setattr(next(iter(c.memory.snapshots.values())), "holds", 3),
        lambda c: setattr(c.tenant(""), "frames", 1),
        lambda c: c.holdings["b"].chain.pop(),
    )
    for harm in harms:
        with pytest.raises(AssertionError, match=r"\w"):
            broken(harm).check_integrity()


def test_another_namespace_shares_nothing_and_the_old_one_is_itself_again() -> None:
    """Other weights: no page, snapshot, session or visit of theirs is found; what runs meanwhile is not kept."""
    cache = manager()
    cache.renew(b"one")
    serve(cache, "a", text(400))
    names = cache.root("")
    admit(cache, "runs", text(300, seed=1))
    run(cache, "runs", text(300, seed=1), 0, 200)
    cache.renew(b"two")
    assert cache.root("") != names and not len(cache.sessions)
    assert admit(cache, "b", text(400)).kind == "cold"
    assert cache.holdings["b"].branch.turn == 0, "it continues nothing"
    run(cache, "b", text(400), 0, 400)
    run(cache, "runs", text(300, seed=1), 200, 300)
    assert cache.boundary_snapshot("runs") is None
    for name in ("runs", "b"):
        cache.release(name)
        cache.check_integrity()
    assert admit(cache, "c", text(300, seed=1)).kind == "cold", "its first page came from the old weights"
    cache.release("c")
    assert admit(cache, "d", text(400)).kind == "snapshot"
    cache.release("d")
    cache.renew(b"one")
    assert cache.root("") == names, "what lower tiers kept of these weights may be found"
    cache.reset()
    assert cache.root("") != names, "unless it became doubtful"
