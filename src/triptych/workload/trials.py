"""Settings against each other in this process: the same requests, in turns, on a fresh engine each time.

round 1   A B C      every turn: load, send the round's requests, stop
round 2   B C A      the order moves on, so that what disturbs the machine meets all alike
round 3   C A B      requests differ from round to round, never between the contenders of one
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from triptych.engine.async_engine import AsyncEngine
from triptych.workload.clients import InProcess
from triptych.workload.energy import Energy, Meter, sum_of
from triptych.workload.load import Load, LoadSettings, Timing, temperature_of
from triptych.workload.sessions import SessionRequest
from triptych.workload.texts import Texts


@dataclass(slots=True)
class Contender:
    """Engine options by name, as Engine.load takes them, and what came out: timings by round.

    `torn`: an interrupt ended the last of these rounds.
    """

    name: str
    options: Mapping[str, Any]
    rounds: list[list[Timing]] = field(default_factory=list)
    energies: list[Energy] = field(default_factory=list)
    torn: bool = False

    def add(self, answered: Sequence[Timing], energy: Energy) -> None:
        """One more round."""
        self.rounds.append(sorted(answered, key=lambda timing: timing.intended))
        self.energies.append(energy)

    def energy(self) -> Energy:
        """What all rounds took together."""
        return sum_of(self.energies)

    def timings(self) -> list[Timing]:
        """All rounds as one run, one after the other; a session is named after its round too."""
        found: list[Timing] = []
        begun = 0.0
        for number, one in enumerate(self.rounds):
            prefix = f"{number}/" if len(self.rounds) > 1 else ""
            found += [_later(timing, begun, prefix) for timing in one]
            begun = max((timing.end for timing in found), default=begun)
        return found


def _later(timing: Timing, by: float, prefix: str) -> Timing:
    return replace(
        timing,
        session=prefix + timing.session,
        intended=timing.intended + by,
        sent=timing.sent + by,
        arrivals=[(at + by, tokens) for at, tokens in timing.arrivals],
        end=timing.end + by,
    )


@dataclass(frozen=True, slots=True)
class Trial:
    """One comparison. `requests(round)` are those of a round; `folder`: where prompts come from, None for Python's."""

    model: str
    requests: Callable[[int], Sequence[SessionRequest]]
    settings: LoadSettings
    rounds: int = 1
    folder: Path | None = None


def run_trial(
    trial: Trial, contenders: Sequence[Contender], on_done: Callable[[str, Timing], None] = lambda name, timing: None
) -> None:
    """Fill in the rounds of all contenders; `on_done` gets the contender's name and each answered request.

    KeyboardInterrupt reaches the caller, and what had been answered is then the contender's last round.
    """
    for number in range(trial.rounds):
        requests = trial.requests(number)
        for contender in random.Random(f"order {number}").sample(contenders, len(contenders)):
            _turn(trial, contender, requests, on_done)


def keep_whole_rounds(contenders: Sequence[Contender]) -> int:
    """After an interrupt: drop what not all have run, for a fair comparison. Returns the number of rounds left.

    0 if there is no whole round: then all that was answered stays.
    """
    whole = min(len(one.rounds) - one.torn for one in contenders)
    for one in contenders if whole else ():
        del one.rounds[whole:], one.energies[whole:]
        one.torn = False
    return whole


def _turn(
    trial: Trial, contender: Contender, requests: Sequence[SessionRequest], on_done: Callable[[str, Timing], None]
) -> None:
    engine, meter = AsyncEngine.load(trial.model, **contender.options), Meter.of_this_machine()
    longest = max(part.tokens for request in requests for part in (*request.prompt, request.output))
    answered: list[Timing] = []

    def done(timing: Timing) -> None:
        answered.append(timing)
        on_done(contender.name, timing)

    async def run() -> None:
        await engine.start()
        try:
            texts = Texts(engine.tokenizer.encode, trial.folder, longest)
            load = Load(InProcess(engine, temperature_of(requests)), texts, trial.settings)
            with meter:
                await load.run(requests, done)
        finally:
            await engine.stop()

    try:
        asyncio.run(run())
    except KeyboardInterrupt:
        if answered:
            contender.torn = True
            contender.add(answered, meter.energy())
        raise
    contender.add(answered, meter.energy())
