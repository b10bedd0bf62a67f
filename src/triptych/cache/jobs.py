"""What is to be moved between the device and the tiers below it, as values; engine/mover.py carries them out.

Demotion  device frames -> host frames     at once, before anything of the coming step is written
Fetch     host or store -> device frames   in the background; nobody sees the frames until it is done
Save      device or host frames -> store   in the background; the frames stay as they are until it is done
"""

from __future__ import annotations

from dataclasses import dataclass

from triptych.cache.store.protocol import ObjectKey

DEVICE, HOST = "device", "host"


@dataclass(frozen=True, slots=True)
class Demotion:
    """Copy the frames of one object to the host."""

    key: ObjectKey
    frames: tuple[int, ...]
    host_frames: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FetchPart:
    """One object to bring into `frames`, from `host_frames` or from the store called `tier`."""

    key: ObjectKey
    tier: str
    frames: tuple[int, ...]
    host_frames: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Fetch:
    """Objects of one prompt, parents first."""

    job: int
    parts: tuple[FetchPart, ...]


@dataclass(frozen=True, slots=True)
class Save:
    """Write one object, which lies in `frames` of `source` ("device" or "host"), to the store called `tier`."""

    job: int
    key: ObjectKey
    tier: str
    source: str
    frames: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Jobs:
    """All that has become due, in the order in which it is carried out: demotions first.

    `touches` are objects that were used on the device: stores are told, or they would give them up as unused.
    """

    demotions: tuple[Demotion, ...] = ()
    fetches: tuple[Fetch, ...] = ()
    saves: tuple[Save, ...] = ()
    touches: tuple[ObjectKey, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.demotions or self.fetches or self.saves or self.touches)


@dataclass(frozen=True, slots=True)
class Done:
    """A background job has ended. `ok[i]` says whether part i of a fetch arrived whole; a save has one part.

    `seconds` is what the copies took; 0 if that is not known.
    """

    job: int
    ok: tuple[bool, ...]
    seconds: float = 0.0
