"""What one admitted request holds of the cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from triptych.cache.prefix import Branch, Node, Snapshot
from triptych.cache.resume import ResumePlan
from triptych.config import PAGE
from triptych.words import CacheHints, SnapshotWrite

PageTable = npt.NDArray[np.int32]


class Room(NamedTuple):
    """Window slots, and frames of the arena."""

    slots: int = 0
    frames: int = 0


NOTHING = Room()


@dataclass(slots=True)
class Holding:
    """`goal` frames are promised to it; `table[:count]` are there.

    `chain` are the nodes of its sealed pages, the last of them pinned; `keys` name its whole pages, sealed or not.
    `places`: boundaries that get a snapshot, and the tokens each is expected to save. `reserved` are snapshots being
    written, `restoring` is the snapshot that its first step reads. `planned` tokens of its prompt are in steps,
    `processed` have run.
    """

    slot: int
    root: bytes
    epoch: int
    plan: ResumePlan
    goal: int
    places: dict[int, float]
    table: PageTable
    chain: list[Node]
    keys: list[bytes]
    branch: Branch
    hints: CacheHints
    count: int = 0
    processed: int = 0
    planned: int = 0
    restoring: Snapshot | None = None
    reserved: list[SnapshotWrite] = field(default_factory=list)

    @property
    def promised(self) -> int:
        """Frames that it still counts on."""
        return max(0, self.goal - self.count)


def pages_for(tokens: int) -> int:
    """Pages that cover `tokens`."""
    return -(-tokens // PAGE)
