"""How programs of one launch wait for what others of it have written."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def done(counter_ptr):
    """What this program's threads have written may be read by those that wait for it."""
    gl.thread_barrier()
    gl.atomic_add(counter_ptr, 1, sem="release")


@gluon.jit
def wait_for(counter_ptr, COUNT: gl.constexpr, WAITING: gl.constexpr):
    """Until COUNT programs are done. Of the WAITING that wait for them the last one sets the counter back to zero.

    COUNT is below 65,536, from where on the counter counts those that waited."""
    seen = gl.atomic_add(counter_ptr, 0, sem="acquire")
    while seen % 65536 < COUNT:
        seen = gl.atomic_add(counter_ptr, 0, sem="acquire")
    if gl.atomic_add(counter_ptr, 65536, sem="relaxed") // 65536 == WAITING - 1:
        gl.store(counter_ptr, 0)
