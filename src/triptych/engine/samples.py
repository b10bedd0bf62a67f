"""One request as the engine runs it: n samples that share a prompt, and the deltas their events become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from triptych.engine.loop import TokenEvent
from triptych.engine.outputs import OutputText
from triptych.errors import RequestError
from triptych.text.tokenizer import Tokenizer
from triptych.words import NO_HINTS, CacheHints, Delta, FinishReason, Request, SamplingParams, TokenIds, Usage


@dataclass(frozen=True, slots=True)
class Sample:
    """One of the n samples of a request: what the loop runs and the text that grows from it."""

    request: Request
    output: OutputText


def expand(
    request_id: str,
    prompt: TokenIds,
    params: SamplingParams,
    tokenizer: Tokenizer | None,
    salt: str = "",
    hints: CacheHints = NO_HINTS,
) -> list[Sample]:
    """The n samples of a request: as many requests with one prompt, which the first of them runs."""
    for name, value, wanted in (("params", params, SamplingParams), ("hints", hints, CacheHints)):
        if not isinstance(value, wanted):
            raise RequestError(f"{name} must be {wanted.__name__}, not {type(value).__name__}.", param=name)
    if not len(prompt):
        raise RequestError("The prompt is empty.", "Send at least one token.", param="prompt")
    if params.stop and tokenizer is None:
        raise RequestError("Stop strings need a tokenizer.", "Use stop_token_ids.", param="stop")
    others = replace(params, prompt_logprobs=None)  # the first one scores the prompt that they share
    each = [others if i else params for i in range(params.n)]
    return [
        Sample(Request(f"{request_id}.{i}", prompt, own, salt, hints), OutputText(i, own, tokenizer))
        for i, own in enumerate(each)
    ]


def deltas(event: TokenEvent, output: OutputText, finish: Callable[[str, FinishReason], Usage | None]) -> list[Delta]:
    """What an event shows to the user. A stop string ends the request through `finish`.

    If `finish` returns no usage, the end comes as a later event; tokens that were already on their way are dropped.
    """
    out: list[Delta] = []
    usage, reason = event.usage, event.reason
    if event.prompt is not None:
        out.append(Delta(output.index, prompt_logprobs=event.prompt))
    if event.token_id is not None and not output.stopped:
        delta = output.push(event.token_id, event.logprob, hidden=event.hidden)
        if delta is not None:
            out.append(delta)
        if output.stopped and reason is None:
            usage = finish(event.request_id, FinishReason.STOP)
            reason = FinishReason.STOP if usage is not None else None
    if reason is not None:
        out.append(output.finish(reason, usage or Usage(), event.error))
    return out
