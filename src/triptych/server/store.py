"""The answers of /v1/responses that a client may go on from: per tenant, in memory, bounded, the oldest use goes first.

A conversation of n turns is n responses whose messages are shared, not copied: memory grows with the text, not with
its square.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from triptych.errors import NotFound

_OVERHEAD = 512  # bytes that an entry takes besides its text


@dataclass(slots=True, eq=False)
class _Kept:
    """One message as JSON, and how many responses share it."""

    data: bytes
    users: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A response as JSON, the input items as they came, and the messages up to and including its answer."""

    response: bytes
    items: bytes
    messages: tuple[_Kept, ...]

    def conversation(self) -> list[object]:
        """The messages, decoded anew for whoever asks."""
        return [msgspec.json.decode(kept.data) for kept in self.messages]


class ResponseStore:
    """Stored responses by tenant and id. For use from any thread."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._entries: OrderedDict[tuple[str, str], Stored] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes_used = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, salt: str, response_id: str) -> Stored:
        """The response of this tenant. NotFound if there is none, or no longer."""
        with self._lock:
            found = self._entries.get((salt, response_id))
            if found is None:
                raise NotFound(
                    f"There is no stored response {response_id[:80]!r}.",
                    "Newer ones may have taken its place, or it had store=false: send the whole conversation.",
                )
            self._entries.move_to_end((salt, response_id))
            return found

    def put(
        self,
        salt: str,
        response_id: str,
        *,
        response: bytes,
        items: bytes,
        before: Stored | None,
        new: Sequence[object],
    ) -> None:
        """Keep a response whose conversation is that of `before` and the `new` messages."""
        messages = (*(before.messages if before else ()), *(_Kept(msgspec.json.encode(message)) for message in new))
        entry = Stored(response, items, messages)
        with self._lock:
            self._entries[salt, response_id] = entry
            self._count(entry, 1)
            while self.bytes_used > self._most and self._entries:
                _, oldest = self._entries.popitem(last=False)
                self._count(oldest, -1)

    def delete(self, salt: str, response_id: str) -> None:
        """Forget a response. NotFound if there is none."""
        self.get(salt, response_id)
        with self._lock:
            entry = self._entries.pop((salt, response_id), None)
            if entry is not None:
                self._count(entry, -1)

    def _count(self, entry: Stored, change: int) -> None:
        self.bytes_used += change * (len(entry.response) + len(entry.items) + 8 * len(entry.messages) + _OVERHEAD)
        for kept in entry.messages:
            before = kept.users
            kept.users += change
            if not before or not kept.users:
                self.bytes_used += change * len(kept.data)
