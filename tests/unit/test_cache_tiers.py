"""What goes down and comes up, in ids: each object once, what is wanted first, nothing that is not whole."""

from __future__ import annotations

import numpy as np
from fake_mover import FakeStore

from triptych.cache import CacheCapacity, CacheGeometry, CacheManager
from triptych.cache.jobs import Done, Jobs
from triptych.cache.places import snapshot_policy_named
from triptych.cache.policies import Below, Policies
from triptych.cache.prefix import page_keys
from triptych.cache.retention import retention_named
from triptych.cache.store.protocol import ObjectKey
from triptych.words import TokenIds

GEOMETRY = CacheGeometry(2, (0,), (1,), 8, 4, 4, "float32", "float32")


def manager(
    frames: int = 40, host: int = 0, stores: tuple[FakeStore, ...] = (), policy: str = "adaptive"
) -> CacheManager:
    policies = Policies(snapshot_policy_named(policy), retention_named("lru"))
    return CacheManager(GEOMETRY, CacheCapacity(frames, 4), 2, policies=policies, below=Below(host, stores))


def text(length: int, seed: int = 0) -> TokenIds:
    return np.random.default_rng(seed).integers(0, 100, length).astype(np.int32)


def start(cache: CacheManager, name: str, tokens: TokenIds) -> None:
    plan = cache.admit(name, tokens, "", len(tokens) + 128)
    assert plan is not None
    assert cache.grow(name, len(tokens))
    cache.snapshot_writes(name, plan.start, len(tokens))
    cache.advance(name, tokens, len(tokens))


def end(cache: CacheManager, name: str) -> None:
    write = cache.boundary_snapshot(name)
    if write is not None:
        cache.publish_snapshot(name, write)
    cache.release(name)
    cache.check_integrity()


def carry_out(cache: CacheManager, jobs: Jobs, ok: bool = True) -> None:
    """Copies that take no time."""
    for save in jobs.saves:
        done = ok and cache.tiers.stores[save.tier].put(save.key, "bytes")
        cache.end(Done(save.job, (done,)))
    for fetch in jobs.fetches:
        cache.end(Done(fetch.job, (ok,) * len(fetch.parts)))
    cache.check_integrity()


def settle(cache: CacheManager, ok: bool = True) -> list[Jobs]:
    """Until nothing is left to be moved."""
    out = []
    while cache.tiers.busy:
        out.append(cache.due())
        carry_out(cache, out[-1], ok)
    return out


def test_an_object_is_saved_once_although_two_requests_end_with_it() -> None:
    cache = manager(stores=(FakeStore("disk"),))
    for name in "ab":
        start(cache, name, text(512))
    for name in "ab":
        end(cache, name)
    saved = [save.key for jobs in settle(cache) for save in jobs.saves]
    assert len(saved) == len(set(saved)) >= 4
    start(cache, "c", text(512))
    end(cache, "c")
    assert not [save for jobs in settle(cache) for save in jobs.saves if save.key in saved]


def test_a_failed_save_is_counted_and_tried_again_with_the_next_use() -> None:
    cache = manager(stores=(FakeStore("disk"),))
    start(cache, "a", text(256))
    end(cache, "a")
    settle(cache, ok=False)
    assert cache.tiers.moved.failed_saves >= 2 and not cache.tiers.moved.bytes_in["disk"]
    assert cache.memory.evictable == 40 - len(cache.memory.free), "what could not be saved may be evicted"


def test_a_store_that_lost_first_pages_gets_them_again_but_not_while_it_refuses() -> None:
    store = FakeStore("disk")
    cache = manager(stores=(store,))
    start(cache, "a", text(512))
    end(cache, "a")
    settle(cache)
    store.discard(ObjectKey("page", _keys(cache, text(512))[0]))
    start(cache, "b", text(700))
    end(cache, "b")
    settle(cache, ok=False)
    assert ObjectKey("page", _keys(cache, text(512))[0]) not in store
    start(cache, "c", text(900))
    end(cache, "c")
    tried = {save.key.name for jobs in settle(cache) for save in jobs.saves}
    assert tried and not tried & set(_keys(cache, text(512))), "only what is new, while it is not known to work"
    start(cache, "d", text(1100))
    end(cache, "d")
    settle(cache)
    assert all(ObjectKey("page", key) in store for key in _keys(cache, text(1100)))


def saved_boundaries(policy: str, prompts: list[TokenIds], shared: TokenIds) -> set[int]:
    """Where a store has snapshots of `shared` after `prompts`, in tokens."""
    store = FakeStore("disk")
    cache = manager(frames=1000, stores=(store,), policy=policy)
    for number, prompt in enumerate(prompts):
        start(cache, str(number), prompt)
        end(cache, str(number))
        settle(cache)
    names = enumerate(_keys(cache, shared), 1)
    return {128 * end for end, name in names if ObjectKey("snapshot", name) in store}


def test_a_store_gets_the_window_of_a_text_that_prompts_share_and_not_of_every_place() -> None:
    shared = text(1024)
    asked = [np.concatenate([shared, text(300, seed)]) for seed in (1, 2, 3)]
    assert saved_boundaries("adaptive", asked[:1], shared) == set(), "nobody knows yet where it ends"
    assert saved_boundaries("adaptive", asked[:2], shared) == {1024}
    assert saved_boundaries("adaptive", asked, shared) == {1024}
    assert saved_boundaries("full", asked[:1], shared) == set(range(128, 1025, 128)), "full means all"
    assert saved_boundaries("periodic:512", asked[:1], shared) == {512, 1024}
    assert saved_boundaries("none", asked, shared) == set()


def test_what_was_evicted_comes_back_from_the_host_before_admission() -> None:
    cache = manager(frames=12, host=40)
    start(cache, "a", text(512))
    end(cache, "a")
    settle(cache)
    start(cache, "b", text(1400, seed=9))
    end(cache, "b")
    settle(cache)
    assert len(cache.memory.tree.match(_keys(cache, text(512)))) < 4
    cache.rates.token = 1.0  # a machine on which anything is quicker than computing
    assert not cache.ready("c", text(512), "")
    settle(cache)
    assert cache.ready("c", text(512), "")
    plan = cache.admit("c", text(512), "", 640)
    assert plan is not None and plan.write_from == 512 and 0 < plan.by_tier["host"] <= plan.cached_tokens


def test_a_fetch_that_pays_less_than_computing_is_not_made() -> None:
    cache = manager(frames=12, host=40)
    start(cache, "a", text(512))
    end(cache, "a")
    start(cache, "b", text(1400, seed=9))
    end(cache, "b")
    settle(cache)
    cache.rates.token = cache.rates.context = 1e-12
    assert cache.ready("c", text(512), "")
    assert not cache.due().fetches


def test_a_prefix_that_is_not_trusted_is_served_from_nowhere() -> None:
    store = FakeStore("disk")
    cache = manager(stores=(store,), host=8)
    start(cache, "a", text(512))
    end(cache, "a")
    settle(cache)
    assert store.contents
    cache.distrust(text(512), "")
    assert not store.contents and not cache.memory.tree.nodes
    assert cache.ready("b", text(512), "") and not cache.due().fetches
    start(cache, "b", text(512))
    end(cache, "b")
    settle(cache)
    assert not store.contents and not cache.memory.tree.match(_keys(cache, text(512)))


def test_the_host_gives_up_the_lowest_rank_and_never_what_is_read() -> None:
    cache = manager(host=2)
    host = cache.tiers.host
    assert host is not None
    old, new, newest = (ObjectKey("page", name) for name in (b"old", b"new", b"newest"))
    assert host.put(old, 1, rank=1.0) is not None and host.put(new, 1, rank=2.0) is not None
    assert host.put(newest, 1, rank=0.5) is None, "it ranks lowest itself"
    host.use(old)
    assert host.put(newest, 1, rank=3.0) is not None
    assert old in host and new not in host and newest in host
    host.end_use(old, gone=True)
    assert old not in host
    host.check()


def _keys(cache: CacheManager, tokens: TokenIds) -> list[bytes]:
    return list(page_keys(cache.root(""), tokens))


def test_a_long_prompt_is_fetched_in_pieces_and_its_snapshot_with_the_last() -> None:
    cache = manager(frames=30, host=60)
    start(cache, "a", text(1280))
    end(cache, "a")
    start(cache, "b", text(3600, seed=9))
    end(cache, "b")
    settle(cache)
    assert len(cache.memory.tree.match(_keys(cache, text(1280)))) <= 3
    cache.rates.token, cache.prefetcher.piece = 1.0, 4
    sizes = []
    while not cache.ready("c", text(1280), ""):
        for jobs in settle(cache):
            sizes += [len(fetch.parts) for fetch in jobs.fetches]
    assert len(sizes) >= 2 and max(sizes) <= 5 and set(sizes[:-1]) == {4}
    plan = cache.admit("c", text(1280), "", 1408)
    assert plan is not None and plan.write_from == 1280 and plan.kind == "snapshot"


def test_a_snapshot_that_two_want_comes_up_once() -> None:
    """All pages are on the device, the window only on the disk."""
    cache = manager(stores=(FakeStore("disk"),))
    start(cache, "a", text(1280))
    end(cache, "a")
    settle(cache)
    for snapshot in list(cache.memory.snapshots.values()):
        cache.memory.drop_snapshot(snapshot)
    cache.rates.token = 1.0
    assert not cache.ready("c", text(1280), "") and not cache.ready("d", text(1280), "")
    [jobs] = settle(cache)
    assert [[part.key.kind for part in fetch.parts] for fetch in jobs.fetches] == [["snapshot"]]
    for name in "cd":
        assert cache.ready(name, text(1280), "")
        plan = cache.admit(name, text(1280), "", 1408)
        assert plan is not None and plan.kind == "snapshot"
