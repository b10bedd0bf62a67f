"""Small traces for tests: Mooncake lines of conversations, generated, and files of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BLOCK = 512
Row = dict[str, Any]


def mooncake_rows(lines: int = 60, seed: int = 0) -> list[Row]:
    """Conversations that take turns, as Mooncake hashes them: one id per 512-token block of prompt plus output.

    They share a system prompt of two blocks. One in eight lines asks an old prompt again, and some turns fill their
    last block to the brim.
    """
    rng = random.Random(seed)
    rows: list[Row] = []
    fresh = iter(range(2, 1 << 20))
    conversations: list[tuple[int, list[int]]] = []  # tokens so far, ids of the full blocks
    time = 0
    while len(rows) < lines:
        time += rng.randrange(0, 4000)
        if rows and rng.random() < 1 / 8:
            rows.append({**rng.choice(rows), "timestamp": time})
            continue
        if len(conversations) < 3 or rng.random() < 0.2:
            conversations.append((2 * BLOCK, [0, 1]))
        which = rng.randrange(len(conversations))
        known, full = conversations[which]
        length = known + rng.randrange(1, 1500)
        if rng.random() < 0.2:
            length = -(-length // BLOCK) * BLOCK
        output = rng.randrange(0, 600)
        ids = [*full, *(next(fresh) for _ in range(-(-length // BLOCK) - len(full)))]
        rows.append({"timestamp": time, "input_length": length, "output_length": output, "hash_ids": ids})
        conversations[which] = (length + output, ids[: length // BLOCK])
        if length > 12 * BLOCK:
            del conversations[which]
    return rows


def write_lines(path: Path, rows: Iterable[object]) -> Path:
    """A JSON Lines file of `rows`."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
