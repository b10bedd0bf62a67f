"""The order in which pages go: by rank, leaves before parents, never what is pinned."""

from __future__ import annotations

import random

import numpy as np
import pytest

from triptych.cache.eviction import EvictionQueue
from triptych.cache.history import Return
from triptych.cache.memory import Memory
from triptych.cache.prefix import Branch, Node, PrefixTree, Tenant, page_keys, root_key
from triptych.cache.retention import Lru, Value

ROOT = root_key(b"", "")
K = 3  # frames of a snapshot


class Store:
    """A memory of `frames` whose clock the test turns."""

    def __init__(self, frames: int = 100, policy: Lru | Value | None = None, quota: float = 1.0) -> None:
        self.now = 0.0
        self.memory = Memory(frames, K, policy or Lru(), lambda: self.now, quota)
        self.tenants = {name: Tenant(name) for name in "ab"}
        self.gone: list[int] = []
        self.memory.on_evict = lambda item: self.gone.append(item.page if isinstance(item, Node) else -1)

    def grow(self, *pages: int, at: float, tenant: str = "a") -> Node:
        """Seal a chain whose i-th page holds the token pages[i] 128 times; it is used once, `at`."""
        self.now = at
        keys = list(page_keys(root_key(b"", tenant), tokens(*pages)))
        chain = self.memory.tree.match(keys)
        if chain:
            self.memory.tree.pin(chain[-1])
        fresh = self.memory.take(len(pages) - len(chain), self.tenants[tenant])
        old = chain[-1] if chain else None
        branch = Branch(self.tenants[tenant], 0, at, 0, 128 * len(pages), used=at)
        self.memory.tree.extend(keys[len(chain) :], chain, fresh, branch)
        self.memory.tree.pin(chain[-1])
        if old is not None:
            self.memory.tree.unpin(old, at)
        self.memory.tree.unpin(chain[-1], at)
        return chain[-1]

    def snapshot(self, node: Node, worth: float = 100.0) -> None:
        frames = self.memory.take(K, node.branch.tenant)
        assert self.memory.publish(node, tuple(frames), worth)

    def evict(self, count: int) -> list[int]:
        """What goes to free `count` more frames, pages by frame and snapshots as -1."""
        self.gone = []
        taken = self.memory.take(len(self.memory.free) + count, self.tenants["b"])
        self.memory.free.extend(taken)
        return self.gone


def tokens(*pages: int) -> np.ndarray:
    return np.repeat(np.asarray(pages, np.int32), 128)


def test_queue_against_a_sorted_list() -> None:
    rng = random.Random(5)
    queue: EvictionQueue[int] = EvictionQueue()
    truth: dict[int, float] = {}
    for _ in range(5000):
        item, rank = rng.randrange(80), float(rng.randrange(1000))
        action = rng.random()
        if action < 0.5:
            queue.put(item, rank)
            truth[item] = rank
        elif action < 0.8:
            queue.discard(item)
            truth.pop(item, None)
        elif truth:
            least = min(truth.values())
            assert truth.pop(queue.pop()) == least
        assert set(queue) == set(truth) and len(queue) == len(truth)


def test_an_empty_queue_says_so() -> None:
    queue: EvictionQueue[int] = EvictionQueue()
    queue.put(1, 0.0)
    queue.discard(1)
    with pytest.raises(IndexError):
        queue.pop()


def frames_of(tip: Node) -> list[int]:
    out, node = [], tip
    while node is not None:
        out.append(node.page)
        node = node.parent
    return out


def test_leaves_go_before_parents_and_old_before_new() -> None:
    store = Store()
    first = store.grow(1, 2, 3, at=1)
    second = store.grow(1, 4, at=2)
    third = store.grow(5, at=3)
    one, two, three = frames_of(first), frames_of(second), frames_of(third)
    # the page that both chains share was used last by the younger one, and goes with it
    assert store.evict(5) == [one[0], one[1], two[0], two[1], three[0]]
    assert not store.memory.tree.nodes and not store.memory.evictable


def test_a_pin_protects_the_whole_chain_and_counts_it_once() -> None:
    store = Store()
    tip, other = store.grow(1, 2, 3, at=1), store.grow(1, 4, at=2)
    tree = store.memory.tree
    tree.pin(tip)
    assert store.memory.evictable == 1
    tree.pin(other)
    assert store.memory.evictable == 0
    with pytest.raises(IndexError):
        store.evict(1)
    tree.unpin(tip, 3)
    assert store.evict(2) == frames_of(tip)[:2]


def test_pages_and_snapshots_displace_each_other_by_rank() -> None:
    store = Store()
    old, new = store.grow(1, at=1), store.grow(2, 3, at=5)
    store.now = 2.0
    store.snapshot(old)
    store.now = 6.0
    store.snapshot(new.parent)
    # the old page goes when its snapshot has gone; then the newer chain, page by page, before its snapshot
    assert store.evict(1 + K) == [-1, old.page] or store.gone == [old.page, -1]
    parent = new.parent.page
    assert store.evict(2) == [new.page, -1, parent], "a page takes its snapshot with it"


def test_one_arena_strands_nothing() -> None:
    """All frames can be pages, and all but the pages they stand on can be snapshots."""
    store = Store(frames=20)
    tip = store.grow(*range(1, 21), at=1)
    assert not store.memory.free
    for node_at in range(4):
        node = tip
        for _ in range(19 - node_at):
            node = node.parent
        store.now = 2.0 + node_at
        store.snapshot(node)
    assert len(store.memory.snapshots) == 4 and len(store.memory.tree.nodes) == 20 - 4 * K
    assert store.memory.peak == 20


def test_a_tenant_beyond_its_quota_loses_its_own_first() -> None:
    store = Store(frames=20, quota=0.5)
    modest = store.grow(1, 2, 3, 4, at=1, tenant="b")
    store.grow(*range(10, 20), at=2)
    for start in (30, 50, 70):
        store.now += 1
        store.grow(*range(start, start + 8), at=store.now)
    assert store.memory.tree.nodes.get(modest.key) is modest, "who stayed below its share lost pages to who did not"
    assert store.tenants["a"].frames <= 16 and store.tenants["b"].frames == 4


def test_kinds_that_come_back_outlive_kinds_that_do_not() -> None:
    """Both were used last at the same second; only what was learned tells them apart."""
    policy = Value()
    for _ in range(200):
        branch = Branch(Tenant(""), 0, 0.0, 0, 0)
        policy.ended(branch, 1)
        policy.ended(branch, 2)
        policy.came_back(Return(pause=60.0, distance=0, at_end=True, kind=2, turn=0))
    store = Store(policy=policy)
    lost, kept = store.grow(1, at=1), store.grow(2, at=1)
    for tip, kind in ((lost, 1), (kept, 2)):
        policy.ended(tip.branch, kind)
        store.memory.refresh(tip)
    assert kept.branch.chance > 3 * lost.branch.chance
    assert store.evict(1) == [lost.page]


def test_a_late_page_of_a_likely_kind_goes_before_a_new_one_of_an_unlikely_kind() -> None:
    """Worth fades with age: no chance keeps a page for ever."""
    policy = Value()
    store = Store(policy=policy)
    likely = store.grow(1, at=1)
    likely.branch.chance = 3.0
    store.memory.refresh(likely)
    unlikely = store.grow(2, at=10_000)
    unlikely.branch.chance = 0.3
    store.memory.refresh(unlikely)
    assert store.evict(1) == [likely.page]


def test_a_snapshot_that_saves_little_goes_before_one_that_saves_much() -> None:
    policy = Value()
    store = Store(policy=policy)
    one, two = store.grow(1, at=1), store.grow(2, at=1)
    store.snapshot(one, worth=2000.0)
    store.snapshot(two, worth=20.0)
    store.evict(1)
    assert one.snapshot is not None and two.snapshot is None


def test_a_snapshot_in_constant_use_outlives_the_rest() -> None:
    policy = Value()
    store = Store(policy=policy)
    system = store.grow(1, at=0)
    store.snapshot(system, worth=128.0)
    for second in range(1, 20):
        store.now = float(second)
        store.memory.tree.pin(system)
        store.memory.hold(system.snapshot)
        store.memory.unhold(system.snapshot, restored=True)
        store.memory.tree.unpin(system, store.now)
    other = store.grow(2, at=20)
    store.snapshot(other, worth=2000.0)
    store.now = 500.0
    store.evict(1)
    assert other.key not in store.memory.tree.nodes or other.snapshot is None
    assert system.snapshot is not None and other.snapshot is None


def test_sealing_a_known_page_keeps_the_tree_s_own() -> None:
    store = Store()
    tip = store.grow(1, 2, at=1)
    chain: list[Node] = []
    keys = list(page_keys(root_key(b"", "a"), tokens(1, 2, 3)))
    assert store.memory.tree.extend(keys, chain, [97, 98, 99], tip.branch) == [0, 1]
    assert [node.page for node in chain] == [*reversed(frames_of(tip)), 99]


def test_roots_differ_by_namespace_and_salt() -> None:
    names = [b"", b"a", b"ab", b"1:a"]
    salts = ["", "a", "ab", "b", "1:a", "ä", "\udc80"]
    assert len({root_key(name, salt) for name in names for salt in salts}) == len(names) * len(salts)


def test_matching_stops_at_the_first_unknown_page() -> None:
    tree = PrefixTree(lambda node, may_go: None)
    branch = Branch(Tenant(""), 0, 0.0, 0, 0)
    tree.extend(list(page_keys(ROOT, tokens(1, 2, 3))), [], [0, 1, 2], branch)

    def match(root: bytes, text: np.ndarray) -> list[int]:
        return [node.page for node in tree.match(list(page_keys(root, text)))]

    assert match(ROOT, tokens(1, 2, 3, 4)) == [0, 1, 2]
    assert match(ROOT, tokens(1, 9, 3)) == [0]
    assert match(root_key(b"", "other"), tokens(1)) == []
    whole = tokens(1, 2)
    for length, pages in ((0, 0), (127, 0), (128, 1), (129, 1), (255, 1), (256, 2)):
        assert len(match(ROOT, whole[:length])) == pages
