"""Grammar masks of a step, computed in threads of their own while the device runs the model."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from triptych.engine.sampler import SamplerState
from triptych.text.grammar import GrammarCache, MaskBits

_THREADS = 4  # a mask takes tens of microseconds, rarely milliseconds; the computation holds no lock of Python's


class Masks:
    """Computes the masks of a step's constrained samples.

    masks.begin(states)  ->  model runs  ->  masks.finish(states): each state's `mask` is set, or its `broken`
    """

    def __init__(self, grammars: GrammarCache) -> None:
        self.grammars = grammars
        self._pool: ThreadPoolExecutor | None = None
        self._running: dict[str, Future[MaskBits | None]] = {}

    def begin(self, states: Sequence[SamplerState]) -> None:
        """Start on the states that have a grammar. Cheap where none has."""
        for state in states:
            if state.grammar is not None:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="triptych-masks")
                self._running[state.request_id] = self._pool.submit(state.grammar.mask)

    def finish(self, states: Sequence[SamplerState]) -> None:
        """Wait for what `begin` started and hand it out."""
        if not self._running:
            return
        running, self._running = self._running, {}
        for state in states:
            future = running.get(state.request_id)
            if future is not None:
                try:
                    state.mask = future.result()
                except RuntimeError as error:
                    state.broken = str(error)

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None
