"""New weights for a running engine: staged beside the old ones, checked as a whole, then copied into their place.

    directory, or (name, tensor) pairs  ->  staged in main memory  ->  the tensors that the model reads, in place
                                            while requests run        between two steps
                                            any fault ends here       nothing here can be refused any more

In place, because recorded decode graphs hold addresses. Staging takes as much main memory as the weights; in return
a tensor that is missing, odd or not finite leaves everything as it was.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from triptych.checkpoint import CheckpointReader, official_tensors
from triptych.checkpoint.stream import check_numbers
from triptych.config import ModelShape
from triptych.engine.load import LoadedEngine, check_complete, fill
from triptych.engine.memory import free_memory
from triptych.engine.stores import namespace
from triptych.errors import CheckpointError, ConfigError, Unsupported, nearest
from triptych.model.weights import WeightStore
from triptych.words import RUNNING, WeightsUpdate

Source = str | Path | Iterable[tuple[str, Tensor]]
"""A checkpoint directory, or tensors under any name that checkpoints have."""


@dataclass(frozen=True, slots=True)
class Staged:
    """Complete new weights that nobody uses yet."""

    store: WeightStore
    identity: bytes
    bytes: int
    seconds: float


def check_running(running: str) -> None:
    """ConfigError naming the nearest if there is no such way."""
    if running not in RUNNING:
        raise ConfigError(f"running must be one of {', '.join(RUNNING)}, not {running!r}.", nearest(running, RUNNING))


def stage(loaded: LoadedEngine, source: Source) -> Staged:
    """Read, check and keep all of `source`, which has the shape of the engine's model. Touches nothing that runs.

    CheckpointError names the tensor that is missing, of another shape or format, or not finite; ConfigError if there
    is no memory for it.
    """
    if loaded.store is None:
        raise Unsupported("The weights of this engine came from no checkpoint and cannot be replaced.")
    begun, needed = time.perf_counter(), loaded.store.nbytes
    if needed > (free := free_memory()):
        raise ConfigError(
            f"New weights need {needed / 2**30:.1f} GiB of main memory until they are in place, and "
            f"{free / 2**30:.1f} GiB are free.",
            "Free memory, or start a new engine with them.",
        )
    store = loaded.store.blank()
    if isinstance(source, str | Path):
        _read(store, Path(os.path.expanduser(source)), loaded.shape)
    else:
        for name, data, scale in official_tensors(source, loaded.shape):
            if store.has_mtp or not name.startswith("mtp."):
                store.place(name, data, scale)
        check_complete(store)
    identity, size = _identity(store)
    return Staged(store, identity, size, time.perf_counter() - begun)


def _read(store: WeightStore, directory: Path, shape: ModelShape) -> None:
    if not directory.is_dir():
        raise CheckpointError(f"There is no checkpoint directory {str(directory)!r}.")
    reader = CheckpointReader(directory)
    for item in fields(ModelShape):
        here, there = getattr(shape, item.name), getattr(reader.shape, item.name)
        # a checkpoint written by Transformers has no MTP blocks, and needs none
        if here != there and item.name != "num_mtp_layers":
            raise CheckpointError(
                f"The model in {directory} is another one: its {item.name} is {there}, here it is {here}.",
                "Start a new engine for it.",
            )
    fill(store, reader)


def _identity(store: WeightStore) -> tuple[bytes, int]:
    """A name for all contents of a store that caches depend on, which MTP blocks do not, and its bytes.

    The fingerprint that a start makes of files looks at samples only: it would not see a small change.
    """
    digest, size = hashlib.sha256(b"weights"), 0
    for name in store.placed:
        for part, tensor in enumerate(store.stored(name)):
            check_numbers(name, tensor)
            size += tensor.nbytes
            if not name.startswith("mtp."):
                plain = tensor.contiguous().view(torch.uint8).numpy()
                digest.update(b"%b %d %b" % (name.encode(), part, xxhash.xxh3_128_digest(plain.data)))
    return digest.digest(), size


def swap(loaded: LoadedEngine, staged: Staged, aborted: int = 0) -> WeightsUpdate:
    """Put staged weights into place, in the thread that steps and with no step under way. Running requests start again.

    If the copy itself breaks, which only a failing device can make it do, no step begins until an update succeeds.
    """
    begun = time.perf_counter()
    loaded.loop.halt()
    recomputed = loaded.loop.replace_weights(lambda: _put(loaded, staged))
    return WeightsUpdate(
        version=loaded.loop.scheduler.weights,
        identity=staged.identity.hex(),
        tensors=len(staged.store.placed),
        bytes=staged.bytes,
        staged_seconds=staged.seconds,
        stopped_seconds=time.perf_counter() - begun,
        aborted=aborted,
        recomputed=recomputed,
    )


def _put(loaded: LoadedEngine, staged: Staged) -> bytes:
    """Copy staged weights into place and return the namespace of what they compute."""
    assert loaded.store is not None
    with torch.no_grad():
        loaded.store.overwrite(staged.store)
        loaded.loop.model.refresh()
    if loaded.store.weights.embed.is_cuda:
        torch.cuda.synchronize()
    cache = loaded.loop.cache
    return namespace(staged.identity, cache.geometry, loaded.config, exact=cache.places.exact)
