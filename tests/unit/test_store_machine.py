"""Random histories of the disk store against a dictionary: exact bytes or a miss; no miss without a reason."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import closing
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from store_faults import FaultyFiles, fetch, key_of, object_of
from test_store_crash import abandon

from triptych.cache.store import SegmentStore

NUMBERS = st.integers(0, 11)
# around the header, the alignment and a segment of 4,000 bytes
SIZES = (0, 1, 47, 48, 49, 700, 1999, 5000)
SEGMENT = 4000


def size_of(number: int) -> int:
    return SIZES[number % len(SIZES)]


class StoreMachine(RuleBasedStateMachine):
    """`held`: must be readable. `maybe`: damage or eviction may have taken it. All others must be misses."""

    quota = 1 << 30
    capacity: int | None = None  # of the file system

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="store-"))
        self.lives = 0
        self.directory = self.root / "0"
        self.now = 1e9
        self.held: set[int] = set()
        self.maybe: set[int] = set()
        self.store = self.open()

    def open(self) -> SegmentStore:
        files = FaultyFiles()
        files.capacity = self.capacity
        return SegmentStore(self.directory, b"weights", self.quota, SEGMENT, clock=self.tick, files=files)

    def tick(self) -> float:
        self.now += 1.0
        return self.now

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.root)

    @rule(number=NUMBERS)
    def put(self, number: int) -> None:
        assert self.store.put(key_of(number), [object_of(number, size_of(number))])
        if number in self.maybe:  # what is there and damaged is found out by a get only
            return
        self.held.add(number)
        self.evictions()

    @rule(number=NUMBERS)
    def get(self, number: int) -> None:
        found = fetch(self.store, key_of(number), size_of(number))
        assert found is None or found == object_of(number, size_of(number))
        assert found is not None or number not in self.held
        assert found is None or number in self.held | self.maybe
        self.maybe.discard(number)
        if found is not None:
            self.held.add(number)
        assert (key_of(number) in self.store) == (found is not None)

    @rule(number=NUMBERS)
    def discard(self, number: int) -> None:
        self.store.discard(key_of(number))
        self.held.discard(number)
        self.maybe.discard(number)

    @rule(number=NUMBERS)
    def touch(self, number: int) -> None:
        self.store.touch(key_of(number))

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = self.open()
        self.evictions()

    @rule()
    def kill(self) -> None:
        """Go on in a copy that was taken without a close."""
        self.lives += 1
        target = self.root / str(self.lives)
        shutil.copytree(self.directory, target)
        abandon(self.store)
        self.directory = target
        self.store = self.open()
        self.evictions()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        """Flip a bit, cut or remove a file, while the store is open or closed."""
        closed = data.draw(st.booleans())
        if closed:
            self.store.close()
        paths = sorted(path for path in self.directory.iterdir() if path.stat().st_size)
        if paths:
            path = data.draw(st.sampled_from(paths))
            self.hurt(path, data, closed)
            if path.suffix == ".data":
                self.maybe |= self.held
                self.held.clear()
        if closed:
            self.store = self.open()
            self.evictions()

    def hurt(self, path: Path, data: st.DataObject, closed: bool) -> None:
        size = path.stat().st_size
        # an open file that is removed stays readable and writable, and what is put there is lost at the end
        how = data.draw(st.sampled_from(["flip", "cut", "remove"] if closed else ["flip", "cut"]))
        if how == "remove":
            path.unlink()
            return
        offset = data.draw(st.integers(0, size - 1))
        with path.open("r+b") as file:
            if how == "cut":
                file.truncate(offset)
            else:
                file.seek(offset)
                byte = file.read(1)[0]
                file.seek(offset)
                file.write(bytes([byte ^ (1 << data.draw(st.integers(0, 7)))]))

    def evictions(self) -> None:
        """Nothing is evicted below the quota."""

    @invariant()
    def what_must_be_there_is_announced(self) -> None:
        assert all(key_of(number) in self.store for number in self.held)
        assert self.store.stats().bytes_used <= self.quota


class SmallStoreMachine(StoreMachine):
    """With a quota of a few segments: what the store says it has given up may be gone, and nothing else."""

    quota = 30_000

    def evictions(self) -> None:
        self.held = {number for number in self.held if key_of(number) in self.store}


class SmallDiskMachine(SmallStoreMachine):
    """With room for a few segments, whatever the quota."""

    quota = 1 << 30
    capacity = 30_000


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSmallStore = SmallStoreMachine.TestCase
TestSmallStore.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSmallDisk = SmallDiskMachine.TestCase
TestSmallDisk.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_small_quota_evicts(tmp_path: Path) -> None:
    """The machine above would prove nothing if its quota never took anything away."""
    with closing(SegmentStore(tmp_path, b"weights", SmallStoreMachine.quota, SEGMENT)) as store:
        for number in range(12):
            store.put(key_of(number), [object_of(number, 5000)])
        assert 0 < store.stats().objects < 12
