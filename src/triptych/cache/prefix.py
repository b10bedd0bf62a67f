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

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from triptych.config import PAGE
from triptych.words import TokenIds

PAGE_ID_BYTES = PAGE * 4

_LATEST = 1 << 22
"""Tokens of all prompts whose keys are kept, at most, apart from the last one: 16 MiB, and 1 MiB of keys."""


@dataclass(eq=False, slots=True)
class Tenant:
    """Who pages belong to. `frames` of the arena hold what only this tenant can find."""

    salt: str
    frames: int = 0


@dataclass(eq=False, slots=True)
class Branch:
    """What one request added to the tree; its pieces are useful together, so they share their history.

    `turn` counts the requests that this one continued, `created` and `used` are clock seconds; its pages begin at
    token `start`, its prompt ends at `prompt`. `chance`: how likely its prompt is used again, and `output_chance` its
    output, relative to the mean. `ttl` seconds after its last use it is the first to go (`expired`).
    """

    tenant: Tenant
    turn: int
    created: float
    start: int
    prompt: int
    session: str | None = None
    ttl: float | None = None
    used: float = 0.0
    chance: float = 1.0
    output_chance: float = 1.0
    expired: bool = False


class Snapshot:
    """Window rows that make the boundary after `node` resumable, in `frames`.

    `worth`: tokens that it is expected to save when its branch is used again. `uses`: how often it was restored,
    `gap`: running mean of the seconds between. `holds` = restores under way.
    """

    __slots__ = ("frames", "gap", "holds", "node", "used", "uses", "worth")

    def __init__(self, node: Node, frames: tuple[int, ...], now: float, worth: float) -> None:
        self.node = node
        self.frames = frames
        self.used = now
        self.worth = worth
        self.uses = 0
        self.gap = 0.0
        self.holds = 0

    def use(self, now: float) -> None:
        """It was restored at `now`."""
        gap = now - self.used
        self.gap = gap if not self.uses else 0.75 * self.gap + 0.25 * gap
        self.uses += 1
        self.used = now


class Node:
    """One sealed page in frame `page`. `depth` counts pages from 1; `used` is clock seconds.

    `pins` = requests whose chain ends here + children that have pins. `origin` names the tier that the page
    was fetched from and no request has used it since.
    """

    __slots__ = ("branch", "children", "depth", "key", "origin", "page", "parent", "pins", "snapshot", "used")

    def __init__(self, key: bytes, parent: Node | None, page: int, branch: Branch, now: float) -> None:
        self.key = key
        self.parent = parent
        self.page = page
        self.branch = branch
        self.depth: int = 1 if parent is None else parent.depth + 1
        self.children = 0
        self.pins = 0
        self.used = now
        self.snapshot: Snapshot | None = None
        self.origin: str | None = None

    @property
    def end(self) -> int:
        """The boundary after this page, in tokens."""
        return self.depth * PAGE


def root_key(namespace: bytes, salt: str) -> bytes:
    """The parent key of first pages. Length-prefixed, so that no two (namespace, salt) pairs run together."""
    raw = salt.encode("utf-8", "surrogatepass")
    return sha256(b"%d:%b%d:%b" % (len(namespace), namespace, len(raw), raw)).digest()


def page_keys(parent: bytes, tokens: TokenIds) -> Iterator[bytes]:
    """Keys of the whole pages of `tokens`, which follow the page (or root) named `parent`."""
    raw, key = tokens.tobytes(), parent
    for at in range(0, len(raw) - PAGE_ID_BYTES + 1, PAGE_ID_BYTES):
        key = sha256(key + raw[at : at + PAGE_ID_BYTES]).digest()
        yield key


@dataclass(frozen=True, eq=False, slots=True)
class _Named:
    """A prompt and the keys of its whole pages, at least one."""

    root: bytes
    tokens: TokenIds
    keys: list[bytes]

    def begins(self, tokens: TokenIds) -> bool:
        """Whether its whole pages are the first of `tokens`. Of those that are not most differ in the last token."""
        end = len(self.keys) * PAGE
        if end > len(tokens) or self.tokens[end - 1] != tokens[end - 1]:
            return False
        return np.array_equal(self.tokens[:end], tokens[:end])


class Names:
    """Keys of waiting prompts' pages, worked out once for each: hashing a long prompt in each step would be dear. Those
    of the latest prompts are kept, since the next ones are mostly longer ones of the same conversations."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[bytes, list[bytes]]] = {}
        self._latest: deque[_Named] = deque(maxlen=32)

    def of(self, request_id: str, root: bytes, tokens: TokenIds) -> list[bytes]:
        """The keys of a request's whole pages, which follow `root`."""
        known = self._known.get(request_id)
        if known is None or known[0] != root:
            known = self._known[request_id] = root, self._keys(root, tokens)
        return known[1]

    def forget(self, request_id: str) -> None:
        """The request waits no more."""
        self._known.pop(request_id, None)

    def _keys(self, root: bytes, tokens: TokenIds) -> list[bytes]:
        older = (old.keys for old in self._latest if old.root == root and old.begins(tokens))
        begun: list[bytes] = max(older, key=len, default=[])
        keys = begun + list(page_keys(begun[-1] if begun else root, tokens[len(begun) * PAGE :]))
        if len(keys) > len(begun):
            self._latest.append(_Named(root, tokens, keys.copy()))
            while sum(len(old.tokens) for old in self._latest) > max(_LATEST, len(tokens)):
                self._latest.popleft()
        return keys


class PrefixTree:
    """All sealed pages on the device. `set_leaf(node, may_go)` is told whenever a node may or may not be given up."""

    def __init__(self, set_leaf: Callable[[Node, bool], None]) -> None:
        self.nodes: dict[bytes, Node] = {}
        self.protected = 0
        self._set_leaf = set_leaf

    @property
    def evictable(self) -> int:
        """Pages that can be given up one after the other: those without pins."""
        return len(self.nodes) - self.protected

    def match(self, keys: Sequence[bytes]) -> list[Node]:
        """The longest chain of nodes named by `keys`, from the first on."""
        nodes, chain = self.nodes, []
        for key in keys:
            node = nodes.get(key)
            if node is None:
                break
            chain.append(node)
        return chain

    def extend(self, keys: Sequence[bytes], chain: list[Node], pages: Sequence[int], branch: Branch) -> list[int]:
        """Seal `pages`, named by `keys` and following `chain`; append their nodes to it.

        Where a node exists already the tree's page stands. Returns the indices into `pages` of such duplicates.
        """
        parent = chain[-1] if chain else None
        duplicates = []
        for index, (key, page) in enumerate(zip(keys, pages, strict=True)):
            node = self.nodes.get(key)
            if node is None:
                node = self.nodes[key] = Node(key, parent, page, branch, branch.used)
                branch.tenant.frames += 1
                if parent is not None:
                    parent.children += 1
                    # children first: an adopted parent may have been waiting as a leaf
                    if parent.children == 1 and not parent.pins:
                        self._set_leaf(parent, False)
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
            if not node.children:
                self._set_leaf(node, False)
            node = node.parent

    def unpin(self, tip: Node, now: float) -> None:
        """Undo one `pin(tip)`; what loses its last pin counts as used at `now`."""
        node: Node | None = tip
        while node is not None:
            node.pins -= 1
            if node.pins:
                return
            self.protected -= 1
            node.used = max(node.used, now)
            if not node.children:
                self._set_leaf(node, True)
            node = node.parent

    def remove(self, node: Node) -> None:
        """Take out a leaf without pins; its parent inherits the time of use."""
        assert not node.children and not node.pins, node.key
        del self.nodes[node.key]
        self._set_leaf(node, False)
        node.branch.tenant.frames -= 1
        parent = node.parent
        if parent is None:
            return
        parent.children -= 1
        # whoever used the child used its parents too
        parent.used = max(parent.used, node.used)
        if not parent.children and not parent.pins:
            self._set_leaf(parent, True)
