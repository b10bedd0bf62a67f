"""Training sequences, drawn on the fly: facts to find in real text, copies, and plain text.

A sequence is a chat as the server encodes it (reference section 6.2):

    BOS <User> document, facts inside \\n\\n question <Assistant> </think> answer EOS <User> question ... EOS
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from triptych.config import CSA_RATIO, PAGE
from triptych.tiny.facts import Fact, draw_facts
from triptych.tiny.shape import TOKENIZER_FILE

BOS, EOS = 0, 1
TEXT_WEIGHT = 0.1
LEADS = ("\n\n", "\n", " ", "\n\nQuestion: ", "\n---\n")  # between a document and the first question
Ids = npt.NDArray[np.int64]


class Batch(NamedTuple):
    """Arrays [B, S]: token ids, positions, weight of predicting the NEXT token, and the first entry that the row should
    find (or -1)."""

    ids: Ids
    positions: Ids
    weights: npt.NDArray[np.float32]
    hinted: Ids


@dataclass(frozen=True, slots=True)
class Stage:
    """What sequences of one stage look like: their length, how far positions are stretched, and the mix."""

    length: int
    stretch: float = 0.0
    max_position: int = 1048576
    needles: float = 0.75
    copies: float = 0.08


class Chat:
    """Pieces of a chat in token ids."""

    @cached_property
    def tokenizer(self) -> Any:
        """The bundled tokenizer."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(TOKENIZER_FILE))

    def ids(self, text: str) -> Ids:
        """Token ids of plain text."""
        return np.asarray(self.tokenizer.encode(text).ids, dtype=np.int64)

    @cached_property
    def user(self) -> int:
        """Id of the user role."""
        return int(self.tokenizer.token_to_id("<｜User｜>"))

    @cached_property
    def slot(self) -> Ids:
        """What opens an answer without thinking."""
        return np.asarray([self.tokenizer.token_to_id(t) for t in ("<｜Assistant｜>", "</think>")], dtype=np.int64)

    def turn(self, fact: Fact, *, first: bool, lead: str = "\n\n") -> tuple[Ids, Ids]:
        """Question with its answer slot, and the answer with EOS; the first question follows the document."""
        opening = self.ids(lead + fact.question) if first else np.append(self.user, self.ids(fact.question))
        return np.concatenate([opening, self.slot]), np.append(self.ids(fact.value), EOS)


class Sampler:
    """Draws batches from a token stream `text` (uint16) with one random generator."""

    def __init__(self, text: npt.NDArray[np.uint16], seed: int) -> None:
        self.text = text
        self.rng = np.random.default_rng(seed)
        self.chat = Chat()

    def batch(self, stage: Stage, count: int) -> Batch:
        """`count` sequences of one stage."""
        rows = [self._sequence(stage) for _ in range(count)]
        ids, weights, hinted = (np.stack(x) for x in zip(*rows, strict=True))
        positions = np.stack([self._positions(stage) for _ in range(count)])
        return Batch(ids, positions, weights.astype(np.float32), hinted)

    def _sequence(self, stage: Stage) -> tuple[Ids, npt.NDArray[np.float32], Ids]:
        kind = self.rng.random()
        if kind < stage.needles:
            return self._needles(stage.length)
        ids = self._filler(stage.length)
        weights = np.full(stage.length, TEXT_WEIGHT, dtype=np.float32)
        if kind < stage.needles + stage.copies:
            size = int(self.rng.integers(16, min(200, stage.length // 3)))
            source = int(self.rng.integers(1, stage.length - 2 * size))
            target = int(self.rng.integers(source + size, stage.length - size))
            ids[target : target + size] = ids[source : source + size]
            weights[target + 4 : target + size - 1] = 0.5
        weights[-1] = 0
        return ids, weights, np.full(stage.length, -1, dtype=np.int64)

    def _filler(self, length: int) -> Ids:
        start = int(self.rng.integers(0, len(self.text) - length))
        return self.text[start : start + length].astype(np.int64)

    def _needles(self, length: int) -> tuple[Ids, npt.NDArray[np.float32], Ids]:
        """A document with facts and questions about them; every answer token is a target."""
        most = max(2, min(48, length // 48))
        facts = draw_facts(self.rng, int(self.rng.integers(2, most + 1)))
        statements = [self._stated(f) for f in facts]
        budget = length // 3 if length < 4096 else 1400
        order, turns, used = self.rng.permutation(len(facts)), list[tuple[int, Ids, Ids]](), 0
        for i in order:
            lead = LEADS[int(self.rng.integers(len(LEADS)))] if self.rng.random() < 0.25 else LEADS[0]
            question, answer = self.chat.turn(facts[i], first=not turns, lead=lead)
            if used + len(question) + len(answer) > budget and turns:
                break
            used += len(question) + len(answer)
            turns.append((int(i), question, answer))
        room = length - used - 2
        keep = sorted(self._fitting(statements, {i for i, _, _ in turns}, room))
        document, starts = self._hide([statements[i] for i in keep], room)
        where = dict(zip(keep, starts, strict=True))
        ids = [np.asarray([BOS, self.chat.user]), document]
        weights = [np.full(2 + len(document), TEXT_WEIGHT)]
        hinted = [np.full(2 + len(document), -1)]
        for i, question, answer in turns:
            ids += [question, answer]
            weights.append(np.concatenate([np.zeros(len(question) - 1), np.ones(len(answer)), [0.0]]))
            # the value stands before the last token or two of its statement, as long as the answer without EOS
            entry = (2 + where[i] + len(statements[i]) - len(answer)) // CSA_RATIO
            hints = np.full(len(question) + len(answer), -1)
            hints[len(question) - 1 : -1] = entry
            hinted.append(hints)
        out = np.concatenate(weights).astype(np.float32)
        out[-1] = 0
        return np.concatenate(ids), out, np.concatenate(hinted)

    def _stated(self, fact: Fact) -> Ids:
        """A fact's statement, sometimes in the middle of a line."""
        return self.chat.ids(fact.statement if self.rng.random() < 0.75 else f" {fact.statement.strip()} ")

    def _fitting(self, statements: list[Ids], asked: set[int], room: int) -> set[int]:
        """Which statements fit: those asked about first, others while three quarters of the room are left over."""
        keep, used = set(asked), sum(len(statements[i]) for i in asked)
        for i, statement in enumerate(statements):
            if i not in keep and used + len(statement) < 0.75 * room:
                keep.add(i)
                used += len(statement)
        return keep

    def _hide(self, statements: list[Ids], room: int) -> tuple[Ids, list[int]]:
        """Filler of `room` tokens with the statements at random places in random order, and where each starts."""
        filler = self._filler(room - sum(map(len, statements)))
        order = self.rng.permutation(len(statements))
        cuts = np.sort(self.rng.integers(0, len(filler) + 1, len(statements)))
        parts, starts, at, low = list[Ids](), [0] * len(statements), 0, 0
        for i, cut in zip(order, cuts, strict=True):
            parts += [filler[low:cut], statements[i]]
            starts[i] = at + int(cut) - low
            at, low = starts[i] + len(statements[i]), int(cut)
        return np.concatenate([*parts, filler[low:]]), starts

    def _positions(self, stage: Stage) -> Ids:
        """0, 1, 2 ... with jumps of whole pages, so that distances of a million tokens occur in short sequences."""
        positions = np.arange(stage.length, dtype=np.int64)
        pages = stage.length // PAGE
        if pages < 4 or self.rng.random() >= stage.stretch:
            return positions
        jumps = int(self.rng.integers(1, min(8, pages)))
        total = int(np.exp(self.rng.uniform(0, np.log((stage.max_position - stage.length) // PAGE))))
        where = np.sort(self.rng.choice(np.arange(1, pages), jumps, replace=False)) * PAGE
        share = self.rng.dirichlet(np.ones(jumps)) * total
        for low, jump in zip(where, share, strict=True):
            positions[low:] += int(jump) * PAGE
        return positions


def load_text(path: Path, part: str = "train") -> npt.NDArray[np.uint16]:
    """A token stream of the file that `triptych.tiny.corpus` wrote."""
    with np.load(path) as arrays:
        return np.asarray(arrays[part])
