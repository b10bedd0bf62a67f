"""A real engine whose words are given: the model runs, the caches work, and only the choice of tokens is a script.

The bundled checkpoint is too small to use tools; what a large one would write is played instead, token by token.
"""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import uvicorn
from torch import Tensor

from triptych.engine import loop
from triptych.engine.api import AsyncEngine
from triptych.engine.sampler import SamplerState
from triptych.server.app import build_app
from triptych.server.options import ServerOptions
from triptych.text.tokenizer import Tokenizer
from triptych.text.tools import DSML
from triptych.words import SampledToken


def spelled(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of what a model writes, control tokens and the end included."""
    assert tokenizer.eos_id is not None
    ids: list[int] = []
    for i, part in enumerate(re.split(f"({DSML}|<think>|</think>)", text)):
        ids += [tokenizer.control_id(part)] if i % 2 else tokenizer.encode(part).tolist()
    return [*ids, tokenizer.eos_id]


class Puppet:
    """Plays `script`, one answer a request, in the order in which requests come to be sampled."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.script: list[list[int]] = []
        self._roles: dict[str, list[int]] = {}
        patch.setattr(loop, "sample", self._sample)

    def _sample(self, logits: Tensor, states: Sequence[SamplerState]) -> list[SampledToken | str]:
        out: list[SampledToken | str] = []
        for state in states:
            if state.request_id not in self._roles:
                self._roles[state.request_id] = self.script.pop(0)
            out.append(SampledToken(state.request_id, self._roles[state.request_id][state.generated]))
        return out


class Served:
    """An engine behind a real uvicorn in a thread of its own."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        app = build_app(engine, ServerOptions(served_model_name="tiny"))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        settings: dict[str, Any] = {"log_config": None, "access_log": False, "lifespan": "on", "ws": "none"}
        self._server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=1, **settings))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve([self._listener])))
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        """End the server, and with it the engine; copies to the disk are finished."""
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()
