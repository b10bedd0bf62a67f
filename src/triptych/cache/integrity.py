"""Everything that must be true of a cache manager between two calls. Linear in its size; for tests and idle time."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triptych.cache.manager import CacheManager
    from triptych.cache.prefix import Node


def check(manager: CacheManager) -> None:
    """Raise AssertionError naming the first thing that is out of place."""
    _check_pages(manager)
    _check_slots(manager)
    _check_tree(manager)
    _check_snapshots(manager)
    _check_holdings(manager)


def _claim(holds: bool, sentence: str) -> None:
    if not holds:
        raise AssertionError(sentence)


def _check_pages(manager: CacheManager) -> None:
    places: Counter[int] = Counter(manager.free_pages)
    places.update(node.page for node in manager.tree.nodes.values())
    for holding in manager.holdings.values():
        places.update(holding.table[len(holding.chain) : holding.count].tolist())
    twice = [page for page, times in places.items() if times > 1]
    _claim(not twice, f"Page {twice[:1]} is in two places.")
    lost = set(range(manager.capacity.pages)) ^ set(places)
    _claim(not lost, f"Pages {sorted(lost)[:3]} are neither free, held nor cached, or do not exist.")


def _check_slots(manager: CacheManager) -> None:
    slots = sorted([*manager.free_slots, *(holding.slot for holding in manager.holdings.values())])
    _claim(slots == list(range(manager.capacity.slots)), f"Slots are {slots}, not each once.")


def _check_tree(manager: CacheManager) -> None:
    tree = manager.tree
    children: Counter[Node] = Counter()
    pins: Counter[Node] = Counter(h.chain[-1] for h in manager.holdings.values() if h.chain)
    for key, node in tree.nodes.items():
        _claim(node.key == key, f"The node of page {node.page} is filed under another key.")
        if node.parent is not None:
            _claim(tree.nodes.get(node.parent.key) is node.parent, f"The parent of page {node.page} is gone.")
            _claim(node.depth == node.parent.depth + 1, f"The depth of page {node.page} is wrong.")
            children[node.parent] += 1
    for node in sorted(tree.nodes.values(), key=lambda one: -one.depth):
        if pins[node] and node.parent is not None:
            pins[node.parent] += 1
    for node in tree.nodes.values():
        _claim(node.children == children[node], f"Page {node.page} counts {node.children} children.")
        _claim(node.pins == pins[node], f"Page {node.page} has {node.pins} pins for {pins[node]} holders.")
        leaf = not node.children and not node.pins
        _claim((node in tree.leaves) == leaf, f"Page {node.page} is evictable or not, against its queue.")
    _claim(set(tree.leaves) <= set(tree.nodes.values()), "The eviction queue holds a node that left the tree.")
    protected = sum(1 for node in tree.nodes.values() if node.pins)
    _claim(tree.protected == protected, f"{tree.protected} pages are counted as protected, {protected} are.")


def _check_snapshots(manager: CacheManager) -> None:
    store = manager.snapshots
    reserved = [write.snapshot for holding in manager.holdings.values() for write in holding.reserved]
    _claim(sorted(reserved) == sorted(store.reserved), "A snapshot is reserved without a writer, or written twice.")
    ids = sorted([*store.free, *store.reserved, *store.published])
    _claim(ids == list(range(store.capacity)), f"Snapshots are {ids}, not each once.")
    holds = Counter(h.restoring.snapshot for h in manager.holdings.values() if h.restoring is not None)
    _claim(dict(holds) == store.holds, f"Snapshot holds are {store.holds} for restores {dict(holds)}.")
    for snapshot, node in store.published.items():
        _claim(node.snapshot == snapshot, f"Snapshot {snapshot} and its boundary disagree.")
        _claim(manager.tree.nodes.get(node.key) is node, f"Snapshot {snapshot} outlived its page.")
        free_to_go = snapshot not in holds
        _claim((node in store.queue) == free_to_go, f"Snapshot {snapshot} may go or not, against its queue.")
    marked = sum(1 for node in manager.tree.nodes.values() if node.snapshot >= 0)
    _claim(marked == len(store.published), "A boundary names a snapshot that is not published.")
    _claim(len(store.queue) == len(store.published) - len(holds), "The snapshot queue holds a boundary without one.")


def _check_holdings(manager: CacheManager) -> None:
    for request_id, holding in manager.holdings.items():
        sealed = len(holding.chain)
        _claim(sealed <= holding.count <= len(holding.table), f"Request {request_id} has a wrong page count.")
        _claim(holding.processed <= holding.count * 128, f"Request {request_id} ran beyond its pages.")
        pages = [node.page for node in holding.chain]
        _claim(holding.table[:sealed].tolist() == pages, f"Request {request_id} and the tree disagree on pages.")
        for above, below in zip(holding.chain, holding.chain[1:], strict=False):
            _claim(below.parent is above, f"The chain of request {request_id} is broken.")
        for node in holding.chain:
            _claim(manager.tree.nodes.get(node.key) is node, f"Request {request_id} lost page {node.page}.")
