"""Made-up traffic with one knob for each thing that a prefix policy may depend on.

`shared`: prompts that begin with one of N texts of similar length and end with a question of their own. Nothing tells
where a text ends. A text is asked about a few times, then another takes its place.

`turns`: N conversations at once, each turn of which repeats everything before it, the answer included, and adds to it.
Ends of turns are known, as a chat encoding knows them.

    pressure = bytes of the pages of all N texts or conversations / bytes of the cache that keeps them

So pressure is reuse frequency in the unit that a cache sees: what else comes by between two uses, over what fits.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from triptych.words import TokenIds
from triptych.workload.traces import TraceRequest, synthetic_tokens

SCENARIOS = ("shared", "turns")
QUESTION, ANSWER = 512, 128
"""Tokens of a question and of an answer."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One point: `live` texts of `length` tokens on average, or conversations that begin so, each used `uses` times."""

    scenario: str
    length: int
    live: int
    uses: float = 8.0
    requests: int = 200

    def text(self, number: int) -> int:
        """Tokens of text `number`: 0.75 to 1.25 times the average, so that no period meets all their ends."""
        return round(self.length * random.Random(number).uniform(0.75, 1.25))


@dataclass
class Traffic:
    """The requests of a cell; `again[i]` says whether request i repeats what an earlier one has brought."""

    cell: Cell
    seed: int = 0
    name: str = "prefix policy"
    again: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return self.cell.requests

    def __iter__(self) -> Iterator[TraceRequest]:
        self.again.clear()
        made = self._shared() if self.cell.scenario == "shared" else self._turns()
        return made

    def _shared(self) -> Iterator[TraceRequest]:
        cell, rng = self.cell, random.Random(self.seed)
        texts = list(range(cell.live))
        seen: set[int] = set()
        fresh = cell.live
        for number in range(cell.requests):
            place = rng.randrange(cell.live)
            if texts[place] in seen and rng.random() < 1 / cell.uses:
                texts[place], fresh = fresh, fresh + 1
            text = texts[place]
            self.again.append(text in seen)
            seen.add(text)
            prompt = np.concatenate([_tokens(text, cell.text(text)), _tokens(-number, QUESTION)])
            yield TraceRequest(float(number), prompt, _tokens(-number - (1 << 20), ANSWER))

    def _turns(self) -> Iterator[TraceRequest]:
        """A conversation begins at `length` and ends after `uses` turns on average; then another begins."""
        cell, rng = self.cell, random.Random(self.seed)
        fresh = 0
        talks: list[tuple[int, TokenIds, tuple[int, ...]] | None] = [None] * cell.live
        for number in range(cell.requests):
            place = rng.randrange(cell.live)
            talk = talks[place]
            if talk is not None and rng.random() < 1 / cell.uses:
                talk = None
            self.again.append(talk is not None)
            if talk is None:
                talk, fresh = (fresh, _tokens(fresh, cell.text(fresh)), ()), fresh + 1
            name, before, marks = talk
            prompt = np.concatenate([before, _tokens(-number, QUESTION)])
            answer = _tokens(-number - (1 << 20), ANSWER)
            marks = (*marks, len(before), len(prompt))
            yield TraceRequest(float(number), prompt, answer, marks, f"talk {name}")
            talks[place] = name, np.concatenate([prompt, answer]), (*marks, len(prompt) + len(answer))


def _tokens(seed: int, length: int) -> TokenIds:
    return synthetic_tokens(np.uint64(seed & (1 << 63) - 1), length)
