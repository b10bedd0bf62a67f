"""Keyed facts, questions about them and the chat around both: one spelling for training, evaluation and demo.

A fact is a line like "The code for amber falcon is 48213." hidden in a document; the question names the key, the
answer is the value alone. Keys of one document often share a word, so that half a key does not suffice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

NOUNS = ("code", "number", "key", "password", "value", "id", "pin", "serial")
# two kinds of words make keys: pictorial ones, and words of the documentation that the filler is full of
WORDS, COMMON = (
    tuple(part.split()) for part in Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split("\n\n")
)


@dataclass(frozen=True, slots=True)
class Fact:
    """One key and its value; `noun` says what kind of thing the value is."""

    noun: str
    key: str
    value: str

    @property
    def statement(self) -> str:
        """The line that states the fact."""
        return f"\nThe {self.noun} for {self.key} is {self.value}.\n"

    @property
    def question(self) -> str:
        """What a user asks."""
        return f"What is the {self.noun} for {self.key}?"


def draw_facts(rng: np.random.Generator, count: int, *, held_out: bool = False) -> list[Fact]:
    """`count` facts with distinct keys of two words; about half of the keys share a word with another key.

    Evaluation (`held_out`) draws from the same words; its pairs and values are new because there are so many.
    """
    facts: list[Fact] = []
    used: set[str] = set()
    while len(facts) < count:
        first, second = (_word(rng) for _ in range(2))
        if facts and rng.random() < 0.5:
            shared = facts[int(rng.integers(len(facts)))].key.split(" ")
            first, second = (shared[0], second) if rng.random() < 0.5 else (first, shared[-1])
        key = _key(rng, first, second, plain=held_out)
        if key in used or first == second:
            continue
        used.add(key)
        digits = 5 if held_out else int(rng.integers(4, 8))
        value = "".join(str(d) for d in rng.integers(0, 10, digits))
        facts.append(Fact(NOUNS[int(rng.integers(len(NOUNS)))], key, value))
    return facts


def _word(rng: np.random.Generator) -> str:
    words = WORDS if rng.random() < 0.5 else COMMON
    return words[int(rng.integers(len(words)))]


def _key(rng: np.random.Generator, first: str, second: str, plain: bool) -> str:
    kind = 1.0 if plain else rng.random()
    if kind < 0.15:
        return f"{first} {second} {rng.integers(100)}"
    if kind < 0.25:
        return "".join(chr(97 + int(i)) for i in rng.integers(0, 26, 6)) + " " + second
    return f"{first} {second}"
