"""The engine behind a server: steps run in a thread of their own, deltas arrive on the event loop.

    event loop                                engine thread
    stream() -- commands (add, finish) ---->  run commands, step, run commands, step, ...
    queues  <-- events, once per step ------  (sleeps while nothing runs)

Tokenising and detokenising never run in the engine thread.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from triptych.checkpoint import safetensors_stream
from triptych.engine.face import Face
from triptych.engine.facts import Watch, panels
from triptych.engine.load import LoadedEngine
from triptych.engine.loop import TokenEvent
from triptych.engine.outputs import OutputText
from triptych.engine.renewal import Source, Staged, check_running, stage, swap
from triptych.engine.samples import Sample, deltas, expand
from triptych.errors import ConfigError, TriptychError, Unavailable
from triptych.words import (
    NO_HINTS,
    CacheHints,
    Delta,
    EngineStats,
    Facts,
    FinishReason,
    Running,
    SamplingParams,
    TokenIds,
    WeightsUpdate,
    token_ids,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

_FLUSH_SECONDS = 10.0  # for copies that are still under way to disk when the engine stops


class _Mailbox:
    """Deltas on their way to one reader, on one event loop. A queue would do, at several times the cost a token."""

    def __init__(self) -> None:
        self._deltas: deque[Delta] = deque()
        self._reader: asyncio.Future[None] | None = None

    def put(self, delta: Delta) -> None:
        self._deltas.append(delta)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def get(self) -> Delta:
        while not self._deltas:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return self._deltas.popleft()


@dataclass(slots=True, eq=False)
class _Update:
    """New weights that wait for their turn. `held`: requests that came meanwhile and begin after it."""

    staged: Staged
    running: Running
    done: asyncio.Future[WeightsUpdate]
    held: list[Callable[[], None]] = field(default_factory=list)


@dataclass(slots=True)
class _Route:
    """Where a live sample's deltas go."""

    output: OutputText
    deltas: _Mailbox
    born: float = field(default_factory=time.monotonic)


class AsyncEngine(Face):
    """Serves many requests at once from one event loop. Call `start` on it, `stop` or `drain` at the end."""

    def __init__(self, loaded: LoadedEngine) -> None:
        super().__init__(loaded)
        if loaded.tokenizer is None:
            raise ConfigError(
                f"Checkpoint {loaded.name} has no tokenizer.json, which a server needs.",
                "Put the model's tokenizer.json into the checkpoint directory.",
            )
        self.tokenizer = loaded.tokenizer
        self._routes: dict[str, _Route] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._events: asyncio.AbstractEventLoop | None = None
        self._accepting = False
        self._stopping = False
        self._stats = loaded.loop.stats()
        self.panels = panels(loaded.loop.cache, loaded.config.cache)
        self._watch = Watch(loaded.loop, self._born)
        self._facts: asyncio.Future[Facts] | None = None
        self._update: _Update | None = None  # belongs to the engine thread
        self._updating = threading.Lock()

    async def start(self) -> None:
        """Start the engine thread; deltas will arrive on the running event loop."""
        self._events = asyncio.get_running_loop()
        self._accepting, self._stopping = True, False
        self._facts = None  # what an earlier event loop waited for nobody will tell
        self._thread = threading.Thread(target=self._run, name="triptych-engine", daemon=True)
        self._thread.start()

    async def drain(self, timeout: float) -> bool:
        """Refuse new requests, wait for running ones up to `timeout` seconds, stop. True if all finished."""
        self._accepting = False
        deadline = time.monotonic() + timeout
        while self._routes and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        finished = not self._routes
        await self.stop()
        return finished

    async def stop(self) -> None:
        """Stop now: what still runs ends with finish reason abort."""
        self._accepting = False
        thread, self._thread = self._thread, None
        if thread is None:
            return
        with self._wake:
            self._stopping = True
            self._wake.notify()
        await asyncio.to_thread(thread.join)
        while self._commands:  # requests that came too late to be stepped still have to be told
            self._commands.popleft()()
        self._withdraw(self._update, Unavailable("The engine was stopped."))
        self._deliver(self._loop.end_all(FinishReason.ABORT, "The request was ended because the server stops."))
        if not await asyncio.to_thread(self._loop.settle, _FLUSH_SECONDS):
            logger.warning("copies to lower tiers were not finished in %.0f s and are lost", _FLUSH_SECONDS)
        self._loop.close()

    def stats(self) -> EngineStats:
        """Figures as of the last step."""
        return self._stats

    async def pause(self) -> None:
        """No step begins until `resume`; returns when none is under way. Requests keep their state, new ones wait."""

        def pause() -> None:
            self._loop.pause()
            self._on_events(self._deliver, self._loop.halt())

        await self._in_engine(pause)

    async def resume(self) -> None:
        """Go on after `pause`."""
        await self._in_engine(self._loop.resume)

    async def update_weights(
        self, source: Source, *, running: Running = "drain", timeout: float | None = None
    ) -> WeightsUpdate:
        """Replace the weights; see `Engine.update_weights`. Requests go on while the new ones are read and checked.

        `running` says what becomes of requests that are there: they end on the old weights while those that come wait
        ("drain"), end at once ("abort"), or keep their tokens and start again on the new weights ("recompute"). A
        paused engine stays paused. Unavailable after `timeout` seconds of waiting for the end of requests, or where
        another update is under way; then, and if the caller is cancelled before its turn came, nothing has changed.
        """
        check_running(running)
        if not self._updating.acquire(blocking=False):
            raise Unavailable("Another update of the weights is under way.", "Retry when it has ended.")
        try:
            staged = await asyncio.to_thread(stage, self._loaded, source)
            return await self._swap(staged, running, timeout)
        finally:
            self._updating.release()

    async def upload_weights(
        self, pieces: Iterable[bytes], *, running: Running = "drain", timeout: float | None = None
    ) -> WeightsUpdate:
        """As `update_weights`, from the bytes of a safetensors file that holds all tensors, as they arrive."""
        return await self.update_weights(safetensors_stream(pieces), running=running, timeout=timeout)

    async def _swap(self, staged: Staged, running: Running, timeout: float | None) -> WeightsUpdate:
        """Hand the new weights to the engine thread and wait until they are in place."""
        update = _Update(staged, running, asyncio.get_running_loop().create_future())
        await self._in_engine(lambda: self._begin_update(update))
        try:
            return await asyncio.wait_for(asyncio.shield(update.done), timeout)
        except TimeoutError:
            late = Unavailable(
                f"Requests were still running after {timeout:g} s, and the old weights stay.",
                "Wait longer, or let running requests be aborted or recomputed.",
            )
            await self._in_engine(lambda: self._withdraw(update, late))
            return await update.done
        except asyncio.CancelledError:
            self._command(lambda: self._withdraw(update, None))
            raise

    async def facts(self) -> Facts:
        """Who runs and what could be resumed, gathered between two steps; those who ask at the same time share it."""
        if self._events is None or self._thread is None:
            return Facts()
        if self._facts is None:
            told = self._facts = self._events.create_future()
            self._command(lambda: self._on_events(self._tell, told, self._watch.gather()))
        return await asyncio.shield(self._facts)

    async def stream(
        self,
        prompt_ids: Sequence[int] | TokenIds,
        params: SamplingParams,
        *,
        request_id: str,
        salt: str = "",
        hints: CacheHints = NO_HINTS,
    ) -> AsyncGenerator[Delta, None]:
        """Deltas of all n samples until each has finished. Closing the iterator aborts what is left.

        `hints`: what the caller knows about reuse, as semantic boundaries, a time to live, a pin.
        Raises RequestError or Unavailable before the first delta.
        """
        if not self._accepting:
            raise Unavailable("The server is shutting down.", "Retry elsewhere or later.")
        ids = token_ids(prompt_ids, vocab_size=self.shape.vocab_size)
        samples = expand(request_id, ids, params, self.tokenizer, salt, hints)
        if params.grammar is not None and self.grammars is not None:
            await asyncio.to_thread(self.grammars.check, params.grammar)  # so that no step has to wait for it
        mailbox = _Mailbox()
        for sample in samples:
            self._routes[sample.request.request_id] = _Route(sample.output, mailbox)
        try:
            await self._submit(samples)
            left = len(samples)
            while left:
                delta = await mailbox.get()
                left -= delta.finish_reason is not None
                yield delta
        finally:
            self._abandon(samples)

    async def _submit(self, samples: list[Sample]) -> None:
        """Add all samples in the engine thread; raises what adding raised, with none left behind."""
        assert self._events is not None
        added: asyncio.Future[None] = self._events.create_future()

        def add() -> None:
            if added.cancelled():
                return  # its caller went away while it was held
            if self._update is not None:
                self._update.held.append(add)
                return
            error: TriptychError | None = None
            try:
                for sample in samples:
                    self._loop.add(sample.request, sample.output.index)
            except TriptychError as caught:
                error = caught
                for sample in samples:
                    self._loop.finish(sample.request.request_id, FinishReason.ABORT)
            self._on_events(_settle, added, error)

        self._command(add)
        await added

    async def _in_engine(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises, between two steps. Unavailable if the engine does not run."""
        if self._events is None or self._thread is None:
            raise Unavailable("The engine is not running.", "Start it first.")
        told: asyncio.Future[T] = self._events.create_future()

        def run() -> None:
            try:
                result = work()
            except Exception as error:
                self._on_events(_settle, told, error)
            else:
                self._on_events(_settle, told, None, result)

        self._command(run)
        return await told

    def _abandon(self, samples: list[Sample]) -> None:
        """Forget the samples; the ones still running are aborted."""
        live = [s.request.request_id for s in samples if self._routes.pop(s.request.request_id, None) is not None]
        if live:
            self._command(lambda: self._abort(live))

    def _abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._loop.finish(request_id, FinishReason.ABORT)

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _on_events(self, function: Callable[..., None], *args: Any) -> None:
        """Run `function` on the event loop, unless that is already closed."""
        assert self._events is not None
        try:
            self._events.call_soon_threadsafe(function, *args)
        except RuntimeError:
            logger.debug("event loop closed; dropped %s", function)

    # -- on the event loop

    def _deliver(self, events: list[TokenEvent]) -> None:
        for event in events:
            route = self._routes.get(event.request_id)
            if route is None:
                continue  # its caller went away
            for delta in deltas(event, route.output, self._finish_later):
                if delta.finish_reason is not None:
                    del self._routes[event.request_id]
                route.deltas.put(delta)

    def _tell(self, told: asyncio.Future[Facts], facts: Facts) -> None:
        self._facts = None
        if not told.done():
            told.set_result(facts)

    def _born(self, request_id: str) -> float | None:
        route = self._routes.get(request_id)
        return None if route is None else route.born

    def _finish_later(self, request_id: str, reason: FinishReason) -> None:
        """End a request in the engine thread; its usage comes back as an event."""

        def finish() -> None:
            usage = self._loop.finish(request_id, reason)
            if usage is not None:
                self._on_events(self._deliver, [TokenEvent(request_id, reason=reason, usage=usage)])

        self._command(finish)

    # -- in the engine thread

    def _broken(self) -> list[TokenEvent]:
        return self._loop.end_all(FinishReason.ERROR, "An internal error ended this request.")

    def _begin_update(self, update: _Update) -> None:
        if update.running == "drain" and self._loop.paused and self._loop.live:
            raise Unavailable(
                "The engine is paused, so that its requests would never end.",
                "Resume it first, or let running requests be aborted or recomputed.",
            )
        self._update = update

    def _update_due(self) -> bool:
        """True if there are new weights and nothing holds them up."""
        return self._update is not None and not (self._update.running == "drain" and self._loop.live)

    def _put_update(self) -> None:
        """Put new weights in place."""
        update, loop = self._update, self._loop
        assert update is not None
        ended: list[TokenEvent] = []
        if update.running == "abort":
            ended = loop.end_all(FinishReason.ABORT, "The request was ended because the weights are replaced.")
        self._on_events(self._deliver, ended + loop.halt())
        try:
            aborted = sum(event.reason is FinishReason.ABORT for event in ended)
            result = swap(self._loaded, update.staged, aborted)
        except Exception as error:
            logger.exception("the weights could not be put in place")
            self._withdraw(update, TriptychError(f"The weights could not be put in place: {error}."))
            raise
        self._on_events(_settle, update.done, None, result)
        self._withdraw(update, None)

    def _withdraw(self, update: _Update | None, error: Exception | None) -> None:
        """An update is over: who was held begins. `error` is told, if it did not take place."""
        if update is None or self._update is not update:
            return
        self._update = None
        if error is not None:
            self._on_events(_settle, update.done, error)
        for begin in update.held:
            begin()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._commands or self._loop.busy or self._update_due() or self._stopping):
                    self._wake.wait()
                if self._stopping:
                    return
                commands, self._commands = self._commands, deque()
            try:
                for command in commands:
                    command()
                if self._update_due():
                    self._put_update()
                if self._loop.busy:
                    events = self._loop.step()
                    if events:
                        self._on_events(self._deliver, events)
            except Exception:
                logger.exception("a step failed; its requests end with an error and the cache is emptied")
                self._on_events(self._deliver, self._broken())
            stats = self._loop.stats()
            self._stats = replace(stats, state="updating") if self._update is not None else stats


def _settle(future: asyncio.Future[Any], error: Exception | None, result: object = None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
