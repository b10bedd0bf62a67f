"""The end of barriers in shared memory.

A barrier is more than the eight bytes at its address: until it is invalidated, PTX leaves undefined what becomes of
anything else that is written there ("mbarrier.inval"). The compiler gives memory to the next buffer as soon as it sees
no further use, so a barrier must be used until nothing of the kind can follow. One that was not, in a kernel of index
selection, gave wrong counts once in some hundred thousand launches, but only while several processes shared the GPU:
warps of a program then went different ways and waited for each other for ever.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def forget(bars, MANY: gl.constexpr):
    """Invalidate `bars` [MANY, 1], which all warps have waited for; at the end of whoever initialised them."""
    for n in gl.static_range(MANY):
        mbarrier.invalidate(bars.index(n))
