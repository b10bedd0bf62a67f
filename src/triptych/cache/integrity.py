"""Everything that must be true of a cache manager between two calls. Linear in its size; for tests and idle time."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triptych.cache.manager import CacheManager
    from triptych.cache.prefix import Node, Snapshot, Tenant


def check(manager: CacheManager) -> None:
    """Raise AssertionError naming the first thing that is out of place."""
    _check_frames(manager)
    _check_slots(manager)
    _check_tree(manager)
    _check_snapshots(manager)
    _check_queue(manager)
    _check_tenants(manager)
    _check_holdings(manager)
    if manager.tiers.host is not None:
        manager.tiers.host.check()


def _claim(holds: bool, sentence: str) -> None:
    if not holds:
        raise AssertionError(sentence)


def _check_frames(manager: CacheManager) -> None:
    memory = manager.memory
    places: Counter[int] = Counter(memory.free)
    places.update(node.page for node in memory.tree.nodes.values())
    for snapshot in memory.snapshots.values():
        places.update(snapshot.frames)
    for holding in manager.holdings.values():
        places.update(holding.table[len(holding.chain) : holding.count].tolist())
        for write in holding.reserved:
            places.update(write.frames)
    for frames in manager.tiers.frames_loading():
        places.update(frames)
    twice = [frame for frame, times in places.items() if times > 1]
    _claim(not twice, f"Frame {twice[:1]} is in two places.")
    lost = set(range(manager.capacity.frames)) ^ set(places)
    _claim(not lost, f"Frames {sorted(lost)[:3]} are neither free, held nor cached, or do not exist.")


def _check_slots(manager: CacheManager) -> None:
    slots = sorted([*manager.free_slots, *(holding.slot for holding in manager.holdings.values())])
    _claim(slots == list(range(manager.capacity.slots)), f"Slots are {slots}, not each once.")


def _check_tree(manager: CacheManager) -> None:
    tree = manager.memory.tree
    children: Counter[Node] = Counter()
    pins: Counter[Node] = Counter(h.chain[-1] for h in manager.holdings.values() if h.chain)
    pins.update(manager.leases.pinned)
    pins.update(manager.tiers.tips())
    pins.update(manager.prefetcher.tips)
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
    protected = sum(1 for node in tree.nodes.values() if node.pins)
    _claim(tree.protected == protected, f"{tree.protected} pages are counted as protected, {protected} are.")


def _check_snapshots(manager: CacheManager) -> None:
    memory = manager.memory
    holds: Counter[Snapshot] = Counter(h.restoring for h in manager.holdings.values() if h.restoring is not None)
    holds.update(manager.tiers.snapshots())
    for frames, snapshot in memory.snapshots.items():
        _claim(snapshot.frames == frames, f"The snapshot at {snapshot.node.end} is filed under other frames.")
        node = snapshot.node
        _claim(node.snapshot is snapshot, f"The snapshot at {node.end} and its boundary disagree.")
        _claim(memory.tree.nodes.get(node.key) is node, f"The snapshot at {node.end} outlived its page.")
        _claim(len(snapshot.frames) == memory.snapshot_frames, f"The snapshot at {node.end} has a wrong size.")
        _claim(snapshot.holds == holds[snapshot], f"{snapshot.holds} holds of the snapshot at {node.end}.")
    _claim(set(holds) <= set(memory.snapshots.values()), "A snapshot that is being restored was given up.")
    _claim(memory.held == len(holds), f"{memory.held} snapshots are counted as held, {len(holds)} are.")
    marked = sum(1 for node in memory.tree.nodes.values() if node.snapshot is not None)
    _claim(marked == len(memory.snapshots), "A boundary names a snapshot that is not published.")


def _check_queue(manager: CacheManager) -> None:
    memory = manager.memory
    may_go: set[Node | Snapshot] = {n for n in memory.tree.nodes.values() if not n.children and not n.pins}
    may_go |= {snapshot for snapshot in memory.snapshots.values() if not snapshot.holds}
    queue = set(memory.candidates())
    _claim(not queue - may_go, "The eviction queue holds something that may not go.")
    _claim(not may_go - queue, "Something that may go is missing from the eviction queue.")


def _check_tenants(manager: CacheManager) -> None:
    frames: Counter[Tenant] = Counter()
    for node in manager.memory.tree.nodes.values():
        frames[node.branch.tenant] += 1
    for snapshot in manager.memory.snapshots.values():
        frames[snapshot.node.branch.tenant] += len(snapshot.frames)
    for tenant, count in frames.items():
        _claim(tenant.frames == count, f"A tenant is charged {tenant.frames} frames for {count}.")


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
            _claim(manager.memory.tree.nodes.get(node.key) is node, f"Request {request_id} lost page {node.page}.")
