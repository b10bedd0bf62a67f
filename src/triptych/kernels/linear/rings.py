"""What kernels share whose copies run ahead of their products, through a ring of places in shared memory."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def next_place(place, phase, STAGES: gl.constexpr):
    """The place in the ring after this one; its barriers have another phase in every round."""
    last = place == STAGES - 1
    return gl.where(last, 0, place + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def meet(met):
    """Both warpgroups have come here, once, and see what either wrote before."""
    gl.thread_barrier()
    mbarrier.arrive(met, count=1)
    mbarrier.wait(met, 0)


@gluon.constexpr_function
def sums_layout(n, depth=32):
    """Accumulators [.., n] of a warpgroup; products of `depth` columns at a time."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n, depth])


@gluon.constexpr_function
def side_by_side(size):
    """Outputs [64, n] of so many bytes, 16 bytes of a row in a thread."""
    some = 16 // size
    return gl.BlockedLayout([some, 1], [64 // some, some // 2], [1, 4], [0, 1])
