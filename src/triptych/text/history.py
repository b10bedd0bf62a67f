"""The token ids that the model really sampled, so that a turn that comes back as text becomes the same tokens again.

A client echoes a tool call with its arguments in another order, or leaves the reasoning out. Rendered anew, such a turn
has other tokens, and everything after it has lost its cache. So turns are remembered under two names: the id of their
first tool call, and what they say together with all ids before them. A turn that says something else than it did is
rendered anew: the client's words count.

Bounded in bytes; where room is short, the tenant that holds most gives up what it used least recently.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from triptych.text.numbers import loads
from triptych.text.turns import Assistant
from triptych.words import TokenIds

logger = logging.getLogger(__name__)

_OVERHEAD = 500  # bytes that an entry takes besides its ids
_PATIENCE = 60.0  # seconds until a file that could not be written is tried again
_REWRITE = 4  # the file is written anew when it is so many times larger than what is remembered may be


@dataclass(frozen=True, slots=True, eq=False)
class _Said:
    """One turn: its ids after the slot, a digest of what it says, and one of its reasoning."""

    ids: TokenIds
    meaning: str
    reasoning: str

    @property
    def bytes_used(self) -> int:
        return self.ids.nbytes + _OVERHEAD


class History:
    """Sampled turns of all tenants. For use from any thread."""

    def __init__(self, most_bytes: int = 64 << 20, file: Path | None = None, name: str = "") -> None:
        """`file` keeps the turns across restarts: it is read now and appended to. `name` says whose token ids these
        are; turns of another name are left alone."""
        self._most = most_bytes
        self._tenants: dict[str, OrderedDict[str, _Said]] = {}
        self._sizes: dict[str, int] = {}
        self._lock = threading.Lock()
        self._name = name
        self._file = _File(file, most_bytes * _REWRITE) if file is not None else None
        for tenant, keys, said in self._file.load(name) if self._file is not None else ():
            for key in keys:
                self._put(tenant, key, said)

    @property
    def bytes_used(self) -> int:
        """Bytes of what is remembered, roughly."""
        return sum(self._sizes.values())

    def remember(self, salt: str, before: TokenIds, turn: Assistant, ids: Sequence[int]) -> None:
        """Keep `ids`, what was sampled for `turn` after the prompt `before`, which ends with the turn's slot."""
        said = _Said(np.asarray(ids, dtype=np.int32), meaning(turn), digest(turn.reasoning or ""))
        tenant = digest(salt)
        keys = [f"{prefix_digest(before)}{said.meaning}"]
        keys += [_call_key(int(before[-1]), call.id) for call in turn.calls[:1]]
        with self._lock:
            for key in keys:
                self._put(tenant, key, said)
            if self._file is not None:
                self._file.append(self._name, tenant, keys, said)
                if self._file.to_rewrite:
                    self._file.rewrite(self._name, self._all())

    def recall(self, salt: str, before: str, slot: int, turn: Assistant) -> TokenIds | None:
        """The ids of `turn`; None if it was not said here, or says something else.

        `before` is the digest of all ids before it, `slot` the last of them: is it thought first, or not?
        """
        wanted, tenant = meaning(turn), digest(salt)
        keys = [_call_key(slot, call.id) for call in turn.calls[:1]] + [f"{before}{wanted}"]
        with self._lock:
            entries = self._tenants.get(tenant, OrderedDict())
            for key in keys:
                said = entries.get(key)
                if said is None or said.meaning != wanted:
                    continue
                if turn.reasoning and digest(turn.reasoning) != said.reasoning:
                    continue
                entries.move_to_end(key)
                return said.ids
        return None

    def _put(self, tenant: str, key: str, said: _Said) -> None:
        entries = self._tenants.setdefault(tenant, OrderedDict())
        old = entries.pop(key, None)
        entries[key] = said
        self._sizes[tenant] = self._sizes.get(tenant, 0) + said.bytes_used - (old.bytes_used if old else 0)
        while self.bytes_used > self._most and self._tenants:
            largest = max(self._sizes, key=self._sizes.__getitem__)
            _, gone = self._tenants[largest].popitem(last=False)
            self._sizes[largest] -= gone.bytes_used
            if not self._tenants[largest]:
                del self._tenants[largest], self._sizes[largest]

    def _all(self) -> list[tuple[str, list[str], _Said]]:
        return [(tenant, [key], said) for tenant, entries in self._tenants.items() for key, said in entries.items()]


class _File:
    """One line a turn, each with its own checksum: what a crash or anything else broke is skipped, the rest counts."""

    def __init__(self, path: Path, most_bytes: int) -> None:
        self._path = path
        self._most = most_bytes
        self._size = 0
        self._works = True
        self._again: float | None = None  # when to try again what could not be written, by the monotonic clock
        self._broken_end = False

    @property
    def to_rewrite(self) -> bool:
        """True when most of the file is about turns that are forgotten, or when some could not be written to it, as on
        a full disk, and it is time to try again."""
        if self._works:
            return self._size > self._most
        return self._again is not None and time.monotonic() >= self._again

    def load(self, name: str) -> list[tuple[str, list[str], _Said]]:
        """All whole lines of this name."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch(mode=0o600)
            raw = self._path.read_bytes()
        except OSError as error:
            self._give_up("read", error)
            return []
        self._size = len(raw)
        self._broken_end = bool(raw) and not raw.endswith(b"\n")
        found = [_parsed(line, name) for line in raw.splitlines()]
        return [entry for entry in found if entry is not None]

    def append(self, name: str, tenant: str, keys: list[str], said: _Said) -> None:
        """Add one turn."""
        line = _line(name, tenant, keys, said)
        try:
            with self._path.open("ab") if self._works else contextlib.nullcontext() as out:
                if out is not None:
                    out.write((b"\n" if self._broken_end else b"") + line)
        except OSError as error:
            self._wait(error)
        self._broken_end = False
        self._size += len(line)

    def rewrite(self, name: str, entries: list[tuple[str, list[str], _Said]]) -> None:
        """Replace the file by one of these turns only, at once."""
        fresh = self._path.with_suffix(".new")
        try:
            with open(fresh, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as out:
                for entry in entries:
                    out.write(_line(name, *entry))
                self._size = out.tell()
            fresh.replace(self._path)
        except OSError as error:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            self._wait(error)
            return
        if not self._works:
            logger.info("turns are kept across restarts again: %s", self._path)
        self._works = True

    def _wait(self, error: OSError) -> None:
        """Nothing is appended from now on; all that is remembered is written when there is room again."""
        if self._works:
            self._give_up("written", error)
        self._again = time.monotonic() + _PATIENCE

    def _give_up(self, verb: str, error: OSError) -> None:
        self._works = False
        logger.warning("turns are not kept across restarts: %s cannot be %s: %s", self._path, verb, error.strerror)


def _line(name: str, tenant: str, keys: list[str], said: _Said) -> bytes:
    data = base64.b64encode(said.ids.tobytes()).decode()
    text = json.dumps([name, tenant, keys, said.meaning, said.reasoning, data])
    return f"{digest(text)} {text}\n".encode()


def _parsed(line: bytes, wanted: str) -> tuple[str, list[str], _Said] | None:
    check, _, text = line.decode("utf-8", "replace").partition(" ")
    if check != digest(text):
        return None
    name, tenant, keys, means, reasoning, data = json.loads(text)
    if name != wanted:
        return None
    return tenant, keys, _Said(np.frombuffer(base64.b64decode(data), dtype=np.int32), means, reasoning)


def meaning(turn: Assistant) -> str:
    """A digest of what a turn says: its text but for white space around it, and its calls, whatever the order and
    spacing of their arguments."""
    calls = [[call.name, _value(call.arguments)] for call in turn.calls]
    return digest(json.dumps([turn.text.strip(), calls], sort_keys=True))


def _value(arguments: str) -> object:
    try:
        return loads(arguments)
    except ValueError:
        return arguments


def digest(text: str) -> str:
    """A short digest of a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def prefix_digest(ids: TokenIds) -> str:
    """A digest of token ids."""
    return hashlib.blake2b(np.ascontiguousarray(ids, dtype=np.int32).tobytes(), digest_size=16).hexdigest()


def _call_key(slot: int, call_id: str) -> str:
    return digest(f"{slot} {call_id}")
