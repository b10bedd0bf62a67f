"""Sampling fields that both endpoints share, to SamplingParams. Ranges are checked by SamplingParams itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triptych.errors import ContextTooLong, RequestError, Unsupported
from triptych.server.fields import Fields, as_integer, as_number, wrong
from triptych.words import SamplingParams

SAMPLING_FIELDS = frozenset(
    {
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
        *("logit_bias", "seed", "stop", "stop_token_ids", "ignore_eos", "n", "max_tokens"),
    }
)
_MOST_BIASES = 1024
_MOST_STOP_IDS = 256
_MOST_SCORES = 1 << 20  # log-probabilities of prompts in one answer, some hundred bytes each
_LONGEST_STOP = 1024  # characters


def sampling_params(
    fields: Fields, vocab_size: int, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None = None
) -> SamplingParams:
    """The SamplingParams of a request body. Raises RequestError naming the field."""
    numbers: dict[str, Any] = {
        name: value
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        if (value := fields.number(name)) is not None
    }
    top_k = fields.integer("top_k") or 0
    return SamplingParams(
        max_tokens=max_tokens,
        top_k=0 if top_k == -1 else top_k,  # other engines spell "off" as -1
        logit_bias=_logit_bias(fields, vocab_size),
        seed=fields.integer("seed"),
        stop=_stop(fields),
        stop_token_ids=_stop_token_ids(fields, vocab_size),
        ignore_eos=fields.flag("ignore_eos"),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        n=n if (n := fields.integer("n")) is not None else 1,
        **numbers,
    )


def _stop(fields: Fields) -> tuple[str, ...]:
    raw = fields.value("stop")
    stops = [raw] if isinstance(raw, str) else fields.items("stop", 16)
    for i, stop in enumerate(stops):
        if not isinstance(stop, str) or not stop:
            raise RequestError("stop must be a non-empty string or a list of such.", param="stop")
        if len(stop) > _LONGEST_STOP:
            raise RequestError(f"stop[{i}] is longer than {_LONGEST_STOP} characters.", param="stop")
    return tuple(map(str, stops))


def _stop_token_ids(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    ids = [as_integer("stop_token_ids", item) for item in fields.items("stop_token_ids", _MOST_STOP_IDS)]
    return tuple(_in_vocabulary("stop_token_ids", i, vocab_size) for i in ids)


def _logit_bias(fields: Fields, vocab_size: int) -> dict[int, float]:
    biases = {}
    for key, value in fields.entries("logit_bias", _MOST_BIASES).items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise wrong("logit_bias", "an object whose keys are token ids", key)
        biases[_in_vocabulary("logit_bias", int(key), vocab_size)] = as_number("logit_bias", value)
    return biases


def _in_vocabulary(name: str, token: int, vocab_size: int) -> int:
    if not 0 <= token < vocab_size:
        raise RequestError(f"{name} has token id {token}, which is outside [0, {vocab_size}).", param=name)
    return token


def check_scores(params: SamplingParams, tokens: int, stream: bool) -> None:
    """Refuse log-probabilities of prompts of `tokens` in a stream, and an answer that would be gigabytes of JSON."""
    if params.prompt_logprobs is None:
        return
    if stream:
        raise Unsupported("Log-probabilities of a prompt are not streamed.", "Leave stream out.", param="stream")
    each = 1 + params.prompt_logprobs
    if tokens * each > _MOST_SCORES:
        raise RequestError(
            f"{each} log-probabilities for each of {tokens:,} prompt tokens are more than the {_MOST_SCORES:,} that "
            "one answer may have.",
            "Send fewer or shorter prompts, or ask for fewer of the likeliest tokens.",
            param="prompt_logprobs",
        )


def check_room(prompt_tokens: int, max_tokens: int | None, max_context: int, param: str) -> None:
    """ContextTooLong if the prompt, or the prompt with `max_tokens` of answer, does not fit into `max_context`."""
    if prompt_tokens >= max_context:
        raise ContextTooLong(
            f"The prompt has {prompt_tokens} tokens, but prompt and answer together may have {max_context}.",
            f"Shorten the prompt to at most {max_context - 1} tokens.",
            param=param,
        )
    if max_tokens is not None and prompt_tokens + max_tokens > max_context:
        raise ContextTooLong(
            f"The prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}, "
            f"but prompt and answer together may have {max_context}.",
            f"Lower max_tokens to at most {max_context - prompt_tokens}.",
            param="max_tokens",
        )


@contextmanager
def blaming(param: str) -> Iterator[None]:
    """Name `param` in errors of rooms that do not know what their input was called."""
    try:
        yield
    except RequestError as error:
        error.param = error.param or param
        raise
