"""From sampled tokens to deltas: detokenise, hold back what may become a stop string, cut at the first match."""

from __future__ import annotations

from dataclasses import replace

from triptych.text.detokenize import Detokenizer
from triptych.text.stop import StopStrings
from triptych.text.tokenizer import Tokenizer
from triptych.words import Delta, FinishReason, SamplingParams, TokenLogprob, Usage


class OutputText:
    """One sample's text as it grows. Without a tokenizer the deltas carry token ids only.

    Tokens whose text is held back travel with the delta that releases it. After `stopped` turned True no further
    token may be pushed; `finish` then gives the text before the stop string.
    """

    def __init__(self, index: int, params: SamplingParams, tokenizer: Tokenizer | None) -> None:
        self.index = index
        self.count = 0
        self._detokenizer = Detokenizer(tokenizer) if tokenizer is not None else None
        self._stops = StopStrings(params.stop, after=params.stop_after, until=params.stop_until)
        self._held = ""
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    @property
    def stopped(self) -> bool:
        """True once a stop string was reached."""
        return self._stops.matched is not None

    def push(self, token: int, logprob: TokenLogprob | None, *, hidden: bool = False) -> Delta | None:
        """Take one token; returns the delta it releases, if any.

        A `hidden` token (end of sequence, stop token) is counted and reported but has no text.
        """
        self.count += 1
        self._tokens.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        if self._detokenizer is None:
            return self._release("")
        if hidden:
            return None
        text = self._stops.push(self._detokenizer.push(token))
        if self.stopped:
            self._held = text
            return None
        return self._release(text) if text else None

    def finish(self, reason: FinishReason, usage: Usage, error: str | None = None) -> Delta:
        """The last delta: what was held back, the reason and the usage."""
        text = self._held if self.stopped else self._rest()
        if self.stopped:  # perhaps only now, by the last bytes of an unfinished character
            reason = FinishReason.STOP
        last = self._release(text)
        # a stop string is found after the fact: tokens sampled meanwhile are not part of the answer
        return replace(
            last, finish_reason=reason, usage=usage.ended_at(self.count), error=error, stop=self._stops.matched
        )

    def _release(self, text: str) -> Delta:
        delta = Delta(self.index, text, tuple(self._tokens), tuple(self._logprobs) if self._logprobs else ())
        self._tokens.clear()
        if self._logprobs:
            self._logprobs.clear()
        return delta

    def _rest(self) -> str:
        if self._detokenizer is None:
            return ""
        text = self._stops.push(self._detokenizer.flush())
        return text + self._stops.flush()
