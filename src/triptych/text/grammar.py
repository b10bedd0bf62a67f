"""Grammars at work: compiled once, then a mask over the vocabulary for every token, by llguidance (extra `grammar`).

    Grammar (a value, see words) --GrammarCache.start--> GrammarState --mask--> bits [V / 32] --accept(token)--> ...

A mask is computed in tens of microseconds without Python's lock, so it runs beside the model. Before the token from
which on a grammar holds nothing is computed at all.
"""

from __future__ import annotations

import importlib.util
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt

from triptych.errors import RequestError, Unsupported
from triptych.text.tokenizer import Tokenizer
from triptych.words import Grammar

MaskBits = npt.NDArray[np.int32]
_OLDEST = (1, 9)  # llguidance that takes several ends of text
_MOST_COMPILED = 256  # grammars; a compiled one takes from tens of kilobytes to some megabytes
_MOST_ITEMS = 20_000  # of a parser's row: an object of some thousand optional properties
_MOST_STATES = 50_000  # of a lexer; one takes a kilobyte or two
_LONGEST = 4 << 20  # characters of one grammar


def available() -> bool:
    """True if an llguidance is installed that this works with."""
    return _lacking() is None


def require(param: str) -> None:
    """Raises Unsupported, blaming `param`, unless llguidance is installed, and new enough."""
    lacking = _lacking()
    if lacking is not None:
        raise Unsupported(f"{param} needs {lacking[0]}", lacking[1], param=param)


def _lacking() -> tuple[str, str] | None:
    """What is missing for grammars and what to do about it, or None."""
    if importlib.util.find_spec("llguidance") is None:
        return "grammars, which are not installed here.", "Install them with 'pip install triptych[grammar]'."
    installed = _installed()
    if tuple(int(part) for part in re.findall(r"\d+", installed)[:2]) >= _OLDEST:
        return None
    needed = f"llguidance {'.'.join(map(str, _OLDEST))} or newer; {installed} is installed."
    return needed, "Bring it up to date with 'pip install --upgrade triptych[grammar]'."


@cache
def _installed() -> str:
    """The version of llguidance; half a millisecond to look up."""
    return metadata.version("llguidance")


class GrammarState:
    """Where one sample stands in its grammar. `mask` may run in any thread, but not beside `accept`."""

    def __init__(self, matcher: Any, grammar: Grammar, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._after = grammar.after
        self._words = (vocab_size + 31) // 32
        self._before: MaskBits | None = None
        if grammar.after is not None and not grammar.optional:
            self._before = np.full(self._words, -1, np.int32)
            for token in eos_ids:
                self._before[token // 32] &= ~np.int32(_bit(token))

    def mask(self) -> MaskBits | None:
        """Which tokens may come next, bit i % 32 of word i // 32 for token i, or None where all may.

        Raises RuntimeError if the grammar became too complex to follow; nothing can be sampled then.
        """
        if self._after is not None:
            return self._before
        bits = np.zeros(self._words, np.int32)
        if self._matcher.is_error():
            raise RuntimeError(f"The grammar could not be followed: {in_short(self._matcher.get_error())}.")
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        return bits

    def accept(self, token: int) -> None:
        """Take `token` as the next one of the output."""
        if self._after is not None:
            if token == self._after:
                self._after = None
        elif not self._matcher.is_error() and not self._matcher.is_stopped():
            self._matcher.consume_token(token)

    @property
    def done(self) -> bool:
        """True once what was accepted matches the whole grammar."""
        return self._after is None and bool(self._matcher.is_accepting())


def _bit(token: int) -> int:
    value = 1 << (token % 32)
    return value - (1 << 32) if value >> 31 else value


class GrammarCache:
    """Compiles grammars for one tokenizer and keeps them, least recently used first to go. For use from any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        """`vocab_size` and `eos_ids` are the model's; nothing is loaded until a grammar is met."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = tuple(eos_ids)
        self._ll: Any = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._loading = threading.Lock()

    def check(self, grammar: Grammar | None, *, param: str = "grammar") -> None:
        """Compile `grammar` so that `start` is quick. Takes milliseconds: not for the event loop or a step.

        Raises RequestError, blaming `param`, if it is no grammar or none that can be followed.
        """
        if grammar is not None:
            self._matcher(grammar.lark, param)

    def start(self, grammar: Grammar) -> GrammarState:
        """A fresh state at the beginning of `grammar`. Raises RequestError as `check` does."""
        return GrammarState(self._matcher(grammar.lark, "grammar"), grammar, self._vocab_size, self._eos_ids)

    def fault(self, lark: str) -> str:
        """What is wrong with a grammar, in one line; empty if nothing is."""
        return self._compile(lark)[1]

    def _matcher(self, lark: str, param: str) -> Any:
        with self._lock:
            found = self._compiled.get(lark)
            if found is not None:
                self._compiled.move_to_end(lark)
                return found.deep_copy()
        require(param)
        matcher, fault = self._compile(lark)
        if fault:
            raise RequestError(f"{param} cannot be followed: {fault}.", param=param)
        with self._lock:
            self._compiled[lark] = matcher
            while len(self._compiled) > _MOST_COMPILED:
                self._compiled.popitem(last=False)
            return matcher.deep_copy()

    def _compile(self, lark: str) -> tuple[Any, str]:
        """A matcher at the beginning of a grammar, and what is wrong with it."""
        from llguidance import LLMatcher, LLParserLimits

        if len(lark) > _LONGEST:
            return None, f"it is longer than {_LONGEST} characters"
        limits = LLParserLimits(max_items_in_row=_MOST_ITEMS, max_lexer_states=_MOST_STATES, verbose_errors=False)
        matcher = LLMatcher(self._guide(), lark, log_level=0, limits=limits)
        if matcher.is_error():
            return None, in_short(matcher.get_error())
        first = matcher.deep_copy()  # too complex for its first token already?
        begins = any(first.compute_bitmask())
        if first.is_error():
            return None, in_short(first.get_error())
        return matcher, "" if begins else "nothing matches it"

    def _guide(self) -> Any:
        """The vocabulary as llguidance wants it; built once."""
        with self._loading:
            if self._ll is None:
                from llguidance import LLTokenizer
                from llguidance._tokenizer import TokenizerWrapper

                vocabulary = TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size, self._eos_ids[0]))
                self._ll = LLTokenizer(vocabulary, eos_token=list(self._eos_ids))
            return self._ll


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_id: int) -> None:
        self.eos_token_id = eos_id
        self.bos_token_id = tokenizer.bos_id
        # a model may have rows that no token uses: nothing spells them, so they are never allowed
        self.tokens = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        self.special_token_ids = sorted(tokenizer.control_ids)
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text.decode("utf-8", "replace")).tolist()
        return ids


def in_short(text: str) -> str:
    """What an error of llguidance says, in one line."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if "NoExtension" in text:
        return "nothing matches it"
    last = next((line for line in lines if line.startswith("error:")), lines[0] if lines else "unknown reason")
    return last.removeprefix("error:").strip().rstrip(".")[:300]
