"""What users call: `Engine` in the caller's thread, `AsyncEngine` with a thread of its own.

Both hand whole token lists to the same EngineLoop and turn its events into deltas.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from triptych.engine.async_engine import AsyncEngine
from triptych.engine.face import Face
from triptych.engine.load import LoadedEngine
from triptych.engine.outputs import OutputText
from triptych.engine.renewal import Source, stage, swap
from triptych.engine.samples import Sample, deltas, expand
from triptych.engine.step_times import StepTime, timed_steps
from triptych.engine.watch import Ids, watch_selections
from triptych.errors import RequestError, TriptychError
from triptych.values import integral
from triptych.words import (
    NO_HINTS,
    CacheHints,
    Delta,
    EngineStats,
    FinishReason,
    SamplingParams,
    TokenIds,
    TokenLogprob,
    Usage,
    WeightsUpdate,
    token_ids,
)

__all__ = ["AsyncEngine", "Engine", "Output"]

_FLUSH_SECONDS = 60.0  # for copies that were still under way to disk

Prompt = str | Sequence[int] | TokenIds


@dataclass(frozen=True, slots=True)
class Output:
    """One finished sample. `logprobs` has one entry per token if they were asked for, `prompt_logprobs` one per token
    of the prompt, of which the first is None: nothing is before it."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()
    index: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


class Engine(Face):
    """Offline inference. Not for use from several threads at once; AsyncEngine is.

    from triptych import Engine, SamplingParams
    engine = Engine.load("tiny")
    [out] = engine.generate(["Once upon a time"], SamplingParams(max_tokens=32, temperature=0.0))
    """

    def __init__(self, loaded: LoadedEngine) -> None:
        super().__init__(loaded)
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._user: int | None = None  # the thread that has the lock
        self._closed = False
        self.tokenizer = loaded.tokenizer

    def generate(
        self,
        prompts: Iterable[Prompt],
        params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        hints: CacheHints = NO_HINTS,
    ) -> list[Output]:
        """Continue all prompts together; n outputs per prompt, in order. Raises RequestError for a bad prompt.

        `params` is one for all or one per prompt; `hints`, what is known about reuse, is one for all.
        """
        prompts = _list_of_prompts(prompts)
        each = _each(params, len(prompts))
        with self._turn():
            samples = [s for prompt, one in zip(prompts, each, strict=True) for s in self._expand(prompt, one, hints)]
            parts: dict[str, list[Delta]] = {s.request.request_id: [] for s in samples}
            for request_id, delta in self._run(samples):
                parts[request_id].append(delta)
        outputs: list[Output] = []
        for sample in samples:
            outputs.append(_output(parts[sample.request.request_id], outputs[-1] if sample.output.index else None))
        return outputs

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, hints: CacheHints = NO_HINTS
    ) -> Iterator[Delta]:
        """Continue one prompt, yielding text as it comes. Closing the iterator aborts."""
        with self._turn():
            for _, delta in self._run(self._expand(prompt, params, hints)):
                yield delta

    @contextmanager
    def watch_selections(self) -> Iterator[list[list[Ids]]]:
        """What the indexers choose while this is open; see engine.watch. For evaluation: one request at a time."""
        with watch_selections(self._loop.model) as steps:
            yield steps

    @contextmanager
    def timed_steps(self, clock: Callable[[], float] = time.perf_counter) -> Iterator[list[StepTime]]:
        """Plans and seconds of the steps that run while this is open; see engine.step_times."""
        with timed_steps(self._loop, clock) as steps:
            yield steps

    def update_weights(self, source: Source) -> WeightsUpdate:
        """Replace the weights by those of a checkpoint directory of the same shape, or by (name, tensor) pairs.

        All or nothing: CheckpointError names a tensor that is missing or odd, and the old weights stay. Nothing that
        they computed is found in any cache any more; answers are those of an engine that was loaded with the new ones.
        Raises RequestError while a stream is open.
        """
        if not self._lock.acquire(blocking=False):
            raise RequestError("The engine is answering a request.", "Close its stream, or take all of it, first.")
        try:
            staged = stage(self._loaded, source)
            return swap(self._loaded, staged)
        finally:
            self._lock.release()

    def stats(self) -> EngineStats:
        """Requests, tokens and figures of the cache as of now."""
        return self._loop.stats()

    def check_integrity(self) -> None:
        """Assert that every page, slot and snapshot is accounted for."""
        self._loop.cache.check_integrity()

    def reset_cache(self) -> None:
        """Forget all cached prefixes. Only between requests."""
        self._loop.cache.reset()

    def close(self) -> None:
        """Finish the copies to lower tiers and let go of files. The engine cannot be used afterwards."""
        self._closed = True
        self._loop.settle(_FLUSH_SECONDS)
        self._loop.close()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The loop for one caller alone: another thread waits, and who would wait for his own stream is told so."""
        if self._closed:
            raise RequestError("The engine is closed.", "Load it again.")
        if self._user == threading.get_ident():
            raise RequestError("A stream of this engine is open.", "Close it, or take all of it, first.")
        with self._lock:
            self._user = threading.get_ident()
            try:
                yield
            finally:
                self._user = None

    def _expand(self, prompt: Prompt, params: SamplingParams | None, hints: CacheHints) -> list[Sample]:
        params = SamplingParams() if params is None else params
        return expand(f"r{next(self._ids)}", self._encode(prompt), params, self.tokenizer, hints=hints)

    def _encode(self, prompt: Prompt) -> TokenIds:
        if not isinstance(prompt, str):
            return token_ids(prompt, vocab_size=self.shape.vocab_size)
        if self.tokenizer is None:
            raise RequestError("This checkpoint has no tokenizer.json.", "Pass token ids.", param="prompt")
        return self.tokenizer.encode(prompt)

    def _run(self, samples: list[Sample]) -> Iterator[tuple[str, Delta]]:
        """Feed samples in as room permits and yield their deltas until all have ended."""
        live: dict[str, OutputText] = {}
        waiting = list(reversed(samples))
        try:
            while waiting or live:
                while waiting and len(live) < self.config.max_waiting:
                    sample = waiting.pop()
                    self._loop.add(sample.request, sample.output.index)
                    live[sample.request.request_id] = sample.output
                for event in self._loop.step():
                    for delta in deltas(event, live[event.request_id], self._loop.finish):
                        yield event.request_id, delta
                        if delta.finish_reason is not None:
                            del live[event.request_id]
        finally:
            for request_id in live:
                self._loop.finish(request_id, FinishReason.ABORT)


def _list_of_prompts(prompts: object) -> list[Prompt]:
    """Whatever holds prompts as a list; RequestError for what is one prompt, or none."""
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        remedy = "Wrap the string in a list." if isinstance(prompts, str) else ""
        raise RequestError("generate takes a list of prompts.", remedy, param="prompts")
    several = list(prompts)
    if several and integral(several[0]) is not None:
        raise RequestError("generate takes a list of prompts.", "Wrap the token ids in a list.", param="prompts")
    return several


def _each(params: object, count: int) -> list[Any]:
    """As many SamplingParams as there are prompts, unchecked: one for all, or one for each."""
    if not isinstance(params, Iterable) or isinstance(params, Mapping):
        return [params] * count
    each = list(params)
    if len(each) != count:
        raise RequestError(f"{count} prompts but {len(each)} SamplingParams.", param="params")
    return each


def _output(parts: list[Delta], first: Output | None) -> Output:
    """The sample that these deltas are; `first` has what samples of one prompt share."""
    last, scored = parts[-1], parts[0].prompt_logprobs
    if last.error is not None:
        raise TriptychError(last.error)
    assert last.finish_reason is not None and last.usage is not None
    return Output(
        text="".join(part.text for part in parts),
        token_ids=tuple(token for part in parts for token in part.token_ids),
        finish_reason=last.finish_reason,
        usage=last.usage,
        logprobs=tuple(one for part in parts for one in part.logprobs),
        index=last.index,
        prompt_logprobs=(None, *scored.entries()) if scored is not None else first.prompt_logprobs if first else (),
    )
