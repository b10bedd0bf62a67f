"""The token ids that the model really sampled, so that a turn that comes back as text becomes the same tokens again.

A client echoes a tool call with its arguments in another order, or leaves the reasoning out. Rendered anew, such a turn
has other tokens, and everything after it has lost its cache. So turns are remembered: by the ids of their tool calls,
and by what stood before them together with what they said. Per tenant, bounded, and in a file where there is one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from triptych.text.tools import loads
from triptych.text.turns import Assistant
from triptych.words import TokenIds

logger = logging.getLogger(__name__)

_OVERHEAD = 400  # bytes that an entry takes besides its ids


@dataclass(frozen=True, slots=True, eq=False)
class _Said:
    """One turn: its ids after the slot, and a digest of what it says."""

    ids: TokenIds
    meaning: str
    reasoning: str


class History:
    """Sampled turns, least recently used first to go. For use from any thread."""

    def __init__(self, most_bytes: int = 64 << 20, file: Path | None = None) -> None:
        """`file` keeps the turns across restarts; it is read now and appended to."""
        self._most = most_bytes
        self._entries: OrderedDict[str, _Said] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes_used = 0
        self._file = file
        if file is not None:
            self._load(file)

    def remember(self, salt: str, before: TokenIds, turn: Assistant, ids: Sequence[int]) -> None:
        """Keep what was sampled after the prompt `before`."""
        said = _Said(np.asarray(ids, dtype=np.int32), meaning(turn), digest(turn.reasoning or ""))
        keys = [_key(salt, "call", str(int(before[-1])), call.id) for call in turn.calls[:1]]
        keys.append(_key(salt, prefix_digest(before), said.meaning))
        with self._lock:
            for key in keys:
                self._put(key, said)
        if self._file is not None:
            self._append(self._file, keys, said)

    def recall(self, salt: str, before: str, slot: int, turn: Assistant) -> TokenIds | None:
        """The ids of `turn` after a prompt with this digest that ends with the token `slot` (is it thought first?);
        None if it was not said here, or says something else."""
        wanted = meaning(turn)
        keys = [_key(salt, "call", str(slot), call.id) for call in turn.calls[:1]] + [_key(salt, before, wanted)]
        with self._lock:
            for key in keys:
                said = self._entries.get(key)
                if said is None or said.meaning != wanted:
                    continue
                if turn.reasoning and digest(turn.reasoning) != said.reasoning:
                    continue
                self._entries.move_to_end(key)
                return said.ids
        return None

    def _put(self, key: str, said: _Said) -> None:
        old = self._entries.pop(key, None)
        if old is not None:
            self.bytes_used -= old.ids.nbytes + _OVERHEAD
        self._entries[key] = said
        self.bytes_used += said.ids.nbytes + _OVERHEAD
        while self.bytes_used > self._most and self._entries:
            _, gone = self._entries.popitem(last=False)
            self.bytes_used -= gone.ids.nbytes + _OVERHEAD

    # -- the file: one JSON line a turn; a line that is broken is skipped, so a crash costs the last turn

    def _append(self, file: Path, keys: list[str], said: _Said) -> None:
        line = json.dumps([keys, said.meaning, said.reasoning, base64.b64encode(said.ids.tobytes()).decode()])
        try:
            with self._lock, file.open("a", encoding="utf-8") as out:
                out.write(line + "\n")
        except OSError as error:
            logger.warning("turns are not kept across restarts: %s cannot be written: %s", file, error.strerror)
            self._file = None

    def _load(self, file: Path) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            logger.warning("turns are not kept across restarts: %s cannot be read: %s", file, error.strerror)
            self._file = None
            return
        kept: list[str] = []
        for line in lines:
            try:
                keys, wanted, reasoning, data = json.loads(line)
                said = _Said(np.frombuffer(base64.b64decode(data), dtype=np.int32), wanted, reasoning)
            except (ValueError, TypeError):
                continue
            kept.append(line)
            for key in keys:
                self._put(key, said)
        if sum(map(len, kept)) > 4 * self._most:
            kept = kept[len(kept) // 2 :]
            file.write_text("\n".join(kept) + "\n", encoding="utf-8")


def meaning(turn: Assistant) -> str:
    """A digest of what a turn says: its text and its calls, whatever the order and spacing of their arguments."""
    calls = [[call.name, loads(call.arguments) or call.arguments] for call in turn.calls]
    return digest(json.dumps([turn.text, calls], sort_keys=True, ensure_ascii=False))


def digest(text: str) -> str:
    """A short digest of a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def prefix_digest(ids: TokenIds) -> str:
    """A digest of token ids."""
    return hashlib.blake2b(np.ascontiguousarray(ids, dtype=np.int32).tobytes(), digest_size=16).hexdigest()


def _key(salt: str, *parts: str) -> str:
    return digest(json.dumps([salt, *parts]))
