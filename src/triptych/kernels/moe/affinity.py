"""The router's score of a logit, for every kernel that routes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def affinity(x):
    """sqrt(softplus(x)). log(1 + e) loses all of a small e, which the root would show: u / (u - 1) corrects it."""
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    soft = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.sqrt(tl.where(x > 20.0, x, soft))
