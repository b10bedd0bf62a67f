"""Which rows run next: continuous batching under a token budget, as values.

One step: `plan` (grow what decodes, admit, share the rest among prefills) -> the engine runs it -> `apply`
-> stop rules -> `finish`. Between `plan` and `apply` nothing that the plan names is given to anyone else.

Depth. With a `depth` of 1 the next step may be planned while the last one is under way: what that one samples counts
as there (`Sequence.ahead`), and a row whose token is not known yet has the token -1, which the device fills in. Stop
rules then come a step late: the row beyond a request's end runs, writes into a slot and a page that nobody has got
yet, and is dropped by `apply`. That is safe because whoever gets them writes in a later step, and because a slot's ring
has room for one row more than its last boundary needs. Nothing is preempted while a step is under way: who
finds no room waits, `strained` tells the engine to apply first, and the plan after that preempts.

Progress. A request is refused at `add` unless the whole pool holds all tokens it may ever have. The oldest
running request is never preempted, and preempting all others makes every page that it does not hold itself
evictable; so it can always grow, and each step runs at least one of its rows. Nothing can wait for ever:
admission is first come, first served, a preempted request returns to the front, and who is held up for what another
one computes is held up by one that runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from triptych.cache.holding import NOTHING, Room
from triptych.cache.manager import CacheManager
from triptych.config import EngineConfig
from triptych.errors import ContextTooLong, QueueFull, RequestError
from triptych.schedule.sequence import Sequence
from triptych.schedule.shares import fair_shares
from triptych.schedule.stats import Counters, ScheduleStats
from triptych.words import Chunk, FinishReason, Request, SampledToken, SlotSave, StepPlan, StepResult, Usage

STEP_TOKENS = 512
"""Rows of a step where the configuration does not say."""

UNKNOWN = np.full(1, -1, np.int32)
"""The tokens of a row that continues what is still being sampled."""
UNKNOWN.flags.writeable = False


@dataclass(frozen=True, slots=True)
class _Flight:
    """A plan under way, and whose its chunks are: sequences, and how often each had been admitted."""

    plan: StepPlan
    owners: dict[str, tuple[Sequence, int]]


class Scheduler:
    """Waiting and running requests of one engine. `max_position` is the model's longest context in tokens.

    `depth`: how many steps may be under way when `plan` is called.
    """

    def __init__(self, cache: CacheManager, config: EngineConfig, max_position: int, depth: int = 0) -> None:
        self._cache = cache
        self._depth = depth
        self.strained = False
        self._config = config
        self._context = min(max_position, config.max_context or max_position)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._live: dict[str, Sequence] = {}
        self._saves: list[SlotSave] = []
        self._flights: deque[_Flight] = deque()
        self._counters = Counters()
        self.weights = 0
        """How often the weights were replaced: whoever is admitted runs on this version of them."""

    # ---- what the engine asks

    @property
    def busy(self) -> bool:
        """True while any request waits or runs."""
        return bool(self._live)

    @property
    def max_tokens(self) -> int:
        """Tokens that one request may have, prompt and output together."""
        return min(self._context, self._cache.capacity.tokens)

    def max_new_tokens(self, request_id: str) -> int:
        """Tokens that a live request may generate: its own max_tokens, the model's context, the cache."""
        sequence = self._live[request_id]
        return sequence.limit - sequence.prompt

    def failed(self, request_id: str) -> bool:
        """True if the rows of a live request could not be sampled."""
        return self._live[request_id].failed

    def usage(self, request_id: str) -> Usage:
        """What a live request has cost so far."""
        return self._live[request_id].usage()

    def sequence(self, request_id: str) -> Sequence:
        """A live request as it stands."""
        return self._live[request_id]

    def sequences(self) -> Iterator[Sequence]:
        """All live requests: those that run, then those that wait, in their order."""
        return chain(self._running, self._waiting)

    def stats(self) -> ScheduleStats:
        """Requests now and totals since start."""
        return ScheduleStats(running=len(self._running), waiting=len(self._waiting), **vars(self._counters))

    # ---- coming and going

    def add(self, request: Request) -> None:
        """Queue a request. Raises QueueFull, ContextTooLong if it could never run, RequestError if it is malformed."""
        if request.request_id in self._live:
            raise RequestError(f"A request named {request.request_id!r} is already running.", "Give it another name.")
        length = len(request.prompt_ids)
        if not length:
            raise RequestError("The prompt is empty.", "Send at least one token.", param="prompt")
        if length >= self.max_tokens:
            raise self._too_long(length)
        if len(self._waiting) >= self._config.max_waiting:
            raise QueueFull(f"{len(self._waiting)} requests are waiting already.", "Retry after a pause.")
        wanted = request.params.max_tokens
        limit = self.max_tokens if wanted is None else min(self.max_tokens, length + wanted)
        sequence = Sequence(request, limit)
        self._live[request.request_id] = sequence
        self._waiting.append(sequence)

    def _too_long(self, length: int) -> ContextTooLong:
        cache = self._cache.capacity.tokens
        if cache < self._context:
            what, remedy = f"the cache holds {cache:,}", "Shorten the prompt or raise --kv-memory."
        else:
            what, remedy = f"a request may have {self._context:,}", "Shorten the prompt or raise --max-context."
        sentence = f"The prompt has {length:,} tokens and needs room for one more, but {what} in all."
        return ContextTooLong(sentence, remedy, param="prompt")

    def finish(self, request_id: str, reason: FinishReason) -> Usage | None:
        """End a request, whatever it is doing; what it computed stays cached. None if it is not known.

        With ERROR the pages it sealed itself are dropped: they may hold what made it fail.
        """
        sequence = self._live.pop(request_id, None)
        if sequence is None:
            return None
        if sequence.running:
            self._running.remove(sequence)
            self._leave(sequence, forget=reason is FinishReason.ERROR)
        else:
            self._waiting.remove(sequence)
            self._cache.withdraw(request_id)
        sequence.ended = True
        return sequence.usage()

    def abort(self, request_id: str) -> bool:
        """End a request whose caller went away. False if it is not known."""
        return self.finish(request_id, FinishReason.ABORT) is not None

    def _leave(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Give a running request's memory back. Its last boundary is saved first, out of the slot's ring."""
        request_id = sequence.request_id
        own = (f.plan.chunks for f in self._flights if f.owners.get(request_id, (None,))[0] is sequence)
        ahead = sum(chunk.rows for chunks in own for chunk in chunks if chunk.request_id == request_id)
        # while more rows than a step's sample are being run, or after they failed, the ring may lack rows
        write = None if ahead > self._depth or forget else self._cache.boundary_snapshot(request_id)
        if write is not None:
            self._saves.append(SlotSave(self._cache.slot(request_id), write.position, write.frames))
            self._cache.publish_snapshot(request_id, write)
        self._cache.release(request_id, forget=forget)

    # ---- one step

    def plan(self) -> StepPlan | None:
        """The next step, or None if there is nothing to run now. All plans but `depth` must have been applied."""
        if len(self._flights) > self._depth:
            self.abandon()
        self.strained = False
        calm = self._grow_decodes()
        if calm:
            self._admit()
        rows = self._share_rows()
        chunks = [self._chunk(sequence, rows[sequence]) for sequence in self._running if rows.get(sequence)]
        if not chunks:
            return None
        chunks.sort(key=lambda chunk: not self._live[chunk.request_id].decoding)
        self._counters.steps += 1
        # a snapshot may have been given up again while this step was planned: its frames are others' now
        plan = StepPlan(self._counters.steps, tuple(chunks), self.take_saves())
        owners = {chunk.request_id: self._live[chunk.request_id] for chunk in chunks}
        self._flights.append(_Flight(plan, {name: (owner, owner.admissions) for name, owner in owners.items()}))
        for chunk in chunks:
            owners[chunk.request_id].launch(chunk.end, chunk.samples)
        return plan

    def take_saves(self) -> tuple[SlotSave, ...]:
        """What to copy out of slots although no rows run: when `plan` gave None."""
        saves = tuple(save for save in self._saves if self._cache.is_published(save))
        self._saves = []
        return saves

    def abandon(self) -> None:
        """Plans never came back: their requests must have been ended, and nothing cached is trusted."""
        if not self._flights:
            return
        for flight in self._flights:
            left = [sequence.request_id for sequence in self._running if sequence.request_id in flight.owners]
            if left:
                raise RuntimeError(f"Step {flight.plan.step} is still running request {left[0]!r}: apply it first.")
        self._flights.clear()
        self._cache.reset()

    def _grow_decodes(self) -> bool:
        """Memory for one more token of each decoding request, oldest first. False if any had to be preempted."""
        before = self._counters.preemptions
        for sequence in tuple(self._running):
            if sequence.running and sequence.decoding and not sequence.idle:
                sequence.starved = not self._grow(sequence, sequence.expected)
        return before == self._counters.preemptions

    def _grow(self, sequence: Sequence, upto: int) -> bool:
        """Pages for [0, upto), preempting the newest requests; False if that was this one itself, or it has to wait.

        The only running request waits for copies between tiers, which hold what it needs.
        """
        while not self._cache.grow(sequence.request_id, upto):
            newest = self._running[-1]
            if self._flights:
                self.strained = True
                return False
            if len(self._running) == 1 and self._cache.copying:
                return False
            self._preempt(newest)
            if newest is sequence:
                return False
        return True

    def suspend_all(self) -> int:
        """All running requests give their memory back and return to the front of the queue, in their order.

        For weights that change: call it with no step under way, after `CacheManager.renew`, so that nothing of what
        they computed is kept. They keep their tokens, and run all of them again. Returns how many there were.
        """
        assert not self._flights, "a step is under way"
        running, self._running = self._running, []
        for sequence in reversed(running):
            self._leave(sequence)
            sequence.suspend()
            self._waiting.appendleft(sequence)
        self._saves = []  # of requests that had ended: nobody will resume there
        self._counters.preemptions += len(running)
        return len(running)

    def _preempt(self, sequence: Sequence) -> None:
        """Give up a running request's memory; it returns to the front of the queue with all its tokens."""
        assert len(self._running) > 1, "the only running request always fits, see `add`"
        self._running.remove(sequence)
        self._leave(sequence)
        sequence.suspend()
        self._waiting.appendleft(sequence)
        self._counters.preemptions += 1

    def _admit(self) -> None:
        """Admit waiting requests in order until one does not fit.

        Requests for whom a running one computes what they share stand aside, and so do those whose pages are being
        fetched. The former go on soon: who passes them leaves them the slots and pages that they will need.
        """
        aside: list[Sequence] = []
        keep = NOTHING
        while self._waiting and (not keep.slots or keep.slots < len(self._cache.free_slots)):
            sequence, request = self._waiting[0], self._waiting[0].request
            whole = sequence.scoring  # then nothing that others compute, or lower tiers have, saves a row
            hold = None if whole else self._cache.held(request.request_id, sequence.tokens, request.salt)
            if hold is not None:
                keep = Room(keep.slots + 1, keep.frames + hold.frames)
            if hold is not None or not (whole or self._cache.ready(request.request_id, sequence.tokens, request.salt)):
                aside.append(self._waiting.popleft())
                continue
            limit, hints = sequence.limit, request.hints
            plan = self._cache.admit(request.request_id, sequence.tokens, request.salt, limit, hints, keep, whole)
            if plan is None:
                break
            self._waiting.popleft()
            self._running.append(sequence)
            sequence.weights = self.weights
            self._count_admission(sequence, sequence.admit(plan))
        self._waiting.extendleft(reversed(aside))

    def _count_admission(self, sequence: Sequence, rerun: int) -> None:
        self._counters.rerun_tokens += rerun
        if sequence.admissions == 1:
            usage = sequence.usage()
            self._counters.prompt_tokens += usage.prompt_tokens
            self._counters.cached_tokens += usage.cached_tokens
            self._counters.recomputed_tokens += usage.recomputed_tokens

    def _share_rows(self) -> dict[Sequence, int]:
        """Rows of each running request in this step: one per decode, fair shares of the rest for prefills."""
        rows = {s: s.pending for s in self._running if s.decoding and not s.idle and not s.starved}
        prefills = [s for s in self._running if not s.decoding and not s.idle]
        budget = (self._config.step_tokens or STEP_TOKENS) - sum(rows.values())
        for sequence, share in zip(prefills, fair_shares(budget, [s.pending for s in prefills]), strict=True):
            if share and sequence.running and self._grow(sequence, sequence.processed + share):
                rows[sequence] = share
        return rows

    def _chunk(self, sequence: Sequence, rows: int) -> Chunk:
        plan, start = sequence.plan, sequence.processed
        assert plan is not None
        end = start + rows
        return Chunk(
            request_id=sequence.request_id,
            slot=self._cache.slot(sequence.request_id),
            start=start,
            end=end,
            tokens=sequence.tokens[start:end] if start < sequence.length else UNKNOWN,
            pages=self._cache.page_table(sequence.request_id),
            write_from=max(start, plan.write_from),
            read_from=plan.read_from,
            restore=sequence.restore,
            snapshots=() if sequence.decoding else self._cache.snapshot_writes(sequence.request_id, start, end),
            samples=end == sequence.expected,
            replay_to=plan.replay_to,
            targets=sequence.targets(start, end),
            likeliest=sequence.request.params.prompt_logprobs or 0,
        )

    def apply(self, plan: StepPlan, result: StepResult) -> tuple[SampledToken, ...]:
        """Take in what the oldest step under way produced; returns the tokens of live requests, in plan order.

        A request in `result.failed` is left as it was before the step, for the caller to finish with ERROR.
        """
        if not self._flights or plan is not self._flights[0].plan or result.step != plan.step:
            raise RuntimeError(f"Step {result.step} is not the one in flight.")
        owners = self._flights.popleft().owners
        sampled = {token.request_id: token for token in result.tokens}
        out = []
        for chunk in plan.chunks:
            sequence, admission = owners[chunk.request_id]
            current = self._live.get(chunk.request_id) is sequence and sequence.admissions == admission
            if not current or not sequence.running or sequence.failed:
                continue
            if chunk.request_id in result.failed:
                sequence.failed = True
                continue
            self._counters.prefill_rows += 0 if sequence.prefilled else chunk.rows
            sequence.advance(chunk.end)
            self._cache.advance(chunk.request_id, sequence.tokens, chunk.end)
            if chunk.samples:
                token = sampled[chunk.request_id]
                sequence.append(token.token_id)
                self._counters.generated_tokens += 1
                out.append(token)
        return tuple(out)
