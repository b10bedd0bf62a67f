"""Long real documents with keyed facts inside: Python's own library sources, which every installation has."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from triptych.errors import ConfigError
from triptych.text.tokenizer import Tokenizer
from triptych.tiny.facts import Fact, draw_facts


@dataclass(frozen=True, slots=True)
class FactDocument:
    """Text of about `tokens` tokens, the facts that are in it and the depth of each, from 0 (start) to 1 (end)."""

    text: str
    tokens: int
    facts: tuple[Fact, ...]
    depths: tuple[float, ...]


def library_document(
    tokenizer: Tokenizer, tokens: int, depths: tuple[float, ...], *, seed: int = 0, near_misses: int = 0
) -> FactDocument:
    """Library sources with one fact at each of `depths`, on lines of their own.

    `near_misses` further facts with similar keys lie at random depths and are not in `facts`. The same seed, Python
    and tokenizer give the same text. Raises ConfigError if the sources cannot be found.
    """
    rng = np.random.default_rng([seed, tokens])
    facts = draw_facts(rng, len(depths) + near_misses, held_out=True)
    places = [*depths, *rng.random(near_misses).tolist()]
    lines = _lines(tokenizer, tokens - sum(len(tokenizer.encode(fact.statement)) for fact in facts), seed)
    order = sorted(range(len(facts)), key=lambda i: places[i])
    parts, low = [], 0
    for i in order:
        high = int(places[i] * len(lines))
        parts += [*lines[low:high], facts[i].statement]
        low = high
    text = "".join([*parts, *lines[low:]])
    return FactDocument(text, len(tokenizer.encode(text)), tuple(facts[: len(depths)]), tuple(depths))


def _lines(tokenizer: Tokenizer, tokens: int, seed: int) -> list[str]:
    """Lines of library sources, about `tokens` tokens together; the seed decides at which file to begin."""
    lines: list[str] = []
    total = 0
    for text in _sources(seed):
        count = len(tokenizer.encode(text))
        new = text.splitlines(keepends=True)
        if total + count >= tokens:
            return lines + new[: int(len(new) * (tokens - total) / count)]
        lines += new
        total += count
    raise ConfigError(f"Python's library sources hold only {total:,} tokens.", "Ask for a shorter document.")


def _sources(seed: int) -> Iterator[str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in folder.rglob("*.py") if "site-packages" not in path.parts)
    if not files:
        raise ConfigError(f"No Python sources in {folder}.", "Use a Python that brings its standard library as files.")
    start = int(np.random.default_rng(seed).integers(len(files)))
    for path in files[start:] + files[:start]:
        yield path.read_text(encoding="utf-8", errors="ignore")
