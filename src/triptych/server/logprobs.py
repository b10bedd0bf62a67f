"""Log-probabilities in the two spellings of OpenAI's APIs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from triptych.server.wire import ChatLogprobs, ChatTokenLogprob, RankedToken, TextLogprobs, TopLogprob
from triptych.text.detokenize import Detokenizer
from triptych.text.tokenizer import Tokenizer
from triptych.words import PromptLogprobs, TokenLogprob

_FLOOR = -9999.0  # what OpenAI sends for minus infinity, which JSON cannot say


def finite(logprob: float) -> float:
    """`logprob`, or the floor where JSON has no number for it."""
    return logprob if logprob > _FLOOR else _FLOOR


def chat_logprobs(tokens: tuple[TokenLogprob, ...], tokenizer: Tokenizer) -> ChatLogprobs:
    """The `logprobs` object of a chat choice for these tokens."""
    return ChatLogprobs([_chat_token(one, tokenizer) for one in tokens])


def _chat_token(one: TokenLogprob, tokenizer: Tokenizer) -> ChatTokenLogprob:
    chosen = _candidate(one.token_id, one.logprob, tokenizer)
    top = [_candidate(token, logprob, tokenizer) for token, logprob in one.top]
    return ChatTokenLogprob(chosen.token, chosen.logprob, chosen.bytes, top)


def _candidate(token: int, logprob: float, tokenizer: Tokenizer) -> TopLogprob:
    spelling = tokenizer.token_bytes(token)
    return TopLogprob(spelling.decode("utf-8", "replace"), finite(logprob), list(spelling))


def echoed(prompt: PromptLogprobs, likeliest: int) -> Iterator[TokenLogprob]:
    """All tokens of a prompt; the first, before which there is nothing, with NaN."""
    yield TokenLogprob(int(prompt.token_ids[0]), math.nan)
    for one in prompt.entries():
        yield TokenLogprob(one.token_id, one.logprob, one.top[:likeliest])


def ranked(prompt: PromptLogprobs, likeliest: int, tokenizer: Tokenizer) -> list[dict[str, RankedToken] | None]:
    """vLLM's `prompt_logprobs`: null, then by token id the `likeliest` tokens and the prompt's own."""
    out: list[dict[str, RankedToken] | None] = [None]
    for one, rank in zip(prompt.entries(), prompt.lines[:, 1].tolist(), strict=True):
        found = [(token, logprob, at + 1) for at, (token, logprob) in enumerate(one.top[:likeliest])]
        some = {}
        for token, logprob, place in [*found, (one.token_id, one.logprob, int(rank))]:
            some[str(token)] = RankedToken(
                finite(logprob), place, tokenizer.token_bytes(token).decode("utf-8", "replace")
            )
        out.append(some)
    return out


class TextLogprobWriter:
    """The `logprobs` object of one completions choice, piece by piece; it counts the characters shown so far."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer)
        self._offset = 0

    def write(self, tokens: Iterable[TokenLogprob]) -> TextLogprobs:
        """The object for the next tokens. Two alternatives with one spelling keep the likelier one's logprob."""
        out = TextLogprobs([], [], [], [])
        tops: list[dict[str, float] | None] = []
        for one in tokens:
            known = not math.isnan(one.logprob)
            out.tokens.append(self._spell(one.token_id))
            out.token_logprobs.append(finite(one.logprob) if known else None)
            out.text_offset.append(self._offset)
            top: dict[str, float] = {}
            for token, logprob in one.top:
                top.setdefault(self._spell(token), finite(logprob))
            tops.append(top if known else None)
            self._offset += len(self._detokenizer.push(one.token_id))
        out.top_logprobs = tops if any(tops) else None
        return out

    def _spell(self, token: int) -> str:
        """The token's text; bytes that are no text of their own are spelled as `bytes:\\xe2\\x80`."""
        spelling = self._tokenizer.token_bytes(token)
        try:
            return spelling.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)
