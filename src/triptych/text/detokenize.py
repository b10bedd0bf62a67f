"""Token ids to text, one at a time: a character split over several tokens is shown when its last byte came."""

from __future__ import annotations

import codecs

from triptych.text.tokenizer import Tokenizer


class Detokenizer:
    """Text of a growing token list. The pushes and the flush, joined, equal `Tokenizer.decode` of the whole list.

    Work per token is proportional to its own bytes: at most three bytes of an unfinished character are kept.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is unfinished or the token is special."""
        return self._utf8.decode(self._tokenizer.shown_bytes(token_id))

    def flush(self) -> str:
        """What remains at the end: U+FFFD if a character was never finished, else nothing."""
        return self._utf8.decode(b"", True)
