"""Weights that change under random histories: submit, step, pause, resume, abort, and updates of every kind.

Each token that ever comes out, with its logits to the last bit, is the one that its version of the weights gives
after the text before it, alone and with nothing cached; no version ever sees what another has computed.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from small_engine import SHAPE, Answer, SmallEngine, alone, random_weights, text

from triptych.cache.store import SegmentStore
from triptych.errors import ContextTooLong
from triptych.model.weights import WeightStore
from triptych.words import FinishReason

VERSIONS = 3  # contents that are put in by turns
LENGTHS = st.sampled_from([1, 5, 60, 127, 128, 129, 255, 257, 384, 520])
CROWD = 5


def contents() -> list[WeightStore]:
    """Some sets of weights of one shape."""
    return [random_weights(seed) for seed in range(VERSIONS)]


class RenewalMachine(RuleBasedStateMachine):
    """One engine with little memory, all tiers, and weights that come and go and come again."""

    CONTENTS: ClassVar[list[WeightStore]] = []

    @initialize(
        pages=st.sampled_from([5, 8, 16]),
        slots=st.integers(1, 4),
        step_tokens=st.sampled_from([16, 100, 512]),
        host_pages=st.sampled_from([0, 60]),
        disk=st.booleans(),
        overlap=st.booleans(),
    )
    def start(self, pages: int, slots: int, step_tokens: int, host_pages: int, disk: bool, overlap: bool) -> None:
        if not self.CONTENTS:
            self.CONTENTS.extend(contents())
        self.directory = Path(tempfile.mkdtemp()) if disk else None
        stores = [SegmentStore(self.directory, b"small", 4 << 20)] if self.directory else []
        self.store = random_weights(0)
        self.engine = SmallEngine(
            pages=pages,
            slots=slots,
            step_tokens=step_tokens,
            host_pages=host_pages,
            stores=stores,
            overlap=overlap,
            weights=self.store.weights,
            # the runner of a GPU takes other kernels for decode rows: then tokens are compared, and no bits
            deterministic=not overlap,
        )
        self.overlap = overlap
        self.now = 0  # which contents are in place
        self.by_version = {0: 0}  # version -> contents
        self.engine.cache.renew(b"contents 0")

    @precondition(lambda self: len(self.engine.live) < CROWD)
    @rule(
        document=st.integers(0, 1),
        length=LENGTHS,
        extra=st.integers(0, 6),
        count=st.sampled_from([1, 9, 40, 40, 90]),
        copies=st.sampled_from([1, 1, 3]),
    )
    def submit(self, document: int, length: int, extra: int, count: int, copies: int) -> None:
        prompt = (*text(document, length), *text(100 + extra, extra))
        try:
            for _ in range(copies):
                self.engine.add(prompt, count)
        except ContextTooLong:
            return

    @precondition(lambda self: self.engine.live)
    @rule(count=st.sampled_from([1, 2, 5, 20]))
    def step(self, count: int) -> None:
        paused = self.engine.loop.paused
        before = self.engine.loop.scheduler.stats().steps
        for _ in range(count):
            for answer in self.engine.step():
                self.check(answer)
        assert not paused or self.engine.loop.scheduler.stats().steps == before, "a step began in a pause"

    @rule(really=st.integers(0, 2))
    def pause(self, really: int) -> None:
        if really:
            return
        self.engine.loop.pause()
        for answer in self.engine.take(self.engine.loop.halt()):
            self.check(answer)
        assert not self.engine.loop.busy or self.engine.cache.copying

    @rule()
    def resume(self) -> None:
        self.engine.loop.resume()

    @precondition(lambda self: self.engine.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort(data.draw(st.sampled_from(sorted(self.engine.live))))

    @precondition(lambda self: not self.engine.loop.paused)
    @rule(which=st.integers(0, VERSIONS - 1), really=st.integers(0, 1))
    def update_when_drained(self, which: int, really: int) -> None:
        if really:
            return
        for answer in self.engine.drain():
            self.check(answer)
        assert self.put(which) == 0
        event("drained")

    @rule(which=st.integers(0, VERSIONS - 1), really=st.integers(0, 3))
    def update_and_abort(self, which: int, really: int) -> None:
        if really:
            return
        for request_id in sorted(self.engine.live):
            self.engine.abort(request_id)
        assert self.put(which) == 0

    @rule(which=st.integers(0, VERSIONS - 1))
    def update_and_recompute(self, which: int) -> None:
        if self.put(which):
            event("recomputed")

    @rule(which=st.integers(0, VERSIONS - 1), really=st.integers(0, 3))
    def update_that_breaks(self, which: int, really: int) -> None:
        """The copy fails half-way: nothing may run until another one succeeds."""
        if really:
            return
        for answer in self.engine.take(self.engine.loop.halt()):
            self.check(answer)
        was_paused = self.engine.loop.paused

        def breaks() -> bytes:
            self.store.weights.head.fill_(float("nan"))
            raise OSError("the device is gone")

        with suppress(OSError):
            self.engine.loop.replace_weights(breaks)
        assert self.engine.loop.paused
        self.put(which)
        assert self.engine.loop.paused == was_paused

    def put(self, which: int) -> int:
        """Other weights, by the way of an update; how many requests have to start again."""
        for answer in self.engine.take(self.engine.loop.halt()):
            self.check(answer)

        def put() -> bytes:
            self.store.overwrite(self.CONTENTS[which])
            self.engine.loop.model.refresh()
            return b"contents %d" % which

        suspended = self.engine.loop.replace_weights(put)
        self.now = which
        self.by_version[self.engine.loop.scheduler.weights] = which
        self.engine.cache.check_integrity()
        return suspended

    def check(self, answer: Answer) -> None:
        """Each token by the weights that made it."""
        assert answer.reason is FinishReason.LENGTH and answer.usage is not None
        at = 0
        for version, count in sorted(answer.usage.completion_by_weights.items()):
            weights = self.CONTENTS[self.by_version[version]].weights
            want = alone((*answer.prompt, *answer.tokens[: at + count - 1]), weights)[len(answer.prompt) - 1 + at :]
            assert answer.tokens[at : at + count] == want.argmax(dim=1).tolist(), f"version {version}"
            if not self.overlap:
                assert torch.equal(torch.stack(answer.logits[at : at + count]), want)
            at += count
        assert at == len(answer.tokens)
        event(f"{len(answer.usage.completion_by_weights)} versions")

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "engine"):
            self.engine.cache.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.loop.resume()
        for answer in self.engine.drain():
            self.check(answer)
        stats = self.engine.cache.stats()
        assert not self.engine.live and (stats.slots_free, stats.pages_held) == (stats.slots, 0)
        assert self.engine.loop.settle(30.0), "some copy never ended"
        self.engine.cache.reset()
        assert self.engine.cache.stats().frames_free == stats.frames
        self.engine.loop.close()
        if self.directory is not None:
            shutil.rmtree(self.directory)


_SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much]


class TestRenewal(RenewalMachine.TestCase):
    settings = settings(max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=_SLOW)


@pytest.mark.slow
@pytest.mark.timeout(0)
class TestRenewalAtLength(RenewalMachine.TestCase):
    settings = settings(max_examples=800, stateful_step_count=50, deadline=None, suppress_health_check=_SLOW)


def test_a_group_that_starts_again_runs_its_prompt_once() -> None:
    """The forks wait for the first one again, and find its pages."""
    engine = SmallEngine(slots=4, deterministic=True, weights=random_weights(0).weights)
    engine.cache.renew(b"first")
    prompt = text(3, 300)
    for _ in range(4):
        engine.add(prompt, 30)
    for _ in range(12):
        engine.step()
    assert engine.loop.stats().running == 4
    before = engine.loop.stats().prefill_rows
    assert engine.loop.replace_weights(lambda: b"second") == 4
    answers = engine.drain()
    assert len(answers) == 4 and all(len(answer.tokens) == 30 for answer in answers)
    again = engine.loop.stats().prefill_rows - before
    whole = len(prompt) + 12
    assert again == whole + 3 * (whole - 1 - 252), f"{again} rows ran for a prompt of {len(prompt)} tokens"


def test_the_contents_differ() -> None:
    """Or the machine would see nothing."""
    first, *others = (alone(text(0, 40), one.weights) for one in contents())
    assert all(not torch.equal(first, other) for other in others)
    assert SHAPE.num_layers == 4
