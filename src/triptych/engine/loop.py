"""The engine's heartbeat: plan a step, run it, apply what came out, end what is over.

Single-threaded and free of any clock or queue: `Engine` drives it in the caller's thread, `AsyncEngine` in its own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from torch import Tensor

from triptych.cache.manager import CacheManager
from triptych.config import ModelShape
from triptych.engine.canary import PREFIX, Canary
from triptych.engine.device_sampler import Draw
from triptych.engine.masks import Masks
from triptych.engine.mover import Mover
from triptych.engine.runner import Flight, Runner
from triptych.engine.sampler import SamplerState
from triptych.errors import Unavailable, Unsupported
from triptych.model.transformer import Transformer
from triptych.schedule.scheduler import Scheduler
from triptych.words import (
    EngineStats,
    FinishReason,
    PromptLogprobs,
    Request,
    SampledToken,
    StepPlan,
    StepResult,
    TokenLogprob,
    Usage,
)

_IDLE_WAIT = 0.05  # seconds to wait for a copy when no rows can run
_TELLING_ROWS = 64  # rows of a prefill that say how fast it is


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One request gained a token (`token_id` is not None), ended (`reason` is not None), or both.

    `hidden`: the token ends the sequence and is not part of its text. `prompt` comes with the first one, if at all.
    """

    request_id: str
    token_id: int | None = None
    logprob: TokenLogprob | None = None
    hidden: bool = False
    reason: FinishReason | None = None
    usage: Usage | None = None
    error: str | None = None
    prompt: PromptLogprobs | None = None


class EngineLoop:
    """Owns the scheduler, the cache manager, the runner and one sampler state per live request."""

    def __init__(
        self,
        shape: ModelShape,
        cache: CacheManager,
        scheduler: Scheduler,
        runner: Runner,
        mover: Mover,
        canary: Canary | None = None,
    ) -> None:
        self.cache = cache
        self._mover = mover
        self._canary = canary
        self.scheduler = scheduler
        self._shape = shape
        self._runner = runner
        self._samplers: dict[str, SamplerState] = {}
        self._flights: deque[Flight] = deque()
        self._owners: dict[int, SamplerState] = {}  # whose tokens were last counted on the device, by slot
        self._paused = self._torn = False
        self.masks: Masks | None = None  # set where there is a tokenizer, without which no grammar means anything

    @property
    def model(self) -> Transformer:
        """The model that steps run."""
        return self._runner.model

    @property
    def busy(self) -> bool:
        """True while there is anything to do: requests, steps or copies under way, or a check of the canary.

        While it is paused, only what has begun is to be done.
        """
        if self.paused:
            return bool(self._flights or self.cache.tiers.fetching or self.cache.tiers.saving)
        return (
            bool(self._flights)
            or self.scheduler.busy
            or self.cache.tiers.busy
            or (self._canary is not None and self._canary.waiting)
        )

    @property
    def live(self) -> bool:
        """True while there are requests, whatever they wait for; checks of the canary are nobody's."""
        return any(not name.startswith(PREFIX) for name in self._samplers)

    @property
    def paused(self) -> bool:
        """True while no step may begin."""
        return self._paused or self._torn

    def halt(self) -> list[TokenEvent]:
        """Wait for all steps under way; returns what they produced."""
        return self._land(0)

    def pause(self) -> None:
        """No step begins from here on. Requests keep their places, pages and slots."""
        self._paused = True

    def resume(self) -> None:
        """Steps begin again. Unavailable where new weights could not be put in place as a whole."""
        if self._torn:
            raise Unavailable("The weights are a mixture of two versions.", "Update them again, or restart.")
        self._paused = False

    def replace_weights(self, put: Callable[[], bytes]) -> int:
        """Other weights from the next step on; nothing that the old ones computed is found any more. Call `halt` first.

        `put` overwrites them and returns the namespace of what they compute. Requests that run go back to the queue
        with their tokens and start again; returns how many. If `put` raises, no step begins until one succeeds.
        """
        assert not self._flights, "a step is under way"
        if self._canary is not None:
            if self._canary.running is not None:
                self.finish(self._canary.running, FinishReason.ERROR)
            self._canary.forget()
        self._torn = True
        self.cache.renew(put())
        self._torn = False
        self.scheduler.weights += 1
        return self.scheduler.suspend_all()

    def add(self, request: Request, sample_index: int = 0) -> None:
        """Queue a request. Raises ContextTooLong if it can never fit, QueueFull if too many wait.

        A grammar that was not compiled before (`GrammarCache.check`) is compiled now, or refused.
        """
        state = SamplerState(
            request.request_id,
            request.params,
            self._shape.vocab_size,
            prompt_ids=request.prompt_ids,
            sample_index=sample_index,
        )
        if request.params.grammar is not None:
            if self.masks is None:
                raise Unsupported("A grammar needs a tokenizer, which this checkpoint lacks.", param="grammar")
            state.grammar = self.masks.grammars.start(request.params.grammar)
        self.scheduler.add(request)
        self._samplers[request.request_id] = state

    def finish(self, request_id: str, reason: FinishReason) -> Usage | None:
        """End a request now, whatever it is doing; what it computed stays cached. None if it is not known."""
        if self._samplers.pop(request_id, None) is None:
            return None
        if self._canary is not None:
            self._canary.ended(request_id)
        if request_id.startswith(PREFIX):
            reason = FinishReason.ERROR  # nobody shares the pages of a check: they are dropped
        return self.scheduler.finish(request_id, reason)

    def step(self) -> list[TokenEvent]:
        """Start one step and land those beyond the runner's depth: the same one, or on a GPU the one before it.

        Returns what happened, in plan order; empty if there was nothing to do.
        """
        self._take_in()
        if self.paused:
            events = self._land(0)
            if not events and self.busy:
                self._take_in(_IDLE_WAIT)
            return events
        self._watch_over()
        depth = self._depth()
        events = self._land(0) if self.scheduler.strained or not depth else []
        plan = self.scheduler.plan()
        self._mover.run(self.cache.due())  # before the step, which writes into frames that are demoted here
        if plan is not None:
            self._flights.append(self._start(plan))
            return events + self._land(depth)
        self._runner.save(self.scheduler.take_saves())
        if self._flights:
            return events + self._land(0)
        if not events:
            self._take_in(_IDLE_WAIT)
        return events

    def settle(self, timeout: float) -> bool:
        """Finish the copies to lower tiers while nothing else runs. False if `timeout` seconds did not suffice."""
        deadline = time.monotonic() + timeout
        self._land(0)  # rows of requests that have ended
        self._mover.run(self.cache.due())
        self._runner.save(self.scheduler.take_saves())
        while self.cache.tiers.busy and time.monotonic() < deadline:
            self._mover.run(self.cache.due())
            self._take_in(_IDLE_WAIT)
        return not self.cache.tiers.busy

    def close(self) -> None:
        """Let go of threads and stores; copies that were not finished are lost."""
        self._mover.close()
        if self.masks is not None:
            self.masks.close()

    def _take_in(self, timeout: float = 0.0) -> None:
        """Copies that have ended; waits for the first of those under way."""
        for done in self._mover.poll(timeout):
            self.cache.end(done)

    def _watch_over(self) -> None:
        """Start a check of the canary when nothing else is to be done, and end it as soon as something is."""
        canary = self._canary
        if canary is None:
            return
        if canary.running is not None:
            if len(self._samplers) > 1:
                name = canary.running
                canary.give_up()
                self.finish(name, FinishReason.ERROR)
        elif canary.waiting and not self._samplers:
            self.add(canary.next())

    def end_all(self, reason: FinishReason, sentence: str) -> list[TokenEvent]:
        """End every request. After a step that broke, with ERROR: the next plan then starts from an empty cache."""
        broken = reason is FinishReason.ERROR
        if broken:
            self._flights.clear()
        events = self._land(0)
        for request_id in tuple(self._samplers):
            usage = self.finish(request_id, reason)
            if not request_id.startswith(PREFIX):
                events.append(TokenEvent(request_id, reason=reason, usage=usage, error=sentence))
        if broken:
            self.scheduler.abandon()
        return events

    def stats(self) -> EngineStats:
        """Requests and tokens as of now."""
        s = self.scheduler.stats()
        cache = {**asdict(self.cache.stats()), "preemptions": s.preemptions, "rerun_tokens": s.rerun_tokens}
        moved = self.cache.tiers.moved
        cache |= {f"{tier}_bytes_in": size for tier, size in moved.bytes_in.items()}
        cache |= {f"{tier}_bytes_out": size for tier, size in moved.bytes_out.items()}
        cache |= {"saves_missed": moved.missed_saves, "saves_failed": moved.failed_saves}
        cache["fetches_failed"] = moved.failed_fetches
        cache |= {f"{tier}_tokens_found": tokens for tier, tokens in moved.tokens.items()}
        if (host := self.cache.tiers.host) is not None:
            pages = len(host.objects) - host.snapshots
            cache |= {"host_pages": pages, "host_snapshots": host.snapshots, "host_frames_free": len(host.free)}
        for name, store in self.cache.tiers.stores.items():
            cache |= {f"{name}_{key}": value for key, value in store.stats()._asdict().items()}
        if self._canary is not None:
            cache |= {"canary_checked": self._canary.checked, "canary_failed": self._canary.failed}
        # a check is nobody's request
        checked, tokens = (self._canary.checked, self._canary.tokens) if self._canary is not None else (0, 0)
        checking = self._canary is not None and self._canary.running is not None
        return EngineStats(
            running=max(0, s.running - checking),  # a check may still be waiting
            waiting=s.waiting,
            steps=s.steps,
            prompt_tokens=s.prompt_tokens - tokens,
            cached_tokens=s.cached_tokens,
            recomputed_tokens=s.recomputed_tokens,
            generated_tokens=s.generated_tokens - checked,
            prefill_rows=s.prefill_rows,
            cache=cache,
            state="paused" if self.paused else "running",
            weights=self.scheduler.weights,
        )

    def _depth(self) -> int:
        """Steps that may be under way when the next is planned: a grammar must know the token before."""
        if any(state.grammar is not None for state in self._samplers.values()):
            return 0
        return self._runner.depth

    def _start(self, plan: StepPlan) -> Flight:
        """Start a step; masks are computed while the model runs."""
        draws = self._draws(plan)
        states = [draw.state for draw in draws]
        if self.masks is None:
            return self._runner.start(plan, draws)
        self.masks.begin(states)
        masks = self.masks
        return self._runner.start(plan, draws, lambda: masks.finish(states))

    def _draws(self, plan: StepPlan) -> list[Draw]:
        """What the sampler needs to know of the chunks that sample."""
        draws = []
        for chunk in plan.chunks:
            if not chunk.samples:
                continue
            state, sequence = self._samplers[chunk.request_id], self.scheduler.sequence(chunk.request_id)
            new = self._owners.get(chunk.slot) is not state
            self._owners[chunk.slot] = state
            fresh = sequence.tokens if new else None
            draws.append(Draw(state, chunk.slot, sequence.ahead - 1, sequence.prompt, fresh))
        return draws

    def _land(self, depth: int) -> list[TokenEvent]:
        """Wait for the oldest steps until `depth` are under way, and take in what they produced."""
        events: list[TokenEvent] = []
        while len(self._flights) > depth:
            flight = self._flights.popleft()
            drawn, seconds = flight.finish()
            self._learn(flight.plan, seconds)
            self._keep(flight)
            if self._canary is not None and flight.logits is not None:
                self._show(self._canary, flight.plan, flight.logits)
            names = [draw.state.request_id for draw in flight.draws]
            tokens = tuple(one for one in drawn if isinstance(one, SampledToken))
            failed = {name: one for name, one in zip(names, drawn, strict=True) if not isinstance(one, SampledToken)}
            result = StepResult(flight.plan.step, tokens, failed)
            live = self.scheduler.apply(flight.plan, result)
            events += self._collect(live, self._still(failed))
        return events

    def _keep(self, flight: Flight) -> None:
        """Note the log-probabilities of prompts that a step worked out; what ran before a preemption comes again."""
        lines = flight.scores.by_request() if flight.scores is not None else {}
        for chunk in flight.plan.chunks:
            state = self._samplers.get(chunk.request_id) if chunk.request_id in lines else None
            if state is not None and state.prompt is not None:
                own = lines[chunk.request_id]
                state.prompt.lines[chunk.start : chunk.start + len(own)] = own

    def _still(self, failed: Mapping[str, str]) -> dict[str, str]:
        """Those of the failed requests that have not ended meanwhile."""
        return {name: one for name, one in failed.items() if name in self._samplers and self.scheduler.failed(name)}

    def _learn(self, plan: StepPlan, seconds: float) -> None:
        """How fast prefill is, from steps that are one chunk long enough to say."""
        [chunk, *others] = plan.chunks
        if not others and chunk.rows >= _TELLING_ROWS and not chunk.replay_to and chunk.targets is None:
            self.cache.rates.observe_prefill(chunk.start, chunk.end, seconds)

    def _show(self, canary: Canary, plan: StepPlan, logits: Tensor) -> None:
        """Let the canary see what resumed requests sample from, and judge its own check."""
        for chunk, row in zip((chunk for chunk in plan.chunks if chunk.samples), logits, strict=True):
            if chunk.request_id == canary.running:
                wrong = canary.judge(row)
                if wrong is not None:
                    self.cache.distrust(wrong.tokens[: wrong.resumed], wrong.salt)
                continue
            sequence = self.scheduler.sequence(chunk.request_id)
            if sequence.plan is not None and sequence.plan.write_from:
                resumed = sequence.plan.write_from
                canary.saw(chunk.request_id, sequence.request.salt, sequence.tokens[: chunk.end], resumed, row)

    def _collect(self, tokens: tuple[SampledToken, ...], failed: Mapping[str, str]) -> list[TokenEvent]:
        """Stop rules: end of sequence, stop tokens, max_tokens, a full context; a failed row ends its request."""
        events = []
        for request_id, sentence in failed.items():
            usage = self.finish(request_id, FinishReason.ERROR)
            if not request_id.startswith(PREFIX):
                events.append(TokenEvent(request_id, reason=FinishReason.ERROR, usage=usage, error=sentence))
        for token in tokens:
            state = self._samplers[token.request_id]
            state.accept(token.token_id)
            reason, hidden = self._stop_rule(state, token)
            usage = self.finish(token.request_id, reason) if reason is not None else None
            if token.request_id.startswith(PREFIX):
                continue
            prompt, state.prompt = state.prompt, None
            events.append(
                TokenEvent(token.request_id, token.token_id, token.logprob, hidden, reason, usage, prompt=prompt)
            )
        return events

    def _stop_rule(self, state: SamplerState, token: SampledToken) -> tuple[FinishReason | None, bool]:
        params = state.params
        if token.token_id in params.stop_token_ids:
            return FinishReason.STOP, True
        if token.token_id in self._shape.eos_ids and not params.ignore_eos:
            return FinishReason.STOP, True
        if state.generated >= self.scheduler.max_new_tokens(token.request_id):
            return FinishReason.LENGTH, False
        return None, False
