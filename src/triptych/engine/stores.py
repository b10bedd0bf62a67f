"""The tiers that an engine's configuration asks for, and the fingerprint that keeps what must not mix apart."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from triptych.cache.geometry import CacheGeometry
from triptych.cache.store import RemoteStore, SegmentStore
from triptych.cache.store.protocol import Store
from triptych.config import CacheConfig, EngineConfig
from triptych.errors import ConfigError

LAYOUT = 3
"""Version of what the bytes of pages and snapshots mean; raise it when geometry, order of segments or what is
stored of a frame change."""


def namespace(
    weights: bytes, geometry: CacheGeometry, config: EngineConfig, *, exact: bool, vendors: Sequence[str] = ()
) -> bytes:
    """All that decides the bytes of a cached object besides its tokens and tenant: 32 bytes.

    Kernels belong to it: two backends agree within rounding only, and an exact resume promises the same bits. `vendors`
    are the operations that a vendor's kernel serves, which depends on what is installed.
    """
    kinds = f"{geometry.kv_format} {geometry.index_format} {config.numerics} {config.weight_dtype}"
    kernels = " ".join([f"{config.kernel_backend} {config.deterministic} {exact}", *vendors])
    return hashlib.sha256(f"{LAYOUT} {geometry} {kinds} {kernels} ".encode() + weights).digest()


def open_stores(config: CacheConfig, fingerprint: bytes) -> tuple[Store, ...]:
    """The stores below device and host, fastest first. ConfigError if one cannot be used."""
    stores: list[Store] = []
    if config.disk is not None:
        if not config.disk:  # which would be the directory where this was started
            raise ConfigError("disk names no directory.", "Name one, or leave it out.")
        stores.append(SegmentStore(Path(os.path.expanduser(config.disk)), fingerprint, config.disk_memory))
    if config.remote is not None:
        stores.append(RemoteStore(config.remote, fingerprint))
    return tuple(stores)
