"""Which page boundaries get a snapshot: policies by name.

0 ------ system | tools ------ turn | ...... fork ...... | prompt end      output end
         mark     mark         mark          junction      rungs            its last boundary
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from triptych.cache.history import Forks
from triptych.config import PAGE
from triptych.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is known of a prompt when its places are chosen, in tokens.

    `matched`: where its cached chain ends; `resumed`: the boundary that it resumes from, 0 if none; `cost`: tokens
    that the next one like it would run without any snapshot.
    """

    length: int
    matched: int
    resumed: int
    marks: tuple[int, ...]
    cost: float


Places = Callable[[Prompt, Forks], dict[int, float]]
"""Boundaries to snapshot during a prefill and the tokens each is expected to save, best first: when memory is short
only the first ones are taken."""


@dataclass(frozen=True, slots=True)
class SnapshotPolicy:
    """Where snapshots are put and what happens without one.

    `on_demand`: so do boundaries that turn out to be wanted: the last one of an output, and where others who wait part
    from a running prompt. `stored`: stores keep all of them; if not, those that were
    used, where a prompt left what was cached, and the last. `replay`: how windows are rebuilt where no snapshot is
    left: "trapezoid" is exact, "bounded" runs one window only and is approximate.
    """

    name: str
    places: Places
    on_demand: bool = True
    stored: bool = False
    replay: str = "trapezoid"

    @property
    def exact(self) -> bool:
        """False if resumed requests may differ from unbroken ones."""
        return self.replay == "trapezoid"


def adaptive(prompt: Prompt, forks: Forks) -> dict[int, float]:
    """Rungs where prompts were seen to part, semantic boundaries, and the junction where this one parted.

    A junction is worth what it saves over the boundary this prompt itself resumed from, if others part there too.
    """
    last = prompt.length // PAGE * PAGE
    worth = {last - rung * PAGE: saved for rung, saved in forks.rungs(prompt.cost).items()}
    for index, mark in enumerate(prompt.marks):
        at = mark // PAGE * PAGE
        # others share the system prompt and the tools, and an edit concerns the last turns, seldom those between
        share = _MARK if index < 2 or index >= len(prompt.marks) - 2 else _MARK_BETWEEN
        worth[at] = max(worth.get(at, 0.0), share * min(prompt.cost, at))
    saved = _JUNCTION * min(prompt.cost, prompt.matched - prompt.resumed)
    if saved >= 16.0:
        worth[prompt.matched] = max(worth.get(prompt.matched, 0.0), saved)
    worth = {at: min(saved, at) for at, saved in worth.items() if 0 < at <= last}
    return dict(sorted(worth.items(), key=lambda place: -place[1]))


_MARK, _JUNCTION = 0.3, 0.3  # how likely others part at a mark, or where one has parted already
_MARK_BETWEEN = 0.03


def full(prompt: Prompt, forks: Forks) -> dict[int, float]:
    """Every boundary, the last first."""
    return dict.fromkeys(range(prompt.length // PAGE * PAGE, 0, -PAGE), float(PAGE))


def none(prompt: Prompt, forks: Forks) -> dict[int, float]:
    """No boundary: windows are always rebuilt."""
    return {}


def periodic(period: int) -> Places:
    """Every `period` tokens, the last first. The end of the prompt itself is no special place."""

    def places(prompt: Prompt, forks: Forks) -> dict[int, float]:
        return dict.fromkeys(range(prompt.length // period * period, 0, -period), float(period) / 2)

    return places


NAMES = ("adaptive", "full", "periodic:P", "none", "bounded")


def snapshot_policy_named(name: str) -> SnapshotPolicy:
    """The policy called `name`, for example "adaptive" or "periodic:4096". ConfigError names the nearest."""
    kind, _, argument = name.partition(":")
    if kind == "periodic":
        if not argument.isdecimal() or not int(argument) or int(argument) % PAGE:
            raise ConfigError(f"{name!r}: the period is a multiple of {PAGE} tokens.", "For example periodic:4096.")
        return SnapshotPolicy(name, periodic(int(argument)), on_demand=False, stored=True)
    if name == "adaptive":
        return SnapshotPolicy(name, adaptive)
    if name == "full":
        return SnapshotPolicy(name, full, stored=True)
    if name == "none":
        return SnapshotPolicy(name, none, on_demand=False)
    if name == "bounded":
        return SnapshotPolicy(name, adaptive, replay="bounded")
    raise ConfigError(f"Unknown cache policy {name!r}.", nearest(name, NAMES))
