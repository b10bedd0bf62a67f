"""Frames that come up from pinned host memory by the GPU's copy engines: a fetch in one call of the driver.

They hold no multiprocessors that steps beside them need. Behind the copies one short launch adds up what has arrived
(kernels/frames/triton.py).

Measured on an H200 whose link carries 55 GB/s in one plain copy: 512 pages take 4.63 ms, 54.5 GB/s, in order and
anywhere; with the launch and the mover 52. Two to four streams bring no more than one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from triptych.kernels.frames.triton import compare

Addresses = npt.NDArray[np.uint64]
Copies = Callable[[Addresses, Addresses, int, int], None]  # to, from, bytes of each, stream

_IN_STREAM = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM


class _Location(ctypes.Structure):
    """CUmemLocation; of type 0 it says nothing."""

    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = [("order", ctypes.c_int), ("source", _Location), ("target", _Location), ("flags", ctypes.c_uint)]


def bring_up(memory: Tensor, frames: Tensor, places: Tensor, factors: Tensor, table: Tensor) -> Tensor:
    """See ref.bring_up. `memory` is pinned, and the current stream is not the default one, where the driver refuses.

    RuntimeError if it does, or has no such call.
    """
    copies = driver_copies()
    if copies is None:
        raise RuntimeError("This driver is too old to copy many frames in one call; it takes CUDA 12.8.")
    there = places.to(frames.device, non_blocking=True)
    from_, to = places.numpy()
    if len(to):
        stream = torch.cuda.current_stream(frames.device).cuda_stream
        copies(_rows(frames, to), _rows(memory, from_), frames.shape[1], stream)
    return compare(frames, there[1], factors, table.index_select(0, there[0]))


def works(device: torch.device) -> bool:
    """Whether the driver can be asked, tried with a few bytes: a symbol alone promises nothing."""
    copies = driver_copies()
    if copies is None:
        return False
    source, target = torch.arange(16).pin_memory()[None], torch.zeros(1, 16, dtype=torch.int64, device=device)
    stream, first = torch.cuda.Stream(device), np.zeros(1, np.int64)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        copies(_rows(target, first), _rows(source, first), 128, stream.cuda_stream)
    except RuntimeError:
        return False
    stream.synchronize()
    return torch.equal(target.cpu(), source)


def _rows(matrix: Tensor, rows: npt.NDArray[np.int64]) -> Addresses:
    return (matrix.data_ptr() + rows * (matrix.stride(0) * matrix.element_size())).astype(np.uint64)


@cache
def driver_copies() -> Copies | None:
    """The driver's call that enqueues many copies at once; None where there is none (before CUDA 12.8)."""
    try:
        driver = ctypes.PyDLL("libcuda.so.1")  # a short call; to let other threads run would cost more
    except OSError:
        return None
    newer = hasattr(driver, "cuMemcpyBatchAsync_v2")
    call = getattr(driver, "cuMemcpyBatchAsync_v2" if newer else "cuMemcpyBatchAsync", None)
    if call is None:
        return None
    attributes, first, failed = _Attributes(order=_IN_STREAM), ctypes.c_size_t(0), ctypes.c_size_t(0)

    def copies(to: Addresses, from_: Addresses, size: int, stream: int) -> None:
        sizes = np.full(len(to), size, np.uint64)
        arrays = (ctypes.c_void_p(array.ctypes.data) for array in (to, from_, sizes))
        same = ctypes.byref(attributes), ctypes.byref(first), ctypes.c_size_t(1)  # for all of them
        told = () if newer else (ctypes.byref(failed),)
        code = call(*arrays, ctypes.c_size_t(len(to)), *same, *told, ctypes.c_void_p(stream))
        if code:
            raise RuntimeError(f"The GPU's driver refuses to copy {len(to)} frames from the host (error {code}).")

    return copies
