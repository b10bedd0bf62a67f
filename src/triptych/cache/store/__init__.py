"""Stores: whole objects below the device, by name. Disk segments, a remote server, and a dictionary for tests."""

from triptych.cache.store.memory import MemoryStore
from triptych.cache.store.protocol import Buffer, ObjectKey, Store, StoreStats
from triptych.cache.store.remote import RemoteStore
from triptych.cache.store.segments import SegmentStore

__all__ = ["Buffer", "MemoryStore", "ObjectKey", "RemoteStore", "SegmentStore", "Store", "StoreStats"]
