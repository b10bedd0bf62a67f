"""One append-only file of records, its index file, and how both are read back.

    segment-00000007.data    | superblock 64 | record | record | ...     record = header, payload, zeros up to 64 bytes
    segment-00000007.index   | magic, version, seal, number, end, count | 64 bytes an object | checksum |

Nothing here is needed for truth: the index file is a shortcut for reading headers up to `end`, the superblock one for
telling whose file it is. Every record carries what proves it. So neither is ever synced to the disk by force.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from triptych.cache.store.files import Files
from triptych.cache.store.protocol import NAME_BYTES, ObjectKey
from triptych.cache.store.record import (
    HEADER_BYTES,
    MAGIC,
    SEAL_BYTES,
    VERSION,
    Header,
    kind_code,
    kind_of,
    parse_header,
    short_checksum,
)

# records start at multiples of this, so that a search after damage need not look at every byte
ALIGN = 64
SUPERBLOCK_BYTES = ALIGN

_SUPER_MAGIC, _INDEX_MAGIC = b"TRIPTseg", b"TRIPTidx"
_SUPER = struct.Struct(f"<8sH6x{SEAL_BYTES}sQ")
_INDEX = struct.Struct(f"<8sH6x{SEAL_BYTES}sQQQ")
_OBJECT = struct.Struct(f"<{NAME_BYTES}sB7xQQd")
_PLACE = struct.Struct("<QQ")
_CHECK_BYTES = 8
_SEARCH_BYTES = 1 << 20


@dataclass(slots=True, eq=False)
class Entry:
    """Where an object lies. `offset`: of its header; `length`: payload bytes; `touched`: clock seconds."""

    key: ObjectKey
    segment: Segment
    offset: int
    length: int
    touched: float


class Segment:
    """An open data file and what lives in it. The store's index lock guards all fields but `end`."""

    def __init__(self, number: int, path: Path, fd: int, writable: bool) -> None:
        self.number = number
        self.path = path
        self.fd = fd
        self.writable = writable
        self.end = SUPERBLOCK_BYTES  # where the next record goes; guarded by the store's write lock
        self.live: dict[ObjectKey, Entry] = {}
        self.live_bytes = 0
        self.weight = 0.0  # sum of payload bytes x last touch
        self.readers = 0  # reads in flight; the descriptor of a retired segment is closed with the last one
        self.retired = False
        self.indexed = False  # whether the index file says what is in memory
        self.has_index = False  # whether there is an index file that the next start would believe

    @property
    def index_path(self) -> Path:
        """The index file beside the data file."""
        return self.path.with_suffix(".index")

    def add(self, entry: Entry) -> None:
        """Count a live object."""
        self.live[entry.key] = entry
        self.live_bytes += entry.length
        self.weight += entry.length * entry.touched
        self.indexed = False

    def remove(self, entry: Entry) -> None:
        """Its bytes are dead from now on."""
        del self.live[entry.key]
        self.live_bytes -= entry.length
        self.weight -= entry.length * entry.touched
        self.indexed = False

    def touch(self, entry: Entry, now: float) -> None:
        """Note a use of a live object."""
        self.weight += entry.length * (now - entry.touched)
        entry.touched = now
        self.indexed = False


def data_name(number: int) -> str:
    """File name of a segment."""
    return f"segment-{number:08d}.data"


def number_of(name: str) -> int | None:
    """The segment number of a data, index or half-written index file; None for files that are not the store's."""
    stem, _, suffix = name.partition(".")
    digits = stem.removeprefix("segment-")
    ours = stem.startswith("segment-") and len(digits) >= 8 and digits.isascii() and digits.isdigit()
    return int(digits) if ours and suffix in ("data", "index", "index.new") else None


def aligned(offset: int) -> int:
    """The next offset where a record may start."""
    return -(-offset // ALIGN) * ALIGN


def place_of(seal: bytes, number: int, offset: int) -> bytes:
    """What binds a header to this store, this segment and this offset."""
    return seal + _PLACE.pack(number, offset)


def pack_superblock(seal: bytes, number: int) -> bytes:
    """The first SUPERBLOCK_BYTES bytes of a data file."""
    fields = _SUPER.pack(_SUPER_MAGIC, VERSION, seal, number)
    return (fields + short_checksum(fields)).ljust(SUPERBLOCK_BYTES, b"\0")


def owner(files: Files, segment: Segment, seal: bytes) -> bool | None:
    """True: the superblock bears this seal. False: an intact one with another. None: it is damaged and says nothing.

    Then the records decide, which prove themselves one by one.
    """
    raw = files.read_bytes(segment.fd, SUPERBLOCK_BYTES, 0)
    fields, check = raw[: _SUPER.size], raw[_SUPER.size : _SUPER.size + _CHECK_BYTES]
    if len(raw) < SUPERBLOCK_BYTES or short_checksum(fields) != check:
        return None
    magic, version, found, _ = _SUPER.unpack(fields)
    return bool(magic == _SUPER_MAGIC and version == VERSION and found == seal)


def write_index(files: Files, segment: Segment, seal: bytes, entries: list[Entry]) -> int:
    """Write the index file anew and return its bytes. Raises OSError.

    The rename replaces an older index in one step. It is not synced: after a power cut an old, empty or torn index is
    recognised (checksum, `end`) and the headers are read instead.
    """
    body = [_INDEX.pack(_INDEX_MAGIC, VERSION, seal, segment.number, segment.end, len(entries))]
    body += [_OBJECT.pack(e.key.name, kind_code(e.key.kind), e.offset, e.length, e.touched) for e in entries]
    raw = b"".join(body)
    raw += short_checksum(raw)
    new = segment.path.with_suffix(".index.new")
    fd = files.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        files.write_all(fd, [raw], 0)
    finally:
        files.close(fd)
    files.rename(new, segment.index_path)
    return len(raw)


def read_index(files: Files, segment: Segment, seal: bytes) -> tuple[list[Entry], int] | None:
    """(objects, offset up to which the index speaks); None without an intact index of this segment."""
    try:
        fd = files.open(segment.index_path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        raw = files.read_bytes(fd, files.size(fd), 0)
    finally:
        files.close(fd)
    view = memoryview(raw)
    if len(raw) < _INDEX.size + _CHECK_BYTES or short_checksum(view[:-_CHECK_BYTES]) != raw[-_CHECK_BYTES:]:
        return None
    magic, version, found, number, end, count = _INDEX.unpack(view[: _INDEX.size])
    body = view[_INDEX.size : -_CHECK_BYTES]
    if (magic, version, found, number) != (_INDEX_MAGIC, VERSION, seal, segment.number):
        return None
    if len(body) != count * _OBJECT.size:
        return None
    entries = []
    for name, code, offset, length, touched in _OBJECT.iter_unpack(body):
        kind = kind_of(code)
        if kind is not None:
            entries.append(Entry(ObjectKey(kind, name), segment, offset, length, touched))
    return entries, end


def scan(files: Files, segment: Segment, seal: bytes, start: int) -> Iterator[tuple[int, Header]]:
    """(offset, header) of every whole record from `start` on, dead ones too.

    A record that the file ends in is torn and not yielded. After bytes that are no header the next one is searched.
    """
    size = files.size(segment.fd)
    offset = start
    while offset + HEADER_BYTES <= size:
        raw = files.read_bytes(segment.fd, HEADER_BYTES, offset)
        header = parse_header(raw, place_of(seal, segment.number, offset))
        if header is None or offset + HEADER_BYTES + header.length > size:
            offset = _next_magic(files, segment.fd, offset + ALIGN, size)
        else:
            yield offset, header
            offset = aligned(offset + HEADER_BYTES + header.length)


def _next_magic(files: Files, fd: int, offset: int, size: int) -> int:
    while offset < size:
        block = files.read_bytes(fd, min(_SEARCH_BYTES, size - offset), offset)
        if not block:
            return size
        found = block.find(MAGIC)
        while found >= 0:
            if found % ALIGN == 0:
                return offset + found
            found = block.find(MAGIC, found + 1)
        offset += _SEARCH_BYTES
    return size
