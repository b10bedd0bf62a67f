"""The order in which pages go: by rank, leaves before parents, never what is pinned."""

from __future__ import annotations

import random

import numpy as np
import pytest

from triptych.cache.eviction import EvictionQueue
from triptych.cache.prefix import Node, PrefixTree, root_key


def tokens(*pages: int) -> np.ndarray:
    return np.repeat(np.asarray(pages, np.int32), 128)


def grow(tree: PrefixTree, root: bytes, pages: tuple[int, ...], first_page: int, tick: int) -> Node:
    """Seal a chain whose i-th page holds the token pages[i] 128 times; it is used once, at `tick`."""
    chain = tree.match(root, tokens(*pages))
    fresh = list(range(first_page, first_page + len(pages) - len(chain)))
    tree.extend(root, chain, tokens(*pages[len(chain) :]), fresh, tick)
    tree.pin(chain[-1])
    tree.unpin(chain[-1], tick)
    return chain[-1]


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


def test_leaves_go_before_parents_and_old_before_new() -> None:
    tree = PrefixTree(lambda node: node.used)
    root = root_key(b"", "")
    grow(tree, root, (1, 2, 3), first_page=10, tick=1)
    grow(tree, root, (1, 4), first_page=20, tick=2)
    grow(tree, root, (5,), first_page=30, tick=3)
    # page 10 was used by both chains, so it goes with the younger one
    assert [tree.evict().page for _ in range(5)] == [12, 11, 20, 10, 30]
    assert not tree.nodes and not tree.evictable


def test_a_pin_protects_the_whole_chain_and_counts_it_once() -> None:
    tree = PrefixTree(lambda node: node.used)
    root = root_key(b"", "")
    tip = grow(tree, root, (1, 2, 3), first_page=10, tick=1)
    other = grow(tree, root, (1, 4), first_page=20, tick=2)
    tree.pin(tip)
    assert tree.evictable == 1
    tree.pin(other)
    assert tree.evictable == 0
    with pytest.raises(IndexError):
        tree.evict()
    tree.unpin(tip, 3)
    assert [tree.evict().page for _ in range(2)] == [12, 11]
    tree.unpin(other, 4)
    assert [tree.evict().page for _ in range(2)] == [20, 10]


def test_remove_takes_only_leaves_nobody_uses() -> None:
    tree = PrefixTree(lambda node: node.used)
    tip = grow(tree, root_key(b"", ""), (1, 2), first_page=0, tick=1)
    assert tip.parent is not None and not tree.remove(tip.parent)
    tree.pin(tip)
    assert not tree.remove(tip)
    tree.unpin(tip, 2)
    assert tree.remove(tip) and not tree.remove(tip)
    assert tree.evict() is tip.parent


def test_sealing_a_known_page_keeps_the_tree_s_own() -> None:
    tree = PrefixTree(lambda node: node.used)
    root = root_key(b"", "")
    grow(tree, root, (1, 2), first_page=0, tick=1)
    chain: list[Node] = []
    assert tree.extend(root, chain, tokens(1, 2, 3), [7, 8, 9], 2) == [0, 1]
    assert [node.page for node in chain] == [0, 1, 9]


def test_roots_differ_by_namespace_and_salt() -> None:
    names = [b"", b"a", b"ab", b"1:a"]
    salts = ["", "a", "ab", "b", "1:a", "ä", "\udc80"]
    assert len({root_key(name, salt) for name in names for salt in salts}) == len(names) * len(salts)


def test_matching_stops_at_the_first_unknown_page() -> None:
    tree = PrefixTree(lambda node: node.used)
    root = root_key(b"", "")
    grow(tree, root, (1, 2, 3), first_page=0, tick=1)
    assert [node.page for node in tree.match(root, tokens(1, 2, 3, 4))] == [0, 1, 2]
    assert [node.page for node in tree.match(root, tokens(1, 9, 3))] == [0]
    assert tree.match(root_key(b"", "other"), tokens(1)) == []
    whole = tokens(1, 2)
    for length, pages in ((0, 0), (127, 0), (128, 1), (129, 1), (255, 1), (256, 2)):
        assert len(tree.match(root, whole[:length])) == pages
