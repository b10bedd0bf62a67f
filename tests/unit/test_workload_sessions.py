"""The session format: what is written is read, parts are what is shared, and what is wrong is named."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_traces import write_lines

from triptych.errors import ConfigError
from triptych.words import TokenIds
from triptych.workload.sessions import KINDS, Part, SessionRequest, SessionTrace, write_sessions
from triptych.workload.trace_files import read_trace
from triptych.workload.traces import MAX_TOKENS, Trace

HEAD = {"format": "triptych-sessions", "version": 1}
LINE = {"time": 0.0, "session": "s", "tenant": "t", "prompt": [["a", 200, "user"]], "output": ["o", 5]}
EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "session-trace.jsonl"


def tokens(*parts: Part, output: Part | None = None) -> TokenIds:
    """The prompt that `parts` make."""
    return SessionRequest(0.0, "s", "", parts, output or Part("out", 1)).to_trace().prompt


def read_sessions(path: Path) -> SessionTrace:
    trace: Trace = read_trace(path)
    assert isinstance(trace, SessionTrace)
    return trace


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as error:
        read_trace(path)
    return str(error.value)


# times are kept to the millisecond
times = st.integers(0, 10**9).map(lambda ms: round(ms / 1000, 3))
parts = st.builds(Part, st.text(st.characters()), st.integers(1, MAX_TOKENS), st.sampled_from(KINDS))
requests = st.builds(
    SessionRequest,
    times,
    st.text(),
    st.text(),
    st.lists(parts, min_size=1, max_size=5).map(tuple),
    st.builds(Part, st.text(), st.integers(0, MAX_TOKENS)),
)


@given(st.lists(requests, min_size=1, max_size=5))
def test_any_list_of_parts_survives_the_round_trip(tmp_path_factory: pytest.TempPathFactory, every: Any) -> None:
    path = tmp_path_factory.mktemp("trip") / "trace.jsonl"
    write_sessions(path, every)
    assert read_sessions(path).requests == every


def test_a_trace_writes_itself_and_is_named_after_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    trace = SessionTrace("made", [SessionRequest(1.2345678, "s", "t", (Part("a", 3, "user"),), Part("o", 0))])
    trace.write(path)
    again = read_sessions(path)
    assert (again.name, len(again)) == ("mine.jsonl", 1)
    assert again.requests[0].time == 1.235
    assert json.loads(path.read_text().splitlines()[0]) == HEAD


def test_parts_are_shared_to_the_token() -> None:
    tools, system, question = Part("tools", 777, "tools"), Part("system", 301, "system"), Part("q", 50, "user")
    one = tokens(tools, system, question)
    other = tokens(tools, system, Part("another", 50, "user"))
    assert len(one) == len(other) == 777 + 301 + 50
    assert np.array_equal(one[: 777 + 301], other[: 777 + 301])
    assert one[777 + 301] != other[777 + 301]
    assert np.array_equal(tokens(system), one[777 : 777 + 301]), "a part is the same tokens wherever it stands"
    assert np.array_equal(tokens(Part("tools", 700, "user")), one[:700]), "cut short it is a prefix of itself"


def test_an_output_is_what_the_next_prompt_repeats() -> None:
    first = SessionRequest(0.0, "s", "", (Part("q", 130, "user"),), Part("answer", 77)).to_trace()
    again = tokens(Part("q", 130, "user"), Part("answer", 77), Part("q2", 9, "user"))
    assert np.array_equal(again[:207], np.concatenate([first.prompt, first.output]))


def test_marks_are_the_ends_of_parts_and_the_rest_is_handed_on() -> None:
    lengths = [777, 301, 50, 1]
    made = tuple(Part(f"p{n}", length, kind) for n, (length, kind) in enumerate(zip(lengths, KINDS, strict=False)))
    request = SessionRequest(2.5, "mine", "theirs", made, Part("o", 12)).to_trace()
    assert request.marks == tuple(accumulate(lengths))
    assert request.marks[-1] == len(request.prompt)
    assert (request.time, request.session, request.tenant, len(request.output)) == (2.5, "mine", "theirs", 12)


def test_half_a_surrogate_pair_is_an_id_like_any_other(tmp_path: Path) -> None:
    """JSON can say it, so a client may have sent it."""
    path = write_lines(tmp_path / "t.jsonl", [HEAD, LINE | {"prompt": [["\ud800", 5, "user"]], "tenant": "\udfff"}])
    [request] = read_trace(path)
    assert len(request.prompt) == 5


def test_session_and_tenant_may_be_left_out(tmp_path: Path) -> None:
    line = {key: LINE[key] for key in ("time", "prompt", "output")}
    [request] = read_sessions(write_lines(tmp_path / "t.jsonl", [HEAD, line])).requests
    assert (request.session, request.tenant) == ("", "")


def test_only_the_first_requests_are_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", [HEAD, LINE, LINE | {"time": 1}, {"time": -1}])
    assert [request.time for request in read_trace(path, limit=2)] == [0.0, 1.0]
    assert "line 4" in refusal(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sesion": "x"}, "unknown key 'sesion'. Did you mean 'session'?"),
        ({"time": None}, "time must be seconds from the start, not None."),
        ({"time": -0.5}, "time must be seconds from the start, not -0.5."),
        ({"time": True}, "time must be seconds from the start, not True."),
        ({"time": float("nan")}, "time must be seconds from the start, not nan."),
        ({"time": float("inf")}, "time must be seconds from the start, not inf."),
        ({"time": 10**400}, "time must be seconds from the start, not 1"),
        ({"session": None}, "session must be a string, not None."),
        ({"tenant": 7}, "tenant must be a string, not 7."),
        ({"prompt": None}, "prompt must be a list of parts [id, tokens, kind]."),
        ({"prompt": []}, "prompt must be a list of parts [id, tokens, kind]."),
        ({"prompt": ["a", 5, "user"]}, "a part is [id, tokens, kind], not 'a'."),
        ({"prompt": [["a", 5]]}, "a part is [id, tokens, kind], not ['a', 5]."),
        ({"prompt": [[1, 5, "user"]]}, "a part is [id, tokens, kind], not [1, 5, 'user']."),
        ({"prompt": [["a", 0, "user"]]}, f"part 'a' has 0 tokens; write an integer from 1 to {MAX_TOKENS}."),
        ({"prompt": [["a", -3, "user"]]}, f"part 'a' has -3 tokens; write an integer from 1 to {MAX_TOKENS}."),
        ({"prompt": [["a", 1.5, "user"]]}, f"part 'a' has 1.5 tokens; write an integer from 1 to {MAX_TOKENS}."),
        ({"prompt": [["a", True, "user"]]}, f"part 'a' has True tokens; write an integer from 1 to {MAX_TOKENS}."),
        ({"prompt": [["a", MAX_TOKENS + 1, "user"]]}, f"part 'a' has {MAX_TOKENS + 1} tokens; write an integer from"),
        ({"prompt": [["a", 5, "usr"]]}, "part 'a' is of unknown kind 'usr'. Did you mean 'user'?"),
        ({"prompt": [["a", 5, []]]}, "part 'a' is of unknown kind []."),
        ({"output": None}, "output must be [id, tokens]."),
        ({"output": ["o", 5, "output"]}, "output must be [id, tokens]."),
        ({"output": ["o", -1]}, f"part 'o' has -1 tokens; write an integer from 0 to {MAX_TOKENS}."),
        ({"output": [5, 5]}, "a part is [id, tokens, kind], not [5, 5, 'output']."),
    ],
)
def test_a_bad_value_is_one_sentence_with_file_line_and_key(tmp_path: Path, change: Any, words: str) -> None:
    path = write_lines(tmp_path / "t.jsonl", [HEAD, LINE, LINE | change])
    sentence = refusal(path)
    assert sentence.startswith(f"{path}, line 3: {words}")
    assert "\n" not in sentence


@pytest.mark.parametrize("key", ["time", "prompt", "output"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    path = write_lines(tmp_path / "t.jsonl", [HEAD, {name: LINE[name] for name in LINE if name != key}])
    assert f"line 2: {key} must be" in refusal(path)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([HEAD], "holds no requests."),
        ([HEAD | {"version": 2}, LINE], "has version 2 of triptych-sessions; version 1 is read here."),
        ([HEAD | {"format": "other"}, LINE], "is no trace: its first line has neither hash_ids (Mooncake) nor format"),
        ([LINE], "is no trace: its first line has neither hash_ids (Mooncake) nor format"),
    ],
)
def test_the_first_line_must_name_the_format(tmp_path: Path, lines: list[object], words: str) -> None:
    path = write_lines(tmp_path / "t.jsonl", lines)
    assert refusal(path).startswith(f"{path} {words}")


def test_blank_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f"{json.dumps(HEAD)}\n\n{json.dumps(LINE)}\n\n{{}}\n")
    assert "line 5" in refusal(path)


def test_where_nothing_can_be_written_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path} cannot be written: Is a directory"):
        write_sessions(tmp_path, [])


def test_the_shipped_example_is_two_users_with_one_system_prompt() -> None:
    trace = read_sessions(EXAMPLE)
    assert {request.session for request in trace.requests} == {"ann", "ben"}
    assert len({request.prompt[:2] for request in trace.requests}) == 1
    assert {part.kind for request in trace.requests for part in request.prompt} == set(KINDS)
    last: dict[str, tuple[Part, ...]] = {}
    for request in trace.requests:
        before = last.get(request.session, ())
        assert request.prompt[: len(before)] == before
        last[request.session] = (*request.prompt, request.output)
