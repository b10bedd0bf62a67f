"""The heart: pages, window slots, snapshots and the prefix tree. No tensors, only ids and bytes."""

from triptych.cache.geometry import CacheCapacity, CacheGeometry, plan_capacity
from triptych.cache.manager import CacheManager
from triptych.cache.resume import ResumePlan
from triptych.cache.retention import Lru, RetentionPolicy
from triptych.cache.stats import CacheStats

__all__ = [
    "CacheCapacity",
    "CacheGeometry",
    "CacheManager",
    "CacheStats",
    "Lru",
    "ResumePlan",
    "RetentionPolicy",
    "plan_capacity",
]
