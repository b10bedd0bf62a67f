"""The engine's heartbeat: plan a step, run it, apply what came out, end what is over.

Single-threaded and free of any clock or queue: `Engine` drives it in the caller's thread, `AsyncEngine` in its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from triptych.cache.manager import CacheManager
from triptych.config import ModelShape
from triptych.engine.runner import Runner
from triptych.engine.sampler import SamplerState, sample
from triptych.model.transformer import Transformer
from triptych.schedule.scheduler import Scheduler
from triptych.words import (
    EngineStats,
    FinishReason,
    Request,
    SampledToken,
    StepPlan,
    StepResult,
    TokenLogprob,
    Usage,
)


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One request gained a token (`token_id` is not None), ended (`reason` is not None), or both.

    `hidden`: the token ends the sequence and is not part of its text.
    """

    request_id: str
    token_id: int | None = None
    logprob: TokenLogprob | None = None
    hidden: bool = False
    reason: FinishReason | None = None
    usage: Usage | None = None
    error: str | None = None


class EngineLoop:
    """Owns the scheduler, the cache manager, the runner and one sampler state per live request."""

    def __init__(self, shape: ModelShape, cache: CacheManager, scheduler: Scheduler, runner: Runner) -> None:
        self.cache = cache
        self.scheduler = scheduler
        self._shape = shape
        self._runner = runner
        self._samplers: dict[str, SamplerState] = {}

    @property
    def model(self) -> Transformer:
        """The model that steps run."""
        return self._runner.model

    @property
    def busy(self) -> bool:
        """True while any request waits or runs."""
        return self.scheduler.busy

    def add(self, request: Request, sample_index: int = 0) -> None:
        """Queue a request. Raises ContextTooLong if it can never fit, QueueFull if too many wait."""
        state = SamplerState(
            request.request_id,
            request.params,
            self._shape.vocab_size,
            prompt_ids=request.prompt_ids,
            sample_index=sample_index,
        )
        self.scheduler.add(request)
        self._samplers[request.request_id] = state

    def finish(self, request_id: str, reason: FinishReason) -> Usage | None:
        """End a request now, whatever it is doing; what it computed stays cached. None if it is not known."""
        if self._samplers.pop(request_id, None) is None:
            return None
        return self.scheduler.finish(request_id, reason)

    def step(self) -> list[TokenEvent]:
        """Run one step. Returns what happened, in plan order; empty if there was nothing to do."""
        plan = self.scheduler.plan()
        if plan is None:
            return []
        result = self._run(plan)
        live = self.scheduler.apply(plan, result)
        return self._collect(live, result.failed)

    def end_all(self, reason: FinishReason, sentence: str) -> list[TokenEvent]:
        """End every request. After a step that broke, with ERROR: the next plan then starts from an empty cache."""
        events = []
        for request_id in tuple(self._samplers):
            usage = self.finish(request_id, reason)
            events.append(TokenEvent(request_id, reason=reason, usage=usage, error=sentence))
        return events

    def stats(self) -> EngineStats:
        """Requests and tokens as of now."""
        s = self.scheduler.stats()
        cache = {**asdict(self.cache.stats()), "preemptions": s.preemptions, "rerun_tokens": s.rerun_tokens}
        return EngineStats(
            running=s.running,
            waiting=s.waiting,
            steps=s.steps,
            prompt_tokens=s.prompt_tokens,
            cached_tokens=s.cached_tokens,
            recomputed_tokens=s.recomputed_tokens,
            generated_tokens=s.generated_tokens,
            cache=cache,
        )

    def _run(self, plan: StepPlan) -> StepResult:
        logits = self._runner.logits(plan)
        sampled = [chunk.request_id for chunk in plan.chunks if chunk.samples]
        drawn = sample(logits, [self._samplers[request_id] for request_id in sampled])
        tokens = tuple(one for one in drawn if isinstance(one, SampledToken))
        failed = {
            request_id: one for request_id, one in zip(sampled, drawn, strict=True) if not isinstance(one, SampledToken)
        }
        return StepResult(plan.step, tokens, failed)

    def _collect(self, tokens: tuple[SampledToken, ...], failed: Mapping[str, str]) -> list[TokenEvent]:
        """Stop rules: end of sequence, stop tokens, max_tokens, a full context; a failed row ends its request."""
        events = []
        for request_id, sentence in failed.items():
            usage = self.finish(request_id, FinishReason.ERROR)
            events.append(TokenEvent(request_id, reason=FinishReason.ERROR, usage=usage, error=sentence))
        for token in tokens:
            state = self._samplers[token.request_id]
            state.accept(token.token_id)
            reason, hidden = self._stop_rule(state, token)
            usage = self.finish(token.request_id, reason) if reason is not None else None
            events.append(TokenEvent(token.request_id, token.token_id, token.logprob, hidden, reason, usage))
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
