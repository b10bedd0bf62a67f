"""The prefix tree: sealed pages by what their tokens are.

A node's key is a hash of (parent's key, its 128 token ids); the first page's parent key is a hash of the
namespace (weights, formats) and the tenant's salt. So one key names one whole prefix of one tenant, and a
prompt is matched by walking a dictionary, without comparing tokens.

Parents outlive children: only a leaf that nobody pins is given up. A request pins the last node of its
chain; a pin is counted once in each ancestor that had none, so that the number of protected pages is known.

    root key -> A(pins 1) -> B(pins 2) -> C(pins 1)      tip of one request
                                \\-> D(pins 1)            tip of another
                 \\-> E(pins 0) -> F(pins 0, leaf)        F may go, then E
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256

from triptych.cache.eviction import EvictionQueue
from triptych.config import PAGE
from triptych.words import TokenIds

PAGE_ID_BYTES = PAGE * 4


class Node:
    """One sealed page. `depth` counts pages from 1; `used` and `snapshot_used` are ticks of the manager.

    `pins` = requests whose chain ends here + children that have pins.
    """

    __slots__ = ("children", "depth", "key", "page", "parent", "pins", "snapshot", "snapshot_used", "used")

    def __init__(self, key: bytes, parent: Node | None, page: int, tick: int) -> None:
        self.key = key
        self.parent = parent
        self.page = page
        self.depth: int = 1 if parent is None else parent.depth + 1
        self.children = 0
        self.pins = 0
        self.used = tick
        self.snapshot = -1
        self.snapshot_used = tick

    @property
    def end(self) -> int:
        """The boundary after this page, in tokens."""
        return self.depth * PAGE


def root_key(namespace: bytes, salt: str) -> bytes:
    """The parent key of first pages. Length-prefixed, so that no two (namespace, salt) pairs run together."""
    raw = salt.encode("utf-8", "surrogatepass")
    return sha256(b"%d:%b%d:%b" % (len(namespace), namespace, len(raw), raw)).digest()


class PrefixTree:
    """All sealed pages of one manager. `rank` orders what is given up first (see retention.py)."""

    def __init__(self, rank: Callable[[Node], float]) -> None:
        self.nodes: dict[bytes, Node] = {}
        self.leaves: EvictionQueue[Node] = EvictionQueue()
        self.protected = 0
        self._rank = rank

    @property
    def evictable(self) -> int:
        """Pages that can be given up one after the other: those without pins."""
        return len(self.nodes) - self.protected

    def match(self, root: bytes, tokens: TokenIds) -> list[Node]:
        """The longest chain of nodes whose pages lie wholly inside `tokens`."""
        raw = tokens.tobytes()
        nodes, key, chain = self.nodes, root, []
        for at in range(0, len(raw) - PAGE_ID_BYTES + 1, PAGE_ID_BYTES):
            key = sha256(key + raw[at : at + PAGE_ID_BYTES]).digest()
            node = nodes.get(key)
            if node is None:
                break
            chain.append(node)
        return chain

    def extend(self, root: bytes, chain: list[Node], tokens: TokenIds, pages: Sequence[int], tick: int) -> list[int]:
        """Seal `pages`, which hold `tokens` [128 len(pages)] and follow `chain`; append their nodes to it.

        Where a node exists already the tree's page stands. Returns the indices into `pages` of such duplicates.
        """
        raw = tokens.tobytes()
        parent = chain[-1] if chain else None
        key = parent.key if parent else root
        duplicates = []
        for index, page in enumerate(pages):
            at = index * PAGE_ID_BYTES
            key = sha256(key + raw[at : at + PAGE_ID_BYTES]).digest()
            node = self.nodes.get(key)
            if node is None:
                node = self.nodes[key] = Node(key, parent, page, tick)
                if parent is not None:
                    parent.children += 1
                    # children first: an adopted parent may have been waiting as a leaf
                    self.leaves.discard(parent)
            else:
                duplicates.append(index)
            chain.append(node)
            parent = node
        return duplicates

    def pin(self, tip: Node) -> None:
        """Protect `tip` and its ancestors from eviction."""
        node: Node | None = tip
        while node is not None:
            node.pins += 1
            if node.pins > 1:
                return
            self.protected += 1
            self.leaves.discard(node)
            node = node.parent

    def unpin(self, tip: Node, tick: int) -> None:
        """Undo one `pin(tip)`; what loses its last pin counts as used at `tick`."""
        node: Node | None = tip
        while node is not None:
            node.pins -= 1
            if node.pins:
                return
            self.protected -= 1
            node.used = max(node.used, tick)
            if not node.children:
                self.leaves.put(node, self._rank(node))
            node = node.parent

    def evict(self) -> Node:
        """Take out the leaf of lowest rank; its parent inherits the time of use. IndexError if all are pinned."""
        node = self.leaves.pop()
        self._detach(node)
        return node

    def remove(self, node: Node) -> bool:
        """Take out `node` if it is a leaf without pins; False if not."""
        if node.children or node.pins or self.nodes.get(node.key) is not node:
            return False
        self.leaves.discard(node)
        self._detach(node)
        return True

    def _detach(self, node: Node) -> None:
        del self.nodes[node.key]
        parent = node.parent
        if parent is None:
            return
        parent.children -= 1
        # whoever used the child used its parents too
        parent.used = max(parent.used, node.used)
        if not parent.children and not parent.pins:
            self.leaves.put(parent, self._rank(parent))
