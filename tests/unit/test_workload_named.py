"""Generated workloads: the same for the same seed, in order of time, with the figures that they were calibrated on."""

from __future__ import annotations

import statistics
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from triptych.errors import ConfigError
from triptych.workload.named import WORKLOADS, retimed, workload
from triptych.workload.sessions import SessionRequest
from triptych.workload.trace_files import read_trace

MANY = 8_000


def prompt(request: SessionRequest) -> int:
    return sum(part.tokens for part in request.prompt)


def by_session(requests: list[SessionRequest]) -> dict[str, list[SessionRequest]]:
    sessions: dict[str, list[SessionRequest]] = {}
    for request in requests:
        sessions.setdefault(request.session, []).append(request)
    return sessions


def quantile(values: list[int], share: float) -> float:
    return sorted(values)[int(share * len(values))]


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_seed_makes_the_traffic_and_a_shorter_trace_is_its_beginning(name: str) -> None:
    one = workload(name, 400, 5).requests
    assert one == workload(name, 400, 5).requests and len(one) == 400
    assert one != workload(name, 400, 6).requests
    assert workload(name, 50, 5).requests == one[:50]
    assert all(first.time <= second.time for first, second in pairwise(one))


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_turn_repeats_the_one_before_unless_its_context_was_begun_anew(name: str) -> None:
    for session in by_session(workload(name, 1_500, 2).requests).values():
        for before, after in pairwise(session):
            carried = (*before.prompt, before.output)
            continues = after.prompt[: len(carried)] == carried
            assert continues or prompt(after) < prompt(before), "a context goes on or begins anew"


@pytest.mark.parametrize("name", WORKLOADS)
def test_one_id_has_one_length(name: str) -> None:
    lengths: dict[str, int] = {}
    for request in workload(name, 1_500, 3).requests:
        for part in (*request.prompt, request.output):
            assert lengths.setdefault(part.id, part.tokens) == part.tokens


def test_chat_has_the_lengths_turns_and_pauses_of_mooncakes_conversations() -> None:
    requests = workload("chat", MANY, 1).requests
    prompts = [prompt(request) for request in requests]
    assert statistics.mean(prompts) == pytest.approx(12_035, rel=0.1)
    assert quantile(prompts, 0.5) == pytest.approx(6_909, rel=0.1)
    assert statistics.mean(request.output.tokens for request in requests) == pytest.approx(343, rel=0.05)
    assert MANY / (requests[-1].time - requests[0].time) == pytest.approx(3.4, rel=0.1)
    later = sum(len(session) - 1 for session in by_session(requests).values()) / MANY
    assert later == pytest.approx(0.387, abs=0.05)  # conversations that go on behind the last request count less
    pauses = [b.time - a.time for session in by_session(requests[: MANY // 2]).values() for a, b in pairwise(session)]
    assert sum(pause < 60 for pause in pauses) / len(pauses) == pytest.approx(0.178, abs=0.05)


def test_research_has_the_contexts_and_steps_of_agents_in_production() -> None:
    requests = workload("research-agent", MANY, 1).requests
    prompts = [prompt(request) for request in requests]
    assert quantile(prompts, 0.5) == pytest.approx(55_000, rel=0.15)
    assert quantile(prompts, 0.9) == pytest.approx(280_000, rel=0.1)
    assert max(prompts) <= 504_000
    pauses = [b.time - a.time for session in by_session(requests).values() for a, b in pairwise(session)]
    assert sum(pause < 60 for pause in pauses) / len(pauses) > 0.7  # those between questions are longer


def test_rollouts_share_their_question_and_nothing_behind_it() -> None:
    requests = workload("rl-rollout", 1_024, 1).requests
    assert set(Counter(request.prompt for request in requests).values()) == {16}
    assert Counter(request.time for request in requests) == {0.0: 512, 600.0: 512}
    assert max(request.output.tokens for request in requests) <= 32_768
    assert len({request.output.id for request in requests}) == 1_024


def test_mixed_has_a_third_of_each() -> None:
    kinds = Counter(request.session[0] for request in workload("mixed", 6_000, 1).requests)
    assert set(kinds) == {"c", "r", "u"}
    assert min(kinds.values()) > 0.2 * 6_000


def test_arrivals_move_sessions_and_keep_the_pauses_inside() -> None:
    requests = workload("chat", 600, 4).requests
    pauses = {name: [b.time - a.time for a, b in pairwise(s)] for name, s in by_session(requests).items()}
    for arrivals in ("trace", "poisson:0.5", "closed:8"):
        moved = retimed(requests, arrivals, 4)
        assert all(first.time <= second.time for first, second in pairwise(moved))
        for name, session in by_session(moved).items():
            assert [b.time - a.time for a, b in pairwise(session)] == pytest.approx(pauses[name])
    starts = sorted(session[0].time for session in by_session(retimed(requests, "poisson:0.5", 4)).values())
    assert len(starts) / starts[-1] == pytest.approx(0.5, rel=0.2)


def test_closed_loops_have_so_many_sessions_at_once() -> None:
    moved = retimed(workload("chat", 600, 4).requests, "closed:8")
    spans = [(session[0].time, session[-1].time) for session in by_session(moved).values()]
    for start, _ in spans:
        assert sum(begin < start < end for begin, end in spans) <= 8


@pytest.mark.parametrize(
    ("name", "arrivals", "sentence"),
    [
        ("chta", "trace", "Did you mean 'chat'?"),
        ("chat", "poison:1", "Did you mean 'poisson'?"),
        ("chat", "poisson", "sessions per second"),
        ("chat", "closed:2.5", "a number of people"),
        ("chat", "closed:0", "a number of people"),
    ],
)
def test_wrong_names_get_the_nearest(name: str, arrivals: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        workload(name, 5, 0, arrivals)
    assert sentence in str(refused.value)


def test_what_is_written_is_read_as_the_same_tokens(tmp_path: Path) -> None:
    made = workload("research-agent", 20, 1)
    made.write(tmp_path / "trace.jsonl")
    for mine, theirs in zip(made, read_trace(tmp_path / "trace.jsonl"), strict=True):
        assert np.array_equal(mine.prompt, theirs.prompt) and np.array_equal(mine.output, theirs.output)
        assert (mine.marks, mine.session) == (theirs.marks, theirs.session)
