"""Generated agent traffic: the same for the same seed, in order, and with the published statistics."""

from __future__ import annotations

import statistics
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from triptych.workload.agents import AgentTraffic, agent_trace
from triptych.workload.sessions import SessionRequest
from triptych.workload.trace_files import read_trace

# few users, so that whole sessions fit in what a test can look at
WHOLE = AgentTraffic(users=8)


@pytest.fixture(scope="module")
def traffic() -> list[SessionRequest]:
    return agent_trace(12_000, 3, WHOLE).requests


def length(request: SessionRequest) -> int:
    return sum(part.tokens for part in request.prompt)


def is_subagent(request: SessionRequest) -> bool:
    return "a" in request.session


def by_session(requests: list[SessionRequest]) -> dict[str, list[SessionRequest]]:
    """The main agents' requests, by session, without those that had not ended yet."""
    sessions: dict[str, list[SessionRequest]] = {}
    for request in requests:
        if not is_subagent(request):
            sessions.setdefault(request.session, []).append(request)
    newest = {name.partition("s")[0]: name for name in sessions}  # the last of each user
    return {name: found for name, found in sessions.items() if name not in newest.values()}


def test_the_same_seed_is_the_same_traffic_and_another_is_not() -> None:
    assert agent_trace(200, 5).requests == agent_trace(200, 5).requests
    assert agent_trace(200, 5).requests != agent_trace(200, 6).requests
    assert agent_trace(200, 5).name == "agents-5"


def test_a_shorter_trace_is_the_beginning_of_a_longer_one() -> None:
    longer = agent_trace(200, 5).requests
    assert agent_trace(50, 5).requests == longer[:50]
    assert agent_trace(0, 5).requests == []


def test_requests_come_in_order_of_time(traffic: list[SessionRequest]) -> None:
    assert len(traffic) == 12_000 and traffic[0].time > 0
    assert all(one.time <= other.time for one, other in pairwise(traffic))


def test_all_users_come() -> None:
    assert len({request.session.partition("s")[0] for request in agent_trace(2000, 0).requests}) == 43


def test_what_is_appended_and_answered_is_as_long_as_published(traffic: list[SessionRequest]) -> None:
    """TraceLab: 6.55K tokens appended to a step on average, with a heavy tail, and 523 answered."""
    main = [request for request in traffic if not is_subagent(request)]
    appended = [request.prompt[-1].tokens for request in main]
    assert statistics.mean(appended) == pytest.approx(6550, rel=0.1)
    assert statistics.mean(request.output.tokens for request in main) == pytest.approx(523, rel=0.1)
    appended.sort()
    assert sum(appended[-len(appended) // 10 :]) > 0.5 * sum(appended), "a tenth of the steps brings half of it"


def test_sessions_have_as_many_requests_and_steps_as_published(traffic: list[SessionRequest]) -> None:
    """TraceLab: 9.2 requests of a person a session, 8.7 steps a request."""
    sessions = by_session(traffic)
    assert len(sessions) > 80
    asked = {name: sum(r.prompt[-1].kind == "user" for r in found) for name, found in sessions.items()}
    assert statistics.mean(asked.values()) == pytest.approx(9.2, rel=0.25)
    assert sum(map(len, sessions.values())) / sum(asked.values()) == pytest.approx(8.7, rel=0.15)


def test_sessions_begin_with_tools_and_one_of_a_few_system_prompts(traffic: list[SessionRequest]) -> None:
    """Claude Code: 12.4K tokens of tools and 3 to 4K of system prompt before anybody says anything."""
    begins = Counter(request.prompt[:2] for request in traffic)
    assert len(begins) == WHOLE.systems
    for tools, system in begins:
        assert (tools.tokens, tools.kind, system.kind) == (12_400, "tools", "system")
        assert 3000 <= system.tokens <= 4000


def test_people_pause_longer_than_tools_and_often_longer_than_a_cache_lasts(traffic: list[SessionRequest]) -> None:
    human, tool = [], []
    for found in by_session(traffic).values():
        for before, after in pairwise(found):
            (human if after.prompt[-1].kind == "user" else tool).append(after.time - before.time)
    assert statistics.median(human) == pytest.approx(180, rel=0.25)
    assert sum(pause > 600 for pause in human) / len(human) > 0.1
    assert statistics.mean(tool) == pytest.approx(6 + 523 / 80, rel=0.15)


def test_a_turn_begins_with_the_prompt_and_output_before_it(traffic: list[SessionRequest]) -> None:
    """Unless the context was full and the agent went on with a summary."""
    restarts = 0
    for found in by_session(traffic).values():
        for before, after in pairwise(found):
            known = (*before.prompt, before.output)
            if after.prompt[: len(known)] == known:
                assert len(after.prompt) == len(known) + 1
            else:
                restarts += 1
                assert length(before) + before.output.tokens > WHOLE.context - WHOLE.append_most
                assert after.prompt[:2] == before.prompt[:2]
                assert after.prompt[2].tokens == 4000
    assert restarts
    assert max(map(length, traffic)) <= WHOLE.context


def test_a_turn_begins_with_the_same_tokens() -> None:
    first, second = by_session(agent_trace(700, 1, AgentTraffic(users=1)).requests)["u0s0"][:2]
    before, after = first.to_trace(), second.to_trace()
    known = np.concatenate([before.prompt, before.output])
    assert np.array_equal(after.prompt[: len(known)], known)


def test_subagents_begin_again_from_the_shared_prompt(traffic: list[SessionRequest]) -> None:
    subagents = [request for request in traffic if is_subagent(request)]
    turns = sum(request.prompt[-1].kind == "user" for request in traffic if not is_subagent(request))
    assert len(subagents) / turns == pytest.approx(0.08, rel=0.4)
    assert all([part.kind for part in request.prompt] == ["tools", "system", "user"] for request in subagents)


def test_no_two_parts_share_an_id_and_differ(traffic: list[SessionRequest]) -> None:
    """Else two stretches of text would count as one."""
    parts = {part for request in traffic for part in (*request.prompt, request.output)}
    kinds: dict[str, set[tuple[int, str]]] = {}
    for part in parts:
        kinds.setdefault(part.id, set()).add((part.tokens, part.kind))
    assert all(len(found) == 1 for found in kinds.values())


def test_generated_traffic_can_be_kept_as_a_file(tmp_path: Path) -> None:
    trace = agent_trace(40, 2)
    trace.write(tmp_path / "agents.jsonl")
    for one, other in zip(trace, read_trace(tmp_path / "agents.jsonl"), strict=True):
        assert np.array_equal(one.prompt, other.prompt) and np.array_equal(one.output, other.output)
        assert (one.marks, one.session) == (other.marks, other.session)
        assert abs(one.time - other.time) < 1e-3
