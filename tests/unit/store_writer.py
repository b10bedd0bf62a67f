"""A process that puts, reads and discards until it is killed; it prints what it has been promised."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from store_faults import FaultyFiles, fetch, key_of, object_of

from triptych.cache.store import SegmentStore

SIZE = 30_000
NUMBERS = 200


def main(directory: str, quota: str, seed: str, capacity: str) -> None:
    """Write for ever; a line `+n` or `-n` follows each put that returned True and each discard.

    capacity: bytes of the file system, or nothing for the real one.
    """
    rng = random.Random(int(seed))
    files = FaultyFiles()
    files.capacity = int(capacity) if capacity else None
    store = SegmentStore(Path(directory), b"weights", int(quota), 400_000, files=files)
    print("open", flush=True)
    while True:
        number = rng.randrange(NUMBERS)
        choice = rng.random()
        if choice < 0.75:
            if store.put(key_of(number), [object_of(number, SIZE)]):
                sys.stdout.write(f"+{number}\n")
        elif choice < 0.85:
            sys.stdout.write(f"?{number}\n")  # from here on it may be gone
            sys.stdout.flush()
            store.discard(key_of(number))
            sys.stdout.write(f"-{number}\n")
        else:
            found = fetch(store, key_of(number), SIZE)
            assert found is None or found == object_of(number, SIZE)
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
