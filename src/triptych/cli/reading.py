"""How far an engine has read a prompt, shown to people who wait for its first word."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triptych.engine.api import Engine


@contextmanager
def reading(engine: Engine, what: str, tokens: int) -> Iterator[None]:
    """While this is open: how many of `tokens` have run, on a terminal's standard error, and nothing in a pipe."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    from rich.live import Live
    from rich.spinner import Spinner

    spinner, begin = Spinner("dots"), time.perf_counter()
    with engine.timed_steps() as steps:

        def now() -> Spinner:
            done = sum(step.plan.rows for step in tuple(steps))
            spinner.update(text=progress_line(what, done, tokens, time.perf_counter() - begin))
            return spinner

        with Live(get_renderable=now, console=console, transient=True, refresh_per_second=5):
            yield


def progress_line(what: str, done: int, tokens: int, seconds: float) -> str:
    """What the line says. What is left takes as long per token, or longer: attention grows with the context."""
    line = f"{what}: {min(done, tokens):,} of {tokens:,} tokens, {seconds:.0f} s"
    if 0 < done < tokens and seconds >= 5.0:
        line += f", {seconds / done * (tokens - done):.0f} s or more to go"
    return line
