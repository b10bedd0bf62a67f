"""What is kept on the device, and what goes when room is needed: frames, the prefix tree, snapshots.

Pages and snapshots draw on one arena of equal frames, so that neither side strands memory the other needs:

    frames  | page | page | snap | page | snap | free | ...      a page is 1 frame, a snapshot k of them, anywhere

Everything that may go stands in one queue by the rank that the retention policy gave it when it lost its last user;
the lowest goes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from triptych.cache.eviction import EvictionQueue
from triptych.cache.prefix import Node, PrefixTree, Snapshot, Tenant
from triptych.cache.retention import RetentionPolicy

Item = Node | Snapshot
NEVER_AGAIN = float("-inf")


class Memory:
    """The arena and what is in it. `on_evict(item)` is called before the frames of an item are given away."""

    def __init__(
        self,
        frames: int,
        snapshot_frames: int,
        policy: RetentionPolicy,
        clock: Callable[[], float],
        quota: float = 1.0,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        self.frames = frames
        self.snapshot_frames = snapshot_frames
        self.free = list(range(frames - 1, -1, -1))
        self.tree = PrefixTree(self._set_leaf)
        self.snapshots: dict[tuple[int, ...], Snapshot] = {}
        self.held = 0
        self.peak = 0
        self.pages_evicted = 0
        self.snapshots_evicted = 0
        self.on_evict: Callable[[Item], None] = lambda item: None
        self._policy = policy
        self._clock = clock
        self._quota = quota * frames
        self._shares = {salt: share * frames for salt, share in (shares or {}).items()}
        self._bounded = quota < 1.0 or bool(self._shares)
        self._queue: EvictionQueue[Item] = EvictionQueue()
        self._own: dict[Tenant, EvictionQueue[Item]] = {}

    # ---- room

    @property
    def evictable(self) -> int:
        """Frames that can be freed: pages without pins, snapshots that nobody restores."""
        return self.tree.evictable + self.snapshot_frames * (len(self.snapshots) - self.held)

    def take(self, count: int, tenant: Tenant) -> list[int]:
        """`count` frames, evicting by rank; the caller made sure that free + evictable holds them.

        A tenant beyond its quota gives up its own first.
        """
        if self._bounded:
            most = self._shares.get(tenant.salt, self._quota)
            # asked anew each time: a queue that runs empty is dropped, and a parent may follow its child
            while len(self.free) < count and tenant.frames + count > most and tenant in self._own:
                self.evict(self._own[tenant].peek()[1])
        while len(self.free) < count:
            self.evict(self._queue.peek()[1])
        keep = len(self.free) - count
        taken = self.free[keep:]
        del self.free[keep:]
        self.peak = max(self.peak, self.frames - len(self.free))
        return taken

    def evict(self, item: Item) -> None:
        """Give up one item; a page takes its snapshot with it."""
        if isinstance(item, Node):
            self.pages_evicted += 1
            if item.snapshot is not None:
                self.evict(item.snapshot)
            self.on_evict(item)
            self.drop_page(item)
        else:
            self.snapshots_evicted += 1
            self.on_evict(item)
            self.drop_snapshot(item)

    def drop_page(self, node: Node) -> None:
        """Free the page of a leaf without pins, and its snapshot; nobody is told."""
        if node.snapshot is not None:
            self.drop_snapshot(node.snapshot)
        self.tree.remove(node)
        self.free.append(node.page)

    def remove_all(self, nodes: Iterable[Node]) -> None:
        """Drop `nodes`, children first, up to the first that others use."""
        for node in nodes:
            held = node.snapshot is not None and node.snapshot.holds
            if node.children or node.pins or held or self.tree.nodes.get(node.key) is not node:
                return
            self.drop_page(node)

    def clear(self) -> None:
        """Drop everything that nobody uses; nobody is told."""
        while self._queue:
            item = self._queue.peek()[1]
            if isinstance(item, Node):
                self.drop_page(item)
            else:
                self.drop_snapshot(item)

    # ---- snapshots

    def publish(self, node: Node, frames: tuple[int, ...], worth: float) -> bool:
        """Make the written `frames` the snapshot of `node`; False, and they are free, if it has one already."""
        if node.snapshot is not None:
            self.free.extend(frames)
            return False
        snapshot = node.snapshot = Snapshot(node, frames, self._clock(), worth)
        self.snapshots[frames] = snapshot
        node.branch.tenant.frames += len(frames)
        self._offer(snapshot)
        if node in self._queue:  # both by what is known now
            self._offer(node)
        return True

    def hold(self, snapshot: Snapshot) -> None:
        """Keep `snapshot` until `unhold`."""
        snapshot.holds += 1
        if snapshot.holds == 1:
            self.held += 1
            self._withdraw(snapshot)

    def unhold(self, snapshot: Snapshot, *, restored: bool = False) -> None:
        """Undo one `hold`, whose reason was perhaps that it was `restored`."""
        if restored:
            snapshot.use(self._clock())
        snapshot.holds -= 1
        if not snapshot.holds:
            self.held -= 1
            self._offer(snapshot)

    def drop_snapshot(self, snapshot: Snapshot) -> None:
        """Free the frames of a snapshot that nobody restores."""
        assert not snapshot.holds
        self._withdraw(snapshot)
        del self.snapshots[snapshot.frames]
        snapshot.node.snapshot = None
        snapshot.node.branch.tenant.frames -= len(snapshot.frames)
        self.free.extend(snapshot.frames)

    # ---- who may go

    def refresh(self, node: Node) -> None:
        """Rank `node` and its snapshot anew, after something other than a use changed their value."""
        if node in self._queue:
            self._offer(node)
        if node.snapshot is not None and node.snapshot in self._queue:
            self._offer(node.snapshot)

    def candidates(self) -> Iterable[Item]:
        """All that may go now, in no order."""
        return iter(self._queue)

    def rank(self, item: Item) -> float:
        """What the policy says of an item now."""
        branch = item.branch if isinstance(item, Node) else item.node.branch
        if branch.expired:
            return NEVER_AGAIN
        now = self._clock()
        return self._policy.rank(item, now)

    def _set_leaf(self, node: Node, may_go: bool) -> None:
        if may_go:
            self._offer(node)
        else:
            self._withdraw(node)

    def _offer(self, item: Item) -> None:
        rank = self.rank(item)
        self._queue.put(item, rank)
        if self._bounded:
            branch = item.branch if isinstance(item, Node) else item.node.branch
            self._own.setdefault(branch.tenant, EvictionQueue()).put(item, rank)

    def _withdraw(self, item: Item) -> None:
        self._queue.discard(item)
        if self._bounded:
            branch = item.branch if isinstance(item, Node) else item.node.branch
            own = self._own.get(branch.tenant)
            if own is not None:
                own.discard(item)
                if not own:
                    del self._own[branch.tenant]
