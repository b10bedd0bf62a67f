"""Bytes of every cached object. No other file knows them.

A page is one contiguous span; its segments follow each other without padding, those of CSA layer by layer, and last
one with the entries of all HCA layers. So each begins at a multiple of 16 bytes, and in FP8 so do all their values:

    | layer 2: 32 main entries | 32 index keys | layer 4: 32 main entries | ... | layers 3, 5, ...: 1 entry each |
      csa_main                   csa_index       csa_main                         hca

Sizes of entries: DeepSeek-V4 reference sections 4.1 (584-byte FP8 entry) and 4.2 (index keys).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from triptych.config import CSA_RATIO, HCA_RATIO, PAGE, WINDOW, IndexFormat, KvFormat, ModelShape
from triptych.errors import ConfigError

SLOT_ROWS = 260
"""Window rows in a slot's ring per layer: 132 before a boundary, and up to 128 tokens run beyond it."""

LOOKBACK = 4
"""Tokens run again before a resumed boundary, so that no compressor state has to be stored (rule R3)."""

CSA_RING = 2 * CSA_RATIO
"""Positions whose compressor rows a slot keeps in a CSA layer: the previous group and the current one."""

HCA_RING = HCA_RATIO
"""Positions whose compressor rows a slot keeps in an HCA layer."""

RESTORED = WINDOW + LOOKBACK
"""A snapshot at boundary c holds the window rows [c - RESTORED, c - LOOKBACK), clipped at 0."""

PAGE_ALIGN = 16
"""Pages are padded to a multiple of this many bytes, so that wide loads are aligned in all of them."""

SegmentKind = Literal["csa_main", "csa_index", "hca"]


@dataclass(frozen=True, slots=True)
class Segment:
    """Where entries of one kind lie inside a page: `entries` of `entry_bytes` from `offset` on.

    They belong to one CSA layer, or entry i to the i-th of all HCA `layers`.
    """

    layers: tuple[int, ...]
    kind: SegmentKind
    offset: int
    entries: int
    entry_bytes: int

    @property
    def bytes(self) -> int:
        """Length of the segment in bytes."""
        return self.entries * self.entry_bytes


@dataclass(frozen=True)
class CacheGeometry:
    """Sizes in bytes of page, window slot and snapshot for one model shape and one pair of formats."""

    layers: int
    csa_layers: tuple[int, ...]
    hca_layers: tuple[int, ...]
    head_dim: int
    rope_dim: int
    index_head_dim: int
    kv_format: KvFormat
    index_format: IndexFormat

    @classmethod
    def of(
        cls, shape: ModelShape, kv_format: KvFormat = "float32", index_format: IndexFormat | None = None
    ) -> CacheGeometry:
        """The geometry of `shape`; index keys take the format of the entries unless named."""
        return cls(
            layers=shape.num_layers,
            csa_layers=shape.csa_layers,
            hca_layers=shape.hca_layers,
            head_dim=shape.head_dim,
            rope_dim=shape.rope_dim,
            index_head_dim=shape.index_head_dim,
            kv_format=kv_format,
            index_format=index_format or kv_format,
        )

    @cached_property
    def main_entry_bytes(self) -> int:
        """One compressed entry. FP8: nope dims e4m3, rope dims bf16, one scale byte per 64 dims padded to 8."""
        if self.kv_format == "fp8":
            nope = self.head_dim - self.rope_dim
            scales = -(-nope // 64)
            return nope + 2 * self.rope_dim + -(-scales // 8) * 8
        return self.head_dim * (4 if self.kv_format == "float32" else 2)

    @property
    def window_row_bytes(self) -> int:
        """One window row of one layer: the same vector in the same format as a compressed entry."""
        return self.main_entry_bytes

    @cached_property
    def index_key_bytes(self) -> int:
        """One index key. FP8: values and one fp32 scale; MXFP4: half a byte a value and a scale per 32."""
        dim = self.index_head_dim
        sizes = {"float32": 4 * dim, "bfloat16": 2 * dim, "fp8": dim + 4, "mxfp4": dim // 2 + dim // 32}
        return sizes[self.index_format]

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """All segments of a page in the order of their bytes."""
        out: list[Segment] = []
        offset = 0

        def add(layers: tuple[int, ...], kind: SegmentKind, entries: int, size: int) -> None:
            nonlocal offset
            out.append(Segment(layers, kind, offset, entries, size))
            offset += entries * size

        for layer in self.csa_layers:
            add((layer,), "csa_main", PAGE // CSA_RATIO, self.main_entry_bytes)
            add((layer,), "csa_index", PAGE // CSA_RATIO, self.index_key_bytes)
        if self.hca_layers:
            add(self.hca_layers, "hca", len(self.hca_layers) * (PAGE // HCA_RATIO), self.main_entry_bytes)
        return tuple(out)

    @cached_property
    def page_bytes(self) -> int:
        """128 tokens of one sequence, all layers."""
        used = sum(segment.bytes for segment in self.segments)
        return -(-used // PAGE_ALIGN) * PAGE_ALIGN

    @property
    def token_bytes(self) -> float:
        """Bytes a sequence grows by per token."""
        return self.page_bytes / PAGE

    @cached_property
    def snapshot_bytes(self) -> int:
        """The 128 window rows of each layer that make one boundary resumable."""
        return self.layers * WINDOW * self.window_row_bytes

    @cached_property
    def rows_per_frame(self) -> int:
        """Window rows that a frame holds: row r of a snapshot is row r % n of its frame number r // n."""
        return self.page_bytes // self.window_row_bytes

    @cached_property
    def snapshot_frames(self) -> int:
        """Frames of one snapshot."""
        return -(-self.layers * WINDOW // self.rows_per_frame)

    @cached_property
    def slot_bytes(self) -> int:
        """Window ring and fp32 compressor rows [C | Z] of one running request (CSA rows have two halves)."""
        csa_row = 4 * 2 * 2 * (self.head_dim + self.index_head_dim)
        hca_row = 4 * 2 * self.head_dim
        rings = len(self.csa_layers) * CSA_RING * csa_row + len(self.hca_layers) * HCA_RING * hca_row
        return self.layers * SLOT_ROWS * self.window_row_bytes + rings


@dataclass(frozen=True, slots=True)
class CacheCapacity:
    """How many frames and window slots the memory holds. Pages and snapshots share the frames."""

    frames: int
    slots: int

    def __post_init__(self) -> None:
        if self.frames < 1 or self.slots < 1:
            raise ConfigError(f"A cache needs at least one frame and one window slot, not {self}.")

    @property
    def tokens(self) -> int:
        """Tokens that the frames hold if all of them are pages."""
        return self.frames * PAGE

    def bytes(self, geometry: CacheGeometry) -> int:
        """Bytes of all frames and slots together."""
        return self.frames * geometry.page_bytes + self.slots * geometry.slot_bytes

    def describe(self, geometry: CacheGeometry) -> str:
        """One line for the start banner."""
        return (
            f"{_human(self.bytes(geometry))} in {geometry.kv_format}: {self.tokens:,} tokens in {self.frames:,} frames "
            f"of {_human(geometry.page_bytes)} (a page takes 1, a snapshot {geometry.snapshot_frames}), "
            f"{self.slots} window slots of {_human(geometry.slot_bytes)}"
        )


def trapezoid_start(boundary: int, layers: int, layer: int = 0) -> int:
    """First position that `layer` runs so that rows [boundary - RESTORED, boundary) are exact in every layer.

    An output needs the 127 rows before it, so each deeper layer starts 127 positions later (reference 3.3, R4).
    """
    return max(0, boundary - RESTORED - (layers - 1 - layer) * (WINDOW - 1))


def plan_capacity(geometry: CacheGeometry, memory_bytes: int, max_running: int) -> CacheCapacity:
    """Divide `memory_bytes`: window slots first, frames from the rest. ConfigError when not even two pages remain."""
    if not geometry.page_bytes:
        raise ConfigError("A model with neither CSA nor HCA layers keeps no pages; DeepSeek-V4 has both.")
    rest = memory_bytes - max_running * geometry.slot_bytes
    least = max_running * geometry.slot_bytes + (2 + geometry.snapshot_frames) * geometry.page_bytes
    if memory_bytes < least:
        raise ConfigError(
            f"{_human(memory_bytes)} of cache memory cannot hold {max_running} window slots of "
            f"{_human(geometry.slot_bytes)}, two pages and a snapshot.",
            f"Raise --kv-memory to at least {_human(least)} or lower --max-running.",
        )
    return CacheCapacity(frames=rest // geometry.page_bytes, slots=max_running)


def _human(size: float) -> str:
    """`size` bytes with a binary unit, rounded up in the last digit so that a remedy is never too small."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    if unit == "bytes":
        return f"{int(size)} bytes"
    return f"{-int(-size * 10 // 1) / 10:.1f} {unit}"
