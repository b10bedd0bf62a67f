"""A model without numbers: it writes down what a real one would store, and checks everything it reads.

A row, entry or snapshot holds the name of the token prefix (and tenant) it was made from. Rows also know in how
many layers they are exact, as reference section 3.3 counts it: layer l + 1 is exact at t if layer l is exact at
all positions [t - 127, t]. Whatever a plan makes the model read must be there, be of the right prefix, and be
exact where it matters; then a real model computes the same tokens as without any cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from triptych.cache.geometry import trapezoid_start
from triptych.words import Chunk, SlotSave, SnapshotWrite, StepPlan, TokenIds

RING = 260
Ids = npt.NDArray[np.uint64]
_WEIGHTS = np.random.default_rng(7).integers(1, 2**63, 1 << 15, dtype=np.uint64) | np.uint64(1)
_NOTHING = np.uint64(0)


def prefix_ids(tokens: TokenIds, salt: str) -> Ids:
    """Names of the prefixes that end at each token [n]: equal only for equal prefixes of the same tenant."""
    return _extended(_seed(salt), tokens)[1:]


def _seed(salt: str) -> Ids:
    return np.frombuffer(salt.encode().ljust(8, b"\1")[:8], np.uint64)


def _extended(known: Ids, tokens: TokenIds) -> Ids:
    """`known` [1 + m], a seed and m names, and the names of the tokens from m on: [1 + n]."""
    done = len(known) - 1
    terms = (tokens[done:].astype(np.uint64) + np.uint64(1)) * _WEIGHTS[done : len(tokens)]
    return np.concatenate([known, known[-1] + np.cumsum(terms, dtype=np.uint64)])


def token_after(prefix: int, vocab: int) -> int:
    """What the model says after the prefix of this name."""
    return (prefix >> 33) % vocab


@dataclass
class Slot:
    """Rings of one window slot: which position a row is of, its prefix, and in how many layers it is exact."""

    owner: str = ""
    processed: int = 0
    position: npt.NDArray[np.int64] = field(default_factory=lambda: np.full(RING, -1))
    prefix: Ids = field(default_factory=lambda: np.zeros(RING, np.uint64))
    depth: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(RING, np.int64))
    ran_from: int = 0

    def put(self, positions: npt.NDArray[np.int64], prefix: Ids, depth: npt.NDArray[np.int64]) -> None:
        """Write rows; where more than 260 are given, the last ones stay."""
        at = positions[-RING:] % RING
        self.position[at], self.prefix[at], self.depth[at] = positions[-RING:], prefix[-RING:], depth[-RING:]


@dataclass(frozen=True)
class Stored:
    """A snapshot: rows [first, boundary - 4)."""

    boundary: int
    prefix: Ids


class FakeModel:
    """Frames and slots with checked content. `layers` as the manager believes; `exact`: no bounded replays."""

    def __init__(self, frames: int, slots: int, layers: int, *, exact: bool = True) -> None:
        self.layers = layers
        self.exact = exact
        self.csa = np.zeros((frames, 32), np.uint64)
        self.hca = np.zeros(frames, np.uint64)
        self.slots = [Slot() for _ in range(slots)]
        self.snapshots: dict[tuple[int, ...], Stored] = {}
        self._part_of: dict[int, tuple[int, ...]] = {}
        self.rows_run = 0
        self._names: dict[str, Ids] = {}

    def names(self, request_id: str, tokens: TokenIds, salt: str) -> Ids:
        """`prefix_ids(tokens, salt)`; only what is new since the last call is worked out."""
        known = self._names.get(request_id, _seed(salt))
        known = self._names[request_id] = _extended(known, tokens)
        return known[1 : len(tokens) + 1]

    def run(self, plan: StepPlan, texts: Mapping[str, tuple[TokenIds, str]]) -> None:
        """Execute a plan. `texts[id]` are all tokens of a request, as its client knows them, and its salt."""
        self.save(plan.saves)
        for chunk in plan.chunks:
            tokens, salt = texts[chunk.request_id]
            self._begin(chunk, self.names(chunk.request_id, tokens, salt))
        for chunk in plan.chunks:
            tokens, salt = texts[chunk.request_id]
            assert np.array_equal(chunk.tokens, tokens[chunk.start : chunk.end]), chunk
            assert chunk.samples == (chunk.end == len(tokens)), chunk
            self._run(chunk, self.names(chunk.request_id, tokens, salt))

    def save(self, saves: Iterable[SlotSave]) -> None:
        """Copy rows out of slots."""
        for save in saves:
            self._save(save)

    def poison(self, frames: list[int]) -> None:
        """Nobody may read these any more."""
        self.csa[frames] = _NOTHING
        self.hca[frames] = _NOTHING
        self._overwrite(frames)

    def _overwrite(self, frames: Iterable[int]) -> None:
        """Snapshots that lie in `frames`, even in part, are gone."""
        for frame in frames:
            whole = self._part_of.pop(frame, None)
            if whole is not None:
                self.snapshots.pop(whole, None)
                for other in whole:
                    self._part_of.pop(other, None)

    def content(self, kind: str, frames: tuple[int, ...]) -> object:
        """What an object is, to be kept elsewhere."""
        if kind == "page":
            return self.csa[frames[0]].tolist(), int(self.hca[frames[0]])
        stored = self.snapshots[frames]
        return stored.boundary, stored.prefix.tolist()

    def place(self, kind: str, frames: tuple[int, ...], content: object) -> None:
        """An object comes back."""
        first, second = content  # type: ignore[misc]
        self.poison(list(frames))
        if kind == "page":
            self.csa[frames[0]], self.hca[frames[0]] = np.asarray(first, np.uint64), np.uint64(second)
        else:
            self._keep(frames, Stored(first, np.asarray(second, np.uint64)))

    def _keep(self, frames: tuple[int, ...], stored: Stored) -> None:
        self.poison(list(frames))
        self.snapshots[frames] = stored
        self._part_of.update(dict.fromkeys(frames, frames))

    def page_content(self, page: int) -> tuple[int, ...]:
        """What page holds, comparable."""
        return (*self.csa[page].tolist(), int(self.hca[page]))

    # ---- one chunk

    def _begin(self, chunk: Chunk, ids: Ids) -> None:
        slot = self.slots[chunk.slot]
        if chunk.restore is None and (slot.owner, slot.processed) == (chunk.request_id, chunk.start):
            return
        # a new owner must not find anything by luck
        slot = self.slots[chunk.slot] = Slot(chunk.request_id, chunk.start, ran_from=chunk.start)
        if chunk.restore is None:
            assert chunk.read_from == chunk.start, f"no window before {chunk.start}, yet read from {chunk.read_from}"
            return
        stored = self.snapshots[chunk.restore]
        boundary = chunk.start + 4
        first = max(0, boundary - 132)
        assert stored.boundary == boundary and chunk.read_from == first, (stored.boundary, chunk)
        assert np.array_equal(stored.prefix, ids[first : boundary - 4]), "the snapshot is of another prefix"
        rows = np.arange(first, boundary - 4)
        slot.put(rows, stored.prefix, np.full(len(rows), self.layers))

    def _run(self, chunk: Chunk, ids: Ids) -> None:
        slot = self.slots[chunk.slot]
        self._check_entries(chunk, ids, max(chunk.start, chunk.write_from))
        past = np.arange(max(chunk.read_from, chunk.start - 127), chunk.start)
        assert np.array_equal(slot.position[past % RING], past), f"window rows missing before {chunk.start}"
        assert np.array_equal(slot.prefix[past % RING], ids[past]), f"window rows of another prefix, {chunk.start}"
        low = max(0, chunk.start - 260)
        rows = np.arange(low, chunk.end)
        depth = self._depths(chunk, slot, rows)
        if not self.exact:
            depth[:] = self.layers
        if chunk.samples:
            # the last row sees exact windows in every layer
            assert (depth[max(0, len(depth) - 128) :] == self.layers).all(), f"inexact window at {chunk.end}"
        self._write_entries(chunk, ids, depth, low)
        new = rows[chunk.start - low :]
        for write in chunk.snapshots:
            assert chunk.start < write.position <= chunk.end, (write, chunk)
            self._store(write, chunk.read_from, ids, depth, low)
        slot.put(new, ids[new], depth[new - low])
        slot.processed = chunk.end
        self.rows_run += len(new)

    def _depths(self, chunk: Chunk, slot: Slot, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """In how many layers each row is exact; 0 where there is none."""
        if chunk.rows == 1 and len(rows) > 128 and (slot.depth == self.layers).all():
            return np.full(len(rows), self.layers)
        ran = self._layers_run(chunk, rows)
        held = slot.position[rows % RING] == rows
        depth = np.where(held & (rows < chunk.start), slot.depth[rows % RING], 0)
        depth[rows < chunk.read_from] = 0
        for t in range(chunk.start, chunk.end):
            at = t - rows[0]
            window = depth[max(0, at - 127) : at]
            depth[at] = min(int(ran[at]), 1 + (int(window.min()) if len(window) else self.layers))
        return depth

    def _layers_run(self, chunk: Chunk, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many layers run each row: all, but for those of a trapezoid."""
        ran = np.full(len(rows), self.layers)
        if chunk.replay_to:
            starts = [trapezoid_start(chunk.replay_to, self.layers, layer) for layer in range(self.layers)]
            ran = np.searchsorted(starts, rows, side="right")
        return ran

    def _check_entries(self, chunk: Chunk, ids: Ids, upto: int) -> None:
        """Entries completed before `upto` are there and of this prefix."""
        upto = min(upto, chunk.end)
        pages = np.asarray(chunk.pages)
        groups = np.arange(upto // 4)
        held = self.csa[pages[groups // 32], groups % 32]
        assert np.array_equal(held, ids[groups * 4 + 3]), f"CSA entries before {upto} are wrong: {chunk}"
        groups = np.arange(upto // 128)
        assert np.array_equal(self.hca[pages[groups]], ids[groups * 128 + 127]), f"HCA entries before {upto} are wrong"

    def _write_entries(self, chunk: Chunk, ids: Ids, depth: npt.NDArray[np.int64], low: int) -> None:
        """Entries completed in [max(start, write_from), end), pooled from rows that must have been run and be exact."""
        begin, pages = max(chunk.start, chunk.write_from), chunk.pages
        ran_from = self.slots[chunk.slot].ran_from
        for ratio, reach in ((4, 8), (128, 128)):
            for group in range(begin // ratio, chunk.end // ratio):
                last = group * ratio + ratio - 1
                first = max(0, last + 1 - reach)
                # compressor rows are in no snapshot: they exist only from where this run began
                assert first >= ran_from or not self.exact, (
                    f"entry at {last} pools rows of {first}, run since {ran_from}"
                )
                assert (depth[first - low : last + 1 - low] == self.layers).all(), f"entry at {last} is inexact"
                self._overwrite([int(pages[last // 128])])
                if ratio == 4:
                    self.csa[pages[group // 32], group % 32] = ids[last]
                else:
                    self.hca[pages[group]] = ids[last]

    # ---- snapshots

    def _store(self, write: SnapshotWrite, read_from: int, ids: Ids, depth: npt.NDArray[np.int64], low: int) -> None:
        first, last = max(0, write.position - 132), write.position - 4
        assert not self.exact or (first >= read_from and (depth[first - low : last - low] == self.layers).all()), (
            f"inexact {write}"
        )
        self._keep(write.frames, Stored(write.position, ids[first:last]))

    def _save(self, save: SlotSave) -> None:
        slot = self.slots[save.slot]
        rows = np.arange(max(0, save.position - 132), save.position - 4)
        assert np.array_equal(slot.position[rows % RING], rows), f"{save} finds its rows overwritten"
        assert not self.exact or (slot.depth[rows % RING] == self.layers).all(), f"inexact {save}"
        assert save.position <= slot.processed, f"{save} beyond what ran"
        self._keep(save.frames, Stored(save.position, slot.prefix[rows % RING].copy()))
