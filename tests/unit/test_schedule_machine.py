"""Random lives of scheduler and cache manager over a model that checks everything it reads (fake_model.py).

This is the proof of both rooms: any interleaving of requests, forks, chunk sizes, evictions, preemptions, aborts,
failures and resets leaves the books balanced, gives each request the tokens it would get alone, and never makes
the model read what is not there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel, prefix_ids, token_after
from fake_mover import FakeMover, FakeStore
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from triptych.cache import CacheCapacity, CacheGeometry, CacheManager
from triptych.cache.history import Forks
from triptych.cache.places import Prompt, SnapshotPolicy, full, snapshot_policy_named
from triptych.cache.policies import Below, Policies
from triptych.cache.retention import retention_named
from triptych.config import EngineConfig
from triptych.errors import ContextTooLong
from triptych.schedule import Scheduler
from triptych.words import CacheHints, FinishReason, Request, SampledToken, SamplingParams, StepPlan, StepResult, Usage


def _whims(prompt: Prompt, forks: Forks) -> dict[int, float]:
    """Everywhere or nowhere, so that long chains come without a snapshot, to be resumed by those who want one."""
    return full(prompt, forks) if prompt.length % 3 else {}


PLACES = tuple(snapshot_policy_named(name) for name in ("adaptive", "full", "periodic:256", "none", "bounded"))
PLACES += (SnapshotPolicy("whims", _whims),)
PINS = (0.0, 0.0, 0.0, 5.0, 50.0)
TTLS = (None, None, None, 3.0, 30.0)

VOCAB = 3
EDGES = (1, 3, 4, 5, 127, 128, 129, 131, 132, 133, 255, 256, 257, 383, 384, 385, 511, 512, 640, 900, 1280)
_RANDOM = np.random.default_rng(0)
_ROOT = _RANDOM.integers(0, VOCAB, 4096).astype(np.int32)
DOCUMENTS = [_ROOT]
for _fork in (0, 130, 384, 640):
    DOCUMENTS.append(np.concatenate([_ROOT[:_fork], _RANDOM.integers(0, VOCAB, 4096 - _fork).astype(np.int32)]))
SALTS = ("", "", "a")

LENGTHS = (EDGES, range(1, 300), range(1, 1500))
OUTPUTS = (1, 2, 3, 20, 128, 130, 260, 300, 400, 500, 600)
EVENTS = ["ask"] * 5 + ["ask_on"] * 3 + ["fly"] * 6 + ["take_off", "land"] * 3
EVENTS += ["leave", "leave_in_flight", "crash", "reset", "restart", "lose", "wait"]
SETTINGS: dict[str, Sequence[Any]] = {
    "frames": (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 40),
    "slots": (1, 2, 3, 4, 4, 5),
    "layers": (1, 1, 2, 3, 4),
    "budget": (1, 5, 30, 64, 100, 127, 128, 129, 200, 256, 257, 300),
    "prefix_cache": (True, True, True, True, False),
    "places": PLACES,
    "retention": ("lru", "value"),
    "quota": (1.0, 1.0, 0.5),
    "host": (0, 0, 3, 8, 40),
    "stores": (0, 0, 1, 1, 2),
    "limit": (3, 10**9, 10**9),
    "piece": (1, 2, 512),
    "faults": ((False,), (False,) * 9 + (True,), (False, True)),
}
Choose = Callable[[Sequence[Any]], Any]


class Life:
    """One engine's worth of scheduler, cache and fake model, with its clients. `choose` decides everything."""

    def __init__(self, choose: Choose) -> None:
        picked = {name: choose(options) for name, options in SETTINGS.items()}
        self.picked, self.choose = picked, choose
        self.budget = max(picked["budget"], picked["slots"])
        self.stores = [FakeStore(name, picked["limit"]) for name in ("disk", "remote")[: picked["stores"]]]
        self.now = 0.0
        self._start()
        self.texts: dict[str, tuple[np.ndarray, str]] = {}
        self.prompts: dict[str, int] = {}
        self.limits: dict[str, int] = {}
        self.live: list[str] = []
        self.over: list[str] = []
        self.flight: StepPlan | None = None
        self.crashed = False
        self.began: dict[str, tuple[int, int]] = {}
        self.seen: dict[bytes, tuple[int, ...]] = {}
        self.structure: tuple[int, ...] = ()
        self.serial = self.held = 0

    def _start(self) -> None:
        """A process begins: device and host are empty, the stores are as they were left."""
        picked = self.picked
        layers, slots, frames = picked["layers"], picked["slots"], picked["frames"]
        geometry = CacheGeometry(layers, (0,), (), 8, 4, 4, "float32", "float32")
        places: SnapshotPolicy = picked["places"]
        self.cache = CacheManager(
            geometry,
            CacheCapacity(frames, slots),
            layers,
            policies=Policies(
                places, retention_named(picked["retention"]), quota=picked["quota"], prefix_cache=picked["prefix_cache"]
            ),
            below=Below(picked["host"], self.stores),
            clock=lambda: self.now,
        )
        self.cache.prefetcher.piece = picked["piece"]
        config = EngineConfig(max_running=slots, step_tokens=self.budget, max_waiting=10**6)
        self.scheduler = Scheduler(self.cache, config, 1 << 20)
        self.model = FakeModel(frames, slots, layers, exact=places.exact)
        self.mover = FakeMover(self.model, self.stores)

    def restart(self, choose: Choose) -> None:
        """The process is killed and started again; whoever was waiting is told so."""
        if self.flight is None and choose([False] * 3 + [True]):
            for name in self.live:
                self.over.append(name)
            self.live.clear()
            self.began.clear()
            self.seen.clear()
            self._start()

    def lose(self, choose: Choose) -> None:
        """A store loses an object between two looks."""
        for store in self.stores:
            if store.contents:
                store.discard(choose(list(store.contents)))

    def wait(self, choose: Choose) -> None:
        """Time passes."""
        self.now += choose([0.1, 2.0, 20.0, 200.0])

    def live_on(self, choose: Choose) -> None:
        """Anything may happen next."""
        self.choose = choose
        getattr(self, choose(EVENTS))(choose)
        self.books_balance()

    # ---- clients

    def _add(self, tokens: np.ndarray, salt: str, outputs: int, forks: int = 1) -> None:
        for _ in range(forks):
            self.serial += 1
            name = f"r{self.serial}"
            hints = CacheHints((len(tokens) // 2, len(tokens)), None, self.choose(TTLS), self.choose(PINS))
            request = Request(name, tokens, SamplingParams(max_tokens=outputs), salt, hints)
            if len(tokens) >= self.cache.capacity.tokens:
                with pytest.raises(ContextTooLong):
                    self.scheduler.add(request)
                return
            self.scheduler.add(request)
            self.texts[name] = (tokens, salt)
            self.prompts[name] = len(tokens)
            self.limits[name] = min(len(tokens) + outputs, self.cache.capacity.tokens)
            self.live.append(name)

    def ask(self, choose: Choose) -> None:
        """One prompt, now and then one that can never fit, with up to two forks."""
        room = self.cache.capacity.tokens - 1
        length = choose(choose(LENGTHS))
        length = length + room if choose([False] * 19 + [True]) else min(length, room)
        document = DOCUMENTS[choose(range(len(DOCUMENTS)))]
        salt, forks = choose(SALTS), choose([1, 1, 1, 2, 3])
        self._add(document[:length], salt, choose(OUTPUTS), forks)

    def ask_on(self, choose: Choose) -> None:
        """The next turn of a conversation, or of its beginning."""
        if not self.over:
            return
        tokens, salt = self.texts[choose(self.over)]
        kept = tokens[: max(1, len(tokens) - choose([0, 0, 0, 1, 5, 128]))]
        room = self.cache.capacity.tokens - 1 - len(kept)
        if room > 0:
            self._add(np.concatenate([kept, DOCUMENTS[1][: min(choose(choose(LENGTHS)), room)]]), salt, choose(OUTPUTS))

    def leave(self, choose: Choose) -> None:
        """A client goes away, or has enough, at any moment."""
        if self.live:
            reason = choose([FinishReason.ABORT, FinishReason.STOP])
            self._end(choose(self.live), reason)

    def leave_in_flight(self, choose: Choose) -> None:
        """A client goes away while its rows are being run."""
        self.take_off()
        if self.flight is not None:
            name = choose([chunk.request_id for chunk in self.flight.chunks])
            if name in self.live:
                self._end(name, FinishReason.ABORT)

    def _end(self, name: str, reason: FinishReason) -> None:
        usage = self.scheduler.finish(name, reason)
        assert usage is not None
        self._check_usage(name, usage)
        self.live.remove(name)
        self.over.append(name)
        assert self.scheduler.finish(name, reason) is None

    def _check_usage(self, name: str, usage: Usage) -> None:
        assert usage.prompt_tokens == self.prompts[name]
        assert usage.completion_tokens == len(self.texts[name][0]) - self.prompts[name]
        assert min(usage.cached_tokens, usage.recomputed_tokens, usage.computed_tokens) >= 0
        assert sum(usage.cached_by_tier.values()) <= usage.cached_tokens
        if name in self.began and not self.scheduler.stats().preemptions:
            start, write_from = self.began[name]
            assert (usage.cached_tokens, usage.recomputed_tokens) == (start, write_from - start)
        if not self.cache.prefix_cache:
            assert usage.cached_tokens == usage.recomputed_tokens == 0

    # ---- the engine

    def take_off(self, choose: Choose | None = None) -> None:
        """Plan a step and leave it in the air."""
        if self.flight is not None:
            return
        for done in self.mover.some_end(self.choose, self.picked["faults"]):
            self.cache.end(done)
        self.flight = self.scheduler.plan()
        self.mover.run(self.cache.due())
        if self.flight is None:
            self.model.save(self.scheduler.take_saves())
        self.crashed = False
        self.now += 0.01
        if self.flight is None:
            assert not self.live or self.cache.copying, "nothing runs although someone waits"
        else:
            self._check_plan(self.flight)
            self._check_holds(self.flight)

    def _check_plan(self, plan: StepPlan) -> None:
        assert 0 < plan.rows <= self.budget
        names = [chunk.request_id for chunk in plan.chunks]
        assert len(set(names)) == len(names) and set(names) <= set(self.live)
        assert len({chunk.slot for chunk in plan.chunks}) == len(names)
        memory = self.cache.memory
        sealed = {node.page for node in memory.tree.nodes.values()} | set(memory.free)
        sealed |= {frame for frames in memory.snapshots for frame in frames}
        sealed |= {frame for frames in self.cache.tiers.frames_loading() for frame in frames}
        written: set[int] = set()
        for chunk in plan.chunks:
            self.began.setdefault(chunk.request_id, (chunk.start, chunk.write_from))
            begin = max(chunk.start, chunk.write_from)
            mine = set(chunk.pages[begin // 128 : -(-chunk.end // 128)].tolist())
            assert not mine & sealed and not mine & written, f"{chunk} writes into a page of others"
            written |= mine

    def _check_holds(self, plan: StepPlan) -> None:
        """Who is held up waits for tokens of its own prompt, which somebody else is about to run."""
        running = {chunk.request_id for chunk in plan.chunks}
        for name in self.live:
            hold = self.cache.inflight.held(name)
            if hold is None:
                continue
            self.held += 1
            (mine, salt), (theirs, other) = self.texts[name], self.texts[hold.leader]
            assert name not in self.cache.holdings and hold.leader in self.cache.holdings
            assert hold.leader in running or self.cache.copying, "a leader that does not run"
            assert salt == other and self.cache.holdings[hold.leader].processed < hold.until
            assert 0 < hold.until <= min(len(mine), len(theirs)) and hold.until % 128 == 0
            assert np.array_equal(mine[: hold.until], theirs[: hold.until])

    def land(self, choose: Choose | None = None) -> None:
        """The step in the air is run and applied; with `choose`, sometimes a row fails."""
        plan = self.flight
        if plan is None:
            return
        self.model.run(plan, self.texts)
        samples = [chunk.request_id for chunk in plan.chunks if chunk.samples]
        failed = {}
        if choose and samples and choose([False] * 9 + [True]):
            failed = {choose(samples): "The logits of this request are not numbers."}
        tokens = [SampledToken(n, self._next(n)) for n in samples if n not in failed]
        kept = self.scheduler.apply(plan, StepResult(plan.step, tuple(tokens), failed))
        assert [t.request_id for t in kept] == [t.request_id for t in tokens if t.request_id in self.live]
        self.flight = None
        for name in failed:
            if name in self.live:
                self._end(name, FinishReason.ERROR)
        for token in kept:
            name, (text, salt) = token.request_id, self.texts[token.request_id]
            self.texts[name] = (np.append(text, np.int32(token.token_id)), salt)
            if len(text) + 1 >= self.limits[name]:
                self._end(name, FinishReason.LENGTH)

    def _next(self, name: str) -> int:
        return token_after(int(self.model.names(name, *self.texts[name])[-1]), VOCAB)

    def fly(self, choose: Choose) -> None:
        """Several steps without events in between."""
        for _ in range(choose([1, 2, 3, 5, 10, 50, 150])):
            if not self.live:
                return
            self.run_step()

    def run_step(self) -> None:
        """Plan if nothing is in the air, then land."""
        self.take_off()
        self.land()
        now = self._structure()
        if now != self.structure:
            self.books_balance()

    def _structure(self) -> tuple[int, ...]:
        stats = self.cache.stats()
        counts = (stats.admissions, stats.frames_free, stats.pages_sealed, stats.pages_adopted, stats.pages_evicted)
        return (*counts, stats.snapshots_written, stats.snapshots_evicted, stats.slots_free)

    def crash(self, choose: Choose) -> None:
        """The step dies half way: its requests end with an error, and the next plan starts from nothing cached."""
        if self.flight is None or not choose([True, False]):
            return
        for save in self.flight.saves:
            self.model.poison(list(save.frames))
        for chunk in self.flight.chunks:
            self.model.poison(chunk.pages[max(chunk.start, chunk.write_from) // 128 :].tolist())
        for write in (write for chunk in self.flight.chunks for write in chunk.snapshots):
            self.model.poison(list(write.frames))
        for chunk in self.flight.chunks:
            if chunk.request_id in self.live:
                self._end(chunk.request_id, FinishReason.ERROR)
        self.flight, self.crashed = None, True

    def reset(self, choose: Choose) -> None:
        """Someone drops the prefix cache."""
        if choose([False] * 3 + [True]):
            self.cache.reset()

    # ---- what must always hold

    def books_balance(self) -> None:
        """After every event."""
        self.structure = self._structure()
        self.cache.check_integrity()
        stats = self.cache.stats()
        pages = stats.frames_free + stats.pages_held + stats.pages_cached + stats.frames_loading
        assert pages <= stats.frames
        if self.flight is None and not self.crashed:
            leaving = {frame for demotion in self.cache.tiers.leaving for frame in demotion.frames}
            self.model.poison([frame for frame in self.cache.memory.free if frame not in leaving])
            self._check_content()

    def _check_content(self) -> None:
        """Sealed pages never change, and equal keys mean equal content."""
        for key, node in self.cache.memory.tree.nodes.items():
            content = self.model.page_content(node.page)
            assert self.seen.setdefault(key, content) == content, f"page {node.page} changed after it was sealed"

    def end(self) -> None:
        """Everyone gets an answer, and nothing is left behind."""
        if self.budget < 16:
            for name in [n for n in self.live if len(self.texts[n][0]) > 300]:
                self._end(name, FinishReason.ABORT)
        for _ in range(30_000):
            if not self.live and self.flight is None:
                break
            self.run_step()
        assert not self.live and not self.scheduler.busy, "some request never ended"
        for name in self.over:
            self._check_text(name)
        self.mover.run(self.cache.due())
        self.model.save(self.scheduler.take_saves())
        for _ in range(10_000):
            if not self.cache.tiers.busy:
                break
            self.mover.run(self.cache.due())
            for done in self.mover.some_end(self.choose, self.picked["faults"]):
                self.cache.end(done)
        assert not self.cache.tiers.busy, "some copy never ended"
        stats = self.cache.stats()
        assert stats.pages_held == 0 and stats.slots_free == stats.slots and not stats.frames_loading
        self.cache.reset()
        self.cache.check_integrity()
        assert self.cache.stats().frames_free == stats.frames

    def _check_text(self, name: str) -> None:
        """The tokens are those of the request alone."""
        tokens, salt = self.texts[name]
        said = [token_after(prefix, VOCAB) for prefix in prefix_ids(tokens, salt).tolist()]
        assert tokens[self.prompts[name] :].tolist() == said[self.prompts[name] - 1 : -1]


def live(seed: int, events: int) -> Life:
    """A life by random numbers."""
    choose = random.Random(seed).choice
    life = Life(choose)
    for _ in range(events):
        life.live_on(choose)
    life.end()
    return life


@pytest.mark.parametrize("seed", range(16))
def test_random_lives(seed: int) -> None:
    live(seed, events=40)


def test_requests_are_held_up_in_some_lives() -> None:
    assert sum(live(seed, events=40).held > 0 for seed in range(100, 108)) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 2000))
def test_many_random_lives(seed: int) -> None:
    live(seed, events=80)


class HypothesisLife(RuleBasedStateMachine):
    """The same, where hypothesis chooses: it looks for the shortest life that goes wrong."""

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        """Draw the sizes."""
        self.life, self.broken = Life(lambda options: data.draw(st.sampled_from(options))), False

    # one rule that chooses, not one rule per event: hypothesis switches whole rules off in most lives
    @rule(data=st.data())
    def live_on(self, data: st.DataObject) -> None:
        """Draw what happens next."""
        self.broken = True
        self.life.live_on(lambda options: data.draw(st.sampled_from(options)))
        self.broken = False

    def teardown(self) -> None:
        if hasattr(self, "life") and not self.broken:
            self.life.end()


HypothesisLife.TestCase.settings = settings(
    max_examples=200, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestHypothesisLife = HypothesisLife.TestCase
