"""Keyed facts, questions about them and the chat around both: one spelling for training, evaluation and demo.

A fact is a line like "The code for amber falcon is 48213." hidden in a document; the question names the key, the
answer is the value alone. Keys of one document often share a word, so that half a key does not suffice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NOUNS = ("code", "number", "key", "password", "value", "id", "pin", "serial")
WORDS = tuple(
    """amber anchor apple arrow autumn badge bamboo basil beacon berry bishop blossom bottle breeze bridge bronze butter
    cabin cactus camel candle canyon carbon castle cedar cherry circle clover cobalt comet copper coral cotton cradle
    crystal dagger daisy desert diamond dolphin dragon eagle ember engine falcon feather fern flame forest fossil fox
    garden garnet ginger glacier golden granite grape harbor hazel helmet heron honey hunter indigo iron island ivory
    jacket jaguar jasmine jungle kettle kite ladder lagoon lantern laurel lemon lily lion lotus magnet maple marble
    meadow melon mercury mirror monkey moon mosaic mountain nectar needle nickel oak oasis ocean olive onyx opal orange
    orchid otter oxygen oyster panda paper parrot pearl pebble pepper petal pigeon pine planet plum pocket pony poppy
    prairie prism pumpkin quartz rabbit raven ribbon river robin rocket rose ruby saddle saffron sailor salmon sand
    sapphire scarlet shadow silver spider spiral spruce star stone storm sugar sunset swan table temple thunder tiger
    timber topaz tulip tunnel turtle valley velvet violet walnut water whale willow winter wolf yellow zebra""".split()
)
# words of the documentation itself, one token each: filler is full of them
COMMON = tuple(
    """action against already amount another appear archive argument around array assert asyncio attempt avoid backup
    base become behavior best better binary block body boolean bound break buffer build built cache callable
    callback caller case cause certain child clause clear client cluster color column command commit common compile
    compiler complete complex conflict content context continue control copy correct count current cursor custom
    database date datetime decimal default disk display doctest doesn domain double dump effect element email empty
    ensure entire entry equal error escape event example exit extra failure faster feature field file filename
    filter final find flag foreign format found frame free full function future general given global group handler
    hard hash header heap help host import index input inside instance instead integer internal invalid item
    iterable iterator join journal keep keyword kind known label language large last later least left length level
    library line list literal locale location lock logger long longer loop lower macro made main make manager
    maximum member memory message method might mock mode modify module multiple name negative network newline next
    node note numeric object offset often opcode open operand operator option optional order original output
    override owner package page pair parent parser path pattern payload place planner pointer policy position
    possible pragma prefix present prevent primary print prior problem program protocol public python query queue
    random range read real recent record regular relation relative remote rescode reset response result right role
    root routine safe scan schema script search second section security seealso sent separate sequence server
    session several shell short shown side signal similar simple single size slot small socket source space special
    specific specify stack standard standby start static step stop storage stream support sure syntax system taken
    target task test text third thread three time timeout total tree trigger tuple type unique usage useful user
    valid variable view virtual void vtab want well widget width window wrapper write written year yield zero zone""".split()
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
