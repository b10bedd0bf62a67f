"""What all requests of one server share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from triptych.errors import ModelNotFound, RequestError, nearest
from triptych.server.ask import Desk
from triptych.server.fields import wrong
from triptych.server.http import Bodies
from triptych.server.keys import Keys
from triptych.server.metrics import Metrics
from triptych.server.options import ServerOptions
from triptych.server.protocol import ServingEngine
from triptych.server.record import Record
from triptych.server.store import ResponseStore
from triptych.text.history import History

T = TypeVar("T")


class ServerState:
    """The engine, the options, the metrics, the threads that tokenise, and who is being served."""

    def __init__(self, engine: ServingEngine, options: ServerOptions, keys: Keys) -> None:
        self.engine = engine
        self.options = options
        self.keys = keys
        self.bodies = Bodies(options)
        self.responses = ResponseStore(options.store_memory)
        self.history = History(file=_history_file(engine), name=_tokenizer_name(engine))
        self.metrics = Metrics(engine)
        self.draining = self._hurried = False
        self.born = int(time.time())
        self._in_flight = 0
        self._threads = ThreadPoolExecutor(options.encode_threads, thread_name_prefix="triptych-encode")

    def desk(self, model: str, salt: str) -> Desk:
        """Where a request of this tenant is read."""
        return Desk(self.engine, model, salt, self.responses, self.history, self.options.reasoning_effort)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the model, the main one first."""
        return (self.options.served_model_name or self.engine.model_name, *self.options.aliases)

    @property
    def most_in_flight(self) -> int:
        """Requests beyond those that the engine could run or queue only hold memory while they are told so."""
        return self.engine.config.max_waiting + self.engine.config.max_running

    @property
    def in_flight(self) -> int:
        """Generation requests being answered now."""
        return self._in_flight

    def model_name(self, raw: object) -> str:
        """The name a request asks for, if it is served. ModelNotFound naming the nearest otherwise."""
        if raw is None:
            raise RequestError("model is missing.", f"Send {self.names[0]!r}.", param="model")
        if not isinstance(raw, str):
            raise wrong("model", "a string", raw)
        if raw not in self.names:
            raise ModelNotFound(f"There is no model {raw[:80]!r} here.", nearest(raw[:80], self.names), param="model")
        return raw

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run `work` beside the event loop. At most `encode_threads` at once; others queue."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    @contextmanager
    def counting(self, record: Record) -> Iterator[None]:
        """Count a request while it is answered, and close its record at the end."""
        counts = record.method == "POST"
        self._in_flight += counts
        self.metrics.in_flight.set(self._in_flight)
        try:
            yield
        finally:
            self._in_flight -= counts
            self.metrics.in_flight.set(self._in_flight)
            record.finish()

    async def drain(self, timeout: float) -> bool:
        """Refuse new requests and wait until none runs, `timeout` seconds at most. True if none is left."""
        self.draining = True
        deadline = time.monotonic() + timeout
        while self._in_flight and time.monotonic() < deadline and not self._hurried:
            await asyncio.sleep(0.02)
        return not self._in_flight

    def hurry(self) -> None:
        """Wait for no request any more."""
        self._hurried = True

    def close(self) -> None:
        """Let the threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _history_file(engine: ServingEngine) -> Path | None:
    """Beside the disk tier, whose pages the turns' tokens are; another tokenizer must not read them."""
    disk = engine.config.cache.disk
    if disk is None:
        return None
    return Path(disk).expanduser() / f"turns-{engine.model_name.replace('/', '_')}-{engine.shape.vocab_size}.jsonl"


def _tokenizer_name(engine: ServingEngine) -> str:
    """What turns of other token ids must not be mixed with."""
    return f"{engine.shape.vocab_size} {engine.tokenizer.fingerprint}"
