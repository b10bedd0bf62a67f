"""Running an Ask and answering it, streamed or whole, in whatever shape an API has."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from triptych.errors import TriptychError, Unavailable
from triptych.server.ask import Ask, Shape
from triptych.server.http import StreamStyle
from triptych.server.pieces import Answer
from triptych.server.protocol import ServingEngine
from triptych.server.record import Record
from triptych.words import Delta, FinishReason, Usage


class _Bill:
    """Usage summed over the choices: a prompt counts once, whatever n."""

    def __init__(self, ask: Ask, record: Record) -> None:
        self._n = ask.params.n
        self._record = record
        record.bill(Usage(prompt_tokens=sum(len(prompt) for prompt in ask.prompts)))
        self._sum = Usage()

    def add(self, choice: int, usage: Usage) -> None:
        self._sum = self._sum.plus(usage, same_prompt=choice % self._n != 0)
        known = self._record.usage.prompt_tokens  # of prompts that have not ended yet, too
        self._record.bill(replace(self._sum, prompt_tokens=max(known, self._sum.prompt_tokens)))

    @property
    def total(self) -> Usage:
        return self._sum


def _watch(choice: int, delta: Delta, record: Record, bill: _Bill) -> None:
    """Note and bill a delta. Raises TriptychError when the engine gives the sample up."""
    record.saw_delta(choice, delta)
    if delta.finish_reason is None and delta.error is None and delta.usage is None:
        return
    if delta.finish_reason is FinishReason.ABORT:
        raise Unavailable(delta.error or "The request was ended because the server stops.", "Retry later.")
    if delta.error is not None or delta.finish_reason is FinishReason.ERROR:
        raise TriptychError(delta.error or "The engine could not continue this request.")
    if delta.usage is not None:
        bill.add(choice, delta.usage)


async def events(
    engine: ServingEngine, ask: Ask, shape: Shape, record: Record, style: StreamStyle
) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events. What goes wrong is raised; the caller knows whether headers are out."""
    bill = _Bill(ask, record)
    answers = [Answer() for _ in range(ask.choices)]
    readers = [ask.reader() for _ in answers]
    opened: set[int] = set()
    async with aclosing(ask.run(engine)) as deltas:
        async for choice, delta in deltas:
            _watch(choice, delta, record, bill)
            step = readers[choice].read(delta)
            answers[choice].add(step)
            if choice not in opened:
                opened.add(choice)
                for chunk in shape.opening(choice):
                    yield style.event(chunk)
            chunks = shape.chunks(choice, step)
            if step.finish is not None:
                ask.ended(choice, answers[choice])
            for chunk in chunks:
                yield style.event(chunk)
    for chunk in shape.closing(bill.total, answers):
        yield style.event(chunk)
    if style.done:
        yield style.done


async def collect(engine: ServingEngine, ask: Ask, record: Record) -> tuple[list[Answer], Usage]:
    """All answers and their usage, once the last one has ended."""
    bill = _Bill(ask, record)
    answers = [Answer() for _ in range(ask.choices)]
    readers = [ask.reader() for _ in answers]
    async with aclosing(ask.run(engine)) as deltas:
        async for choice, delta in deltas:
            _watch(choice, delta, record, bill)
            step = readers[choice].read(delta)
            answers[choice].add(step)
            if step.finish is not None:
                ask.ended(choice, answers[choice])
    return answers, bill.total
