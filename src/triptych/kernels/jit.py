"""How CPU kernels are compiled: one place for the settings, so that all of them treat NaN and rounding alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

# Sums may be reordered (so they vectorise) and products fused, but NaN and infinity keep their meaning: a NaN must
# reach the sampler, which fails its request, and -inf masks.
FAST = {"reassoc", "contract", "nsz"}


def kernel(function: Callable[..., Any]) -> Any:
    """Compile at first call without the GIL; the machine code is cached on disk between runs."""
    return numba.njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")(function)


def inline(function: Callable[..., Any]) -> Any:
    """A helper compiled into the kernels that call it."""
    return numba.njit(inline="never", nogil=True, fastmath=FAST, error_model="numpy", cache=True)(function)
