"""Invariants 1 to 4 under random histories: requests that share prefixes, chunk budgets, aborts, tiny pools.

After every operation each page, slot and snapshot is accounted for. Each answer equals what the same prompt gives alone
with nothing cached, in tokens and in every bit of its logits.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, precondition, rule
from small_engine import Answer, SmallEngine, accounted, agree, text

from triptych.cache.store import SegmentStore
from triptych.errors import ContextTooLong
from triptych.words import FinishReason

Prompt = tuple[int, ...]
How = tuple[int, str, int]
"""Tokens to generate, the tenant's salt, how many copies to generate (n)."""

HOW = st.tuples(
    st.sampled_from([1, 2, 3, 5, 9, 40, 40, 140]),
    st.sampled_from(["", "", "", "tenant"]),
    st.sampled_from([1, 1, 1, 3]),
)
LENGTHS = st.sampled_from([1, 3, 4, 5, 60, 127, 128, 129, 132, 200, 255, 256, 257, 383, 384, 511, 512, 520, 640, 700])
CROWD = 6
_SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much]


class EngineMachine(RuleBasedStateMachine):
    """One engine with pools so small that most histories evict, preempt or make requests wait."""

    conversations: Bundle[Prompt] = Bundle("conversations")

    @initialize(
        pages=st.sampled_from([4, 5, 6, 8, 16]),
        slots=st.integers(1, 4),
        policy=st.sampled_from(["adaptive", "full", "none", "periodic:256"]),
        step_tokens=st.sampled_from([16, 100, 128, 130, 512, 1000]),
        host_pages=st.sampled_from([0, 5, 60]),
        disk=st.booleans(),
    )
    def start(self, pages: int, slots: int, policy: str, step_tokens: int, host_pages: int, disk: bool) -> None:
        self.directory = Path(tempfile.mkdtemp()) if disk else None
        self.settings = {
            "pages": pages, "slots": slots, "policy": policy, "step_tokens": step_tokens, "host_pages": host_pages
        }  # fmt: skip
        self.begin()

    def begin(self) -> None:
        """A process starts; what is on disk is still there."""
        stores = [SegmentStore(self.directory, b"small", 4 << 20)] if self.directory else []
        self.engine = SmallEngine(stores=stores, **self.settings)  # type: ignore[arg-type]

    @precondition(lambda self: self.directory is not None)
    @rule(really=st.integers(0, 3), harm=st.sampled_from(["none", "flip", "cut", "delete"]), data=st.data())
    def kill_and_restart(self, really: int, harm: str, data: st.DataObject) -> None:
        """The process dies, somebody spoils a file, and a new one starts."""
        if really or self.directory is None:
            return
        self.engine.loop.close()
        files = sorted(path for path in self.directory.rglob("*") if path.is_file() and path.stat().st_size)
        if files and harm != "none":
            _spoil(data.draw(st.sampled_from(files)), harm, data.draw(st.integers(0, 10**6)))
        self.begin()
        event(f"restarted after {harm}")

    @rule(really=st.integers(0, 2))
    def evict_everything(self, really: int) -> None:
        """Somebody else's work displaces all that may go."""
        if not really:
            self.engine.spoil_device()

    @precondition(lambda self: len(self.engine.live) < CROWD)
    @rule(document=st.integers(0, 1), length=LENGTHS, question=st.integers(0, 9), extra=st.integers(0, 6), how=HOW)
    def ask_about_a_document(self, document: int, length: int, question: int, extra: int, how: How) -> None:
        """Prompts share all, a part or nothing of their beginnings."""
        self.ask((*text(document, length), *text(100 + question, extra)), how)

    @precondition(lambda self: len(self.engine.live) < CROWD)
    @rule(past=conversations, question=st.integers(0, 9), extra=st.integers(1, 140), how=HOW)
    def continue_a_conversation(self, past: Prompt, question: int, extra: int, how: How) -> None:
        """A prompt that begins with an earlier prompt and its answer."""
        self.ask((*past, *text(200 + question, extra)), how)

    def ask(self, prompt: Prompt, how: How) -> None:
        max_tokens, salt, copies = how
        try:
            for _ in range(copies):
                self.engine.add(prompt, max_tokens, salt=salt)
        except ContextTooLong:
            assert len(prompt) >= self.engine.cache.capacity.tokens, "this request would have fitted"

    @rule(target=conversations, count=st.sampled_from([1, 2, 5, 20, 60]))
    def step(self, count: int) -> object:
        """Some steps; what finished can be continued later."""
        done: list[Prompt] = []
        for _ in range(count):
            for answer in self.engine.step():
                self.check(answer)
                done.append((*answer.prompt, *answer.tokens))
            self.engine.cache.check_integrity()
        return multiple(*done)

    @precondition(lambda self: self.engine.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """Whatever it is doing: waiting, in the middle of its prompt, decoding, preempted."""
        self.engine.abort(data.draw(st.sampled_from(sorted(self.engine.live))))

    @precondition(lambda self: self.engine.cache.stats().pages_cached > 4)
    @rule(really=st.integers(0, 5))
    def forget_everything(self, really: int) -> None:
        if not really:
            self.engine.cache.reset()

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.cache.check_integrity()
        stats = self.engine.cache.stats()
        assert stats.frames_free + stats.pages_held + stats.pages_cached + stats.frames_loading <= stats.frames
        assert stats.slots - stats.slots_free <= len(self.engine.live)

    def check(self, answer: Answer) -> None:
        assert answer.reason is FinishReason.LENGTH
        agree(answer)
        event("cached" if accounted(answer).cached_tokens else "nothing cached")

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for answer in self.engine.drain():
            self.check(answer)
        self.nothing_is_lost()
        stats = self.engine.cache.stats()
        assert not self.engine.live
        assert (stats.slots_free, stats.pages_held) == (stats.slots, 0), "a finished request left something behind"
        assert self.engine.loop.settle(30.0), "some copy never ended"
        event(f"fetched from {sorted(name for name, size in self.engine.cache.tiers.moved.bytes_out.items() if size)}")
        self.engine.cache.reset()
        self.engine.cache.check_integrity()
        assert self.engine.cache.stats().frames_free == stats.frames
        self.engine.loop.close()
        if self.directory is not None:
            shutil.rmtree(self.directory)
        for name in ("pages_evicted", "snapshots_evicted", "trapezoid_resumes", "snapshot_resumes", "pages_adopted"):
            if getattr(stats, name):
                event(name)
        if self.engine.loop.scheduler.stats().preemptions:
            event("preempted")


def _spoil(path: Path, harm: str, where: int) -> None:
    """A bit flips, the end is cut off, or the file is gone."""
    raw = bytearray(path.read_bytes())
    if harm == "flip":
        raw[where % len(raw)] ^= 1 << where % 8
        path.write_bytes(raw)
    elif harm == "cut":
        path.write_bytes(raw[: where % len(raw)])
    else:
        path.unlink()


class TestEngine(EngineMachine.TestCase):
    settings = settings(max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=_SLOW)


@pytest.mark.slow
@pytest.mark.timeout(0)
class TestEngineAtLength(EngineMachine.TestCase):
    settings = settings(max_examples=1500, stateful_step_count=60, deadline=None, suppress_health_check=_SLOW)


@pytest.mark.parametrize(
    ("pages", "policy", "lengths"),
    [(6, "adaptive", (250, 250)), (6, "none", (130, 200)), (8, "full", (5, 127, 300))],
)
def test_a_preempted_request_goes_on_where_it_was(pages: int, policy: str, lengths: tuple[int, ...]) -> None:
    """Requests grow until their pages no longer fit together: some must give way, come back and lose nothing."""
    engine = SmallEngine(pages=pages, slots=3, policy=policy, spare=0)
    prompts = [text(11 + i, length) for i, length in enumerate(lengths)]
    for prompt in prompts:
        engine.add(prompt, 400)
    answers = []
    while engine.loop.busy:
        answers += engine.step()
        engine.cache.check_integrity()
    assert sorted(answer.prompt for answer in answers) == sorted(prompts)
    for answer in answers:
        assert len(answer.tokens) == 400
        agree(answer)
        accounted(answer)
    assert engine.loop.scheduler.stats().preemptions, "these pages cannot hold all of them"


def test_a_prompt_that_can_never_fit_is_refused_and_an_output_that_cannot_is_cut() -> None:
    engine = SmallEngine(pages=3, spare=0)
    with pytest.raises(ContextTooLong):
        engine.add(text(1, 384), 1)
    assert not engine.loop.busy
    answer = engine.ask(text(1, 380), 10)
    assert len(answer.tokens) == 4 and answer.reason is FinishReason.LENGTH
    agree(answer)


def test_tenants_share_nothing() -> None:
    """The same prompt under another salt starts cold; under the same salt it does not."""
    engine = SmallEngine()
    prompt = text(6, 400)
    cached = [accounted(engine.ask(prompt, 3, salt=salt)).cached_tokens for salt in ("a", "b", "a", "b", "")]
    assert [bool(tokens) for tokens in cached] == [False, False, True, True, False]


def test_mixed_company_does_not_change_a_bit() -> None:
    """Twelve prompts of edge lengths through three slots at once, twice, the second time from the cache."""
    engine = SmallEngine(pages=60, slots=3, step_tokens=97)
    prompts = [text(20 + i, n) for i, n in enumerate([1, 3, 4, 5, 127, 128, 129, 255, 256, 257, 511, 513])]
    for _ in range(2):
        for prompt in prompts:
            engine.add(prompt, 42)
        answers = engine.drain()
        assert len(answers) == len(prompts)
        for answer in answers:
            agree(answer)
    assert engine.cache.stats().snapshot_resumes >= 5
