"""Two rules of kernels in whose shared memory barriers let bulk copies write.

The end of a barrier. It is more than the eight bytes at its address: until it is invalidated, PTX leaves undefined what
becomes of anything else that is written there ("mbarrier.inval"). The compiler gives memory to the next buffer as soon
as it sees no further use, so a barrier must be used until nothing of the kind can follow. One that was not, in a kernel
of index selection, lay where its warps counted.

A place that is given back. Bulk copies do not stand in line with loads of shared memory ("async proxy" in PTX, which
asks for a fence between the two): a load from before a barrier can still wait for its turn, which tensor cores that
read shared memory take from it, when the copy which that barrier allowed has written the next values. Index selection
gave one score of 100,000 the scale of the key that came next to its place, and only where two programs shared a
multiprocessor. So a place that warps load from is given back by `read_by_all`, unless a product has used what they
loaded.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier


@gluon.jit
def forget(bars, MANY: gl.constexpr):
    """Invalidate `bars` [MANY, 1], which all warps have waited for; at the end of whoever initialised them."""
    for n in gl.static_range(MANY):
        mbarrier.invalidate(bars.index(n))


@gluon.jit
def read_by_all():
    """All warps have what they loaded of shared memory; bulk copies may write there."""
    fence_async_shared()
    gl.thread_barrier()
