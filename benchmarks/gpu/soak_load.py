"""The load of a soak: requests in moods, conversations that come back, and answers that must be given again.

    mixed     prompts that share beginnings, every way of sampling, some ended at any moment
    crowd     short prompts and answers so long that the cache cannot hold those that run: they preempt each other
    returns   conversations that left come back from wherever their pages are by now, and known answers are asked again
    lull      nothing begins; what runs ends, the canary computes some of it again, and known answers are asked again

Every few steps all frames, slots and pins are counted, and the device's and this process's memory.
"""

from __future__ import annotations

import math
import re
import resource
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from triptych.engine.api import Engine
from triptych.engine.loop import TokenEvent
from triptych.words import NO_HINTS, CacheHints, FinishReason, Grammar, Request, SamplingParams, TokenIds

MOODS = ("mixed", "crowd", "returns", "lull")
_EVERY = 50  # steps between two checks
_TELL = 15.0  # seconds between two lines of progress
_DRAIN = 20.0  # seconds that requests have to end when the time is over
_LIVE = 24
_KEPT = 48  # answers and conversations that are remembered
_GRAMMAR = Grammar("start: /[a-z]{1,8}( [a-z]{1,8}){0,9}/")
_WORDS = re.compile("[a-z]{1,8}( [a-z]{1,8}){0,9}")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to ask of an engine: for how long, how long prompts and answers are at most, seconds of a mood."""

    seconds: float
    tokens: int
    longest: int
    exact: bool
    mood: float = 8.0


@dataclass(slots=True, eq=False)
class Asked:
    """A request, and what it got so far; `wanted` is the answer that was given before."""

    prompt: TokenIds
    params: SamplingParams
    salt: str = ""
    talks: bool = False
    wanted: list[int] | None = None
    tokens: list[int] = field(default_factory=list)


class Load:
    """Asks for `plan.seconds`, or until `stop`; then `done` counts what happened and `wrong` says what must not be."""

    def __init__(self, engine: Engine, plan: Plan, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.stopped = False
        self._engine, self._loop, self._plan = engine, engine._loop, plan
        self._random = np.random.default_rng(seed)
        vocab = engine.shape.vocab_size
        self._bases = [self._text(min(40_000, plan.tokens // 2), i) for i in range(6)]
        self._stops = np.random.default_rng(seed + 1).integers(2, vocab, (8, max(1, vocab // 430)))
        self._live: dict[str, Asked] = {}
        self._known: list[Asked] = []
        self._talks: list[Asked] = []
        self._device: list[int] = []
        self._host: list[int] = []
        self._steps = 0
        self._mood = MOODS[0]

    def stop(self, *_: object) -> None:
        """End soon: nothing more is asked, and what runs is given up."""
        self.stopped = True

    def run(self) -> None:
        """Ask, and check; stops at the first fault, which is then the last line of `wrong`."""
        try:
            self._ask_until_the_end()
            self._let_end()
            self._check()
            self._check_empty()
        except (AssertionError, RuntimeError, ValueError) as error:
            self.wrong.append(f"{type(error).__name__} in step {self._steps}, {self._mood}: {error}"[:400])
        self._sum_up()

    # ---- the course of it

    def _ask_until_the_end(self) -> None:
        began = told = time.monotonic()
        while not self.stopped and (now := time.monotonic()) < began + self._plan.seconds:
            self._mood = MOODS[int((now - began) / self._plan.mood) % len(MOODS)]
            self._begin()
            self._end_some()
            self._step()
            if now > told + _TELL:
                told = now
                self._tell(began + self._plan.seconds - now)

    def _let_end(self) -> None:
        """What runs ends by itself, or is ended; then copies and the canary's checks."""
        self._mood = "end"
        until = time.monotonic() + _DRAIN
        while self._loop.busy and time.monotonic() < until + _DRAIN:
            if self._live and (self.stopped or time.monotonic() > until):
                for name in list(self._live):
                    self._abort(name)
            self._step()

    def _step(self) -> None:
        self._steps += 1
        for event in self._loop.step():
            self._take(event)
        if self._steps % _EVERY == 0:
            self._check()

    def _tell(self, left: float) -> None:
        preempted = int(self._loop.stats().cache["preemptions"])
        counts = {name: self.done[name] for name in sorted(self.done)}
        print(
            f"{left:.0f} s left, {self._mood}, {self._steps} steps, {len(self._live)} live, {preempted} preempted, "
            f"{counts}, wrong: {len(self.wrong)}",
            flush=True,
        )

    # ---- what is asked

    def _begin(self) -> None:
        if self._mood == "lull":
            if not self._loop.busy and self._known:
                self._again()
            return
        if len(self._live) >= _LIVE or self._random.random() > 0.4:
            return
        if self._mood == "returns" and self._random.random() < 0.6:
            if self._talks and self._random.random() < 0.7:
                self._return()
                return
            if self._known:
                self._again()
                return
        self._new()

    def _new(self) -> None:
        """A prompt with a shared beginning and an end of its own."""
        base = self._bases[self._below(len(self._bases))]
        short = self._mood == "crowd" or self._random.random() < 0.5
        cut = 1 + self._below(min(len(base), 300 if self._mood == "crowd" else 3000) if short else len(base))
        prompt = np.concatenate([base[:cut], self._text(1 + self._below(400))])
        salt = "other" if self._random.random() < 0.1 else ""
        self._add(Asked(prompt, self._params(), salt, talks=self._random.random() < 0.3))

    def _return(self) -> None:
        """The next turn of a conversation: all that was said, and something new."""
        talk = self._talks.pop(self._below(len(self._talks)))
        said = np.asarray(talk.tokens, np.int32)
        prompt = np.concatenate([talk.prompt, said, self._text(1 + self._below(200))])
        if len(prompt) < self._plan.tokens // 2:
            self.done["returned"] += 1
            self._add(Asked(prompt, self._params(), talk.salt, talks=True))

    def _again(self) -> None:
        """A prompt whose answer is known, from whatever is cached of it or, for a tenant of its own, from nothing."""
        known = self._known[self._below(len(self._known))]
        cold = self._random.random() < 0.2
        self._add(Asked(known.prompt, known.params, f"cold {self._steps}" if cold else known.salt, wanted=known.tokens))

    def _add(self, asked: Asked) -> None:
        name = f"q{self._steps}.{self.done['requests']}"
        lasting = float(self._random.choice([0.0, 0.0, 0.0, 2.0]))
        hints = CacheHints(session=asked.salt or None, pin=lasting) if lasting else NO_HINTS
        self._loop.add(Request(name, asked.prompt, asked.params, asked.salt, hints))
        self._live[name] = asked
        self.done["requests"] += 1

    def _params(self) -> SamplingParams:
        """Any way of sampling; half of the requests are greedy, and all can be repeated, since they have a seed."""
        pick, vocab = self._random.choice, self._engine.shape.vocab_size
        if self._engine.tokenizer is not None and self._random.random() < 0.1:
            return SamplingParams(
                max_tokens=64, temperature=float(pick([0.0, 1.0])), seed=self._below(1 << 30), grammar=_GRAMMAR
            )
        longest = self._plan.longest
        crowd = self._mood == "crowd"
        most = longest if crowd or self._random.random() < 0.2 else max(2, longest // 20)
        logprobs = pick([None, None, 0, 3])
        return SamplingParams(
            max_tokens=(longest // 2 if crowd else 0) + 1 + self._below(most // 2 if crowd else most),
            temperature=float(pick([0.0, 0.0, 0.8, 1.5])),
            top_p=float(pick([1.0, 0.9])),
            top_k=int(pick([0, 0, 20])),
            min_p=float(pick([0.0, 0.0, 0.05])),
            repetition_penalty=float(pick([1.0, 1.0, 1.1])),
            presence_penalty=float(pick([0.0, 0.0, 0.5])),
            frequency_penalty=float(pick([0.0, 0.0, 0.2])),
            logit_bias={self._below(vocab): 5.0} if self._random.random() < 0.1 else {},
            seed=self._below(1 << 30),
            ignore_eos=True,
            stop_token_ids=() if crowd else tuple(self._stops[self._below(len(self._stops))].tolist()),
            logprobs=None if logprobs is None else int(logprobs),
        )

    def _below(self, high: int) -> int:
        return int(self._random.integers(max(1, high)))

    def _text(self, length: int, seed: int | None = None) -> TokenIds:
        random = self._random if seed is None else np.random.default_rng(seed)
        return random.integers(2, self._engine.shape.vocab_size, length).astype(np.int32)

    # ---- what comes

    def _end_some(self) -> None:
        """Callers go away: of any request, and of those whose pages are on their way up just now."""
        if not self._live:
            return
        names = list(self._live)
        if self._loop.cache.tiers.fetching and self._random.random() < 0.1:
            waiting = [name for name in names if not self._loop.scheduler.sequence(name).running]
            if waiting:
                self.done["aborted_loading"] += 1
                self._abort(waiting[0])
        elif self._random.random() < 0.02:
            self._abort(names[self._below(len(names))])

    def _abort(self, name: str) -> None:
        self._loop.finish(name, FinishReason.ABORT)
        self._live.pop(name, None)
        self.done["aborted"] += 1

    def _take(self, event: TokenEvent) -> None:
        asked = self._live.get(event.request_id)
        if asked is None:  # ended while a step with it was under way
            return
        if event.error is not None:
            self._claim(False, f"{event.request_id}: {event.error}")
        if event.token_id is not None and not event.hidden:
            asked.tokens.append(event.token_id)
        if event.logprob is not None:
            wanted = asked.params.logprobs
            fits = wanted is not None and len(event.logprob.top) == wanted and math.isfinite(event.logprob.logprob)
            self._claim(fits, f"{event.request_id}: log-probabilities are {event.logprob}, {wanted} were asked for")
        if event.reason is not None:
            del self._live[event.request_id]
            self.done[event.reason.value] += 1
            self._ended(event, asked)

    def _ended(self, event: TokenEvent, asked: Asked) -> None:
        usage = event.usage
        if usage is not None:
            self.done[f"resumed_{usage.resume}"] += 1
            self.done.update({f"from_{tier}": 1 for tier in usage.cached_by_tier})
        if asked.params.grammar is not None and event.reason is FinishReason.STOP:
            self.done["grammar"] += 1
            assert self._engine.tokenizer is not None
            said = self._engine.tokenizer.decode(asked.tokens)
            self._claim(
                _WORDS.fullmatch(said.strip()) is not None, f"{event.request_id}: {said!r} is not of its grammar"
            )
        if asked.wanted is not None:
            self._compare(event, asked, asked.wanted)
            return
        if asked.talks:
            _keep(self._talks, asked, self._random)
        elif asked.tokens and len(asked.tokens) <= self._plan.longest // 4:
            _keep(self._known, asked, self._random)

    def _compare(self, event: TokenEvent, asked: Asked, wanted: list[int]) -> None:
        """An answer and the one that was given before, which it must be where rows do not depend on their mates."""
        same = sum(one == other for one, other in zip(asked.tokens, wanted, strict=False))
        self.done["again"] += 1
        self.done["again_same"] += asked.tokens == wanted
        self.done["again_tokens"] += len(wanted)
        self.done["again_tokens_same"] += same
        resume = "unknown" if event.usage is None else event.usage.resume
        self._claim(
            asked.tokens == wanted or not self._plan.exact,
            f"{event.request_id}: the same prompt of {len(asked.prompt)} tokens ({resume}) gave another answer "
            f"after {same} of {len(wanted)} tokens",
        )

    def _claim(self, holds: bool, sentence: str) -> None:
        if not holds:
            self.wrong.append(sentence[:400])
            print(f"WRONG: {sentence}"[:400], flush=True)

    # ---- checks

    def _check(self) -> None:
        self._engine.check_integrity()
        if torch.cuda.is_available():
            self._device.append(torch.cuda.memory_allocated())
        self._host.append(_resident())

    def _check_empty(self) -> None:
        """Nobody holds anything any more."""
        stats = self._loop.cache.stats()
        held = {"pages": stats.pages_held, "slots": stats.slots - stats.slots_free, "loading": stats.frames_loading}
        assert not self._loop.busy, "there is work that does not end"
        assert not any(held.values()), f"all requests have ended, and {held} are held"

    def _sum_up(self) -> None:
        """The highest of the second and of the last third of the checks: what grows is a leak."""
        self.done["checks"] = len(self._host)
        for name, seen in (("allocated", self._device), ("resident", self._host)):
            third = max(1, len(seen) // 3)
            self.done[f"{name}_mib_early"] = max(seen[third : 2 * third], default=0) >> 20
            self.done[f"{name}_mib_late"] = max(seen[2 * third :], default=0) >> 20


def _keep(kept: list[Asked], asked: Asked, random: np.random.Generator) -> None:
    """Remember it, in the place of any other where those are many."""
    if len(kept) < _KEPT:
        kept.append(asked)
    else:
        kept[int(random.integers(_KEPT))] = asked


def _resident() -> int:
    """Bytes of this process in memory."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def facts_of(engine: Engine) -> dict[str, Any]:
    """Counters of the engine that belong into a row."""
    stats = engine._loop.stats()
    names = ("preemptions", "rerun_tokens", "fetches_failed", "saves_failed", "pages_evicted", "snapshots_evicted")
    names += ("host_bytes_in", "host_bytes_out", "disk_bytes_in", "disk_bytes_out", "canary_checked", "canary_failed")
    counted = {name: stats.cache[name] for name in names if name in stats.cache}
    return {
        **{"steps": stats.steps, "generated": stats.generated_tokens, "prompt": stats.prompt_tokens},
        **{"cached": stats.cached_tokens, **counted},
    }
