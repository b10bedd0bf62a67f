"""Reference lines: an infinite cache, and a plain LRU that pays for compressed bytes only and needs no window state."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any

import numpy as np

from triptych.workload.traces import Trace

PAGE = 256
BYTES_PER_TOKEN = {"flash": 3899.25, "pro": 5587.0}
"""Compressed bytes as SGLang lays them out."""


def lines(trace: Trace, model: str, budget: int) -> dict[str, Any]:
    """Hit rates, whole pages of 256 tokens, prompts and outputs; at least the last token of a prompt always runs."""
    pages = int(budget / BYTES_PER_TOKEN[model] / PAGE)
    kept: OrderedDict[bytes, None] = OrderedDict()
    seen: set[bytes] = set()
    hit = ideal = total = 0
    for request in trace:
        keys = _keys(np.concatenate([request.prompt, request.output]))
        usable = keys[: (len(request.prompt) - 1) // PAGE]
        hit += PAGE * next((at for at, key in enumerate(usable) if key not in kept), len(usable))
        ideal += PAGE * next((at for at, key in enumerate(usable) if key not in seen), len(usable))
        total += len(request.prompt)
        seen.update(keys)
        for key in reversed(keys):  # the end of a prompt is the first to go
            kept[key] = None
            kept.move_to_end(key)
        while len(kept) > pages:
            kept.popitem(last=False)
    return {"hit_rate": hit / total, "ideal_hit_rate": ideal / total, "prompt_tokens": total}


def _keys(tokens: np.ndarray) -> list[bytes]:
    raw, key, out = tokens.astype(np.int32).tobytes(), b"", []
    for at in range(0, len(raw) - 4 * PAGE + 1, 4 * PAGE):
        key = hashlib.blake2b(key + raw[at : at + 4 * PAGE], digest_size=16).digest()
        out.append(key)
    return out
